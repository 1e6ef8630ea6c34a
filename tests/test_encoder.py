"""The encoder: images, videos and pixel values in, transformers' embeddings out."""

import json
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

import qwenvit
from common.hf_towers import build_tower, forward, tower_class
from qwenvit import default_encoder
from qwenvit import encoder as encoder_module
from qwenvit.encoder import Encoder
from support.towers import SMALL, ours_from

FAMILIES = list(SMALL)
TINY = replace(SMALL["qwen2_5_vl"], depth=1, fullatt_block_indexes=(0,))


def picture(height, width, seed=0):
    noise = np.random.default_rng(seed).integers(0, 256, (height // 8 + 1, width // 8 + 1, 3), dtype=np.uint8)
    return Image.fromarray(noise).resize((width, height), Image.Resampling.BICUBIC)


def save_checkpoint(family, folder, dtype=torch.float32, prefix="model.visual."):
    """A checkpoint as published: vision and language tensors, the tower's config nested."""
    config = replace(SMALL[family], depth=4, fullatt_block_indexes=(3,) if SMALL[family].window_size else (),
                     deepstack_visual_indexes=(0, 2) if SMALL[family].deepstack_visual_indexes else ())  # fmt: skip
    hf = build_tower(config, dtype=dtype)
    tensors = {f"{prefix}{name}": tensor.clone() for name, tensor in hf.state_dict().items()}
    save_file(tensors | {"lm_head.weight": torch.ones(8, 8)}, folder / "model.safetensors")
    composite = {"model_type": config.traits.model_types[1], "vision_config": config.to_hf()}
    (folder / "config.json").write_text(json.dumps(composite))
    return hf


@pytest.fixture(params=FAMILIES)
def loaded(request, tmp_path):
    hf = save_checkpoint(request.param, tmp_path)
    return hf, Encoder.from_pretrained(tmp_path, device="cpu")


def test_encode_gives_each_image_what_transformers_gives(loaded):
    hf, enc = loaded
    images = [picture(220, 310), picture(512, 260, 1), picture(96, 96, 2)]
    out = enc.encode(images)
    pixel_values, grid = enc.image_processor(images)
    _, tokens, deepstack = forward(hf, pixel_values, grid)
    assert torch.equal(out.packed, tokens)
    assert torch.equal(out.grid_thw, grid)
    assert len(out) == 3
    start = 0
    for item, (t, h, w) in zip(out, grid.tolist(), strict=True):
        end = start + t * h * w // 4
        assert torch.equal(item.tokens, tokens[start:end])
        assert item.grid == (1, h // 2, w // 2)
        assert item.spatial().shape == (h // 2, w // 2, enc.config.out_hidden_size)
        assert torch.equal(item.spatial()[1, 2], tokens[start + w // 2 + 2])
        assert len(item.deepstack) == len(deepstack)
        for ours, theirs in zip(item.deepstack, deepstack, strict=True):
            assert torch.equal(ours, theirs[start:end])
        start = end


def test_call_gives_what_transformers_gives(loaded):
    hf, enc = loaded
    pixel_values, grid = enc.image_processor([picture(220, 310), picture(90, 90)])
    out = enc(pixel_values, grid)
    hidden, tokens, deepstack = forward(hf, pixel_values, grid)
    assert torch.equal(out.last_hidden_state, hidden)
    assert torch.equal(out.pooler_output, tokens)
    assert all(torch.equal(a, b) for a, b in zip(out.deepstack_features, deepstack, strict=True))


def test_video_gives_what_transformers_gives(loaded):
    hf, enc = loaded
    frames = [picture(180, 240, seed) for seed in range(5)]
    out = enc.encode_video(frames)
    pixel_values, grid = enc.video_processor(frames)
    _, tokens, _ = forward(hf, pixel_values, grid)
    assert torch.equal(out.packed, tokens)
    t, h, w = grid[0].tolist()
    assert t == 3
    assert out[0].spatial().shape == (3, h // 2, w // 2, enc.config.out_hidden_size)


def test_saved_tower_loads_here_and_in_transformers(loaded, tmp_path):
    hf, enc = loaded
    enc.save_pretrained(tmp_path / "alone")
    again = Encoder.from_pretrained(tmp_path / "alone", device="cpu")
    assert again.config == enc.config
    assert again.image_processor == enc.image_processor
    assert again.video_processor == enc.video_processor
    theirs = tower_class(enc.config.family).from_pretrained(tmp_path / "alone", attn_implementation="sdpa")
    theirs_state = theirs.state_dict()
    assert all(torch.equal(tensor, theirs_state[name]) for name, tensor in hf.state_dict().items())
    pixel_values, grid = enc.image_processor([picture(150, 150)])
    assert torch.equal(again(pixel_values, grid).pooler_output, forward(theirs, pixel_values, grid)[1])


def test_dtypes(tmp_path):
    hf = save_checkpoint("qwen2_5_vl", tmp_path, torch.bfloat16)
    assert Encoder.from_pretrained(tmp_path, device="cpu").dtype == torch.float32
    auto = Encoder.from_pretrained(tmp_path, device="cpu", dtype="auto")
    assert auto.dtype == torch.bfloat16
    assert Encoder.from_pretrained(tmp_path, device="cpu", dtype=torch.float16).dtype == torch.float16
    pixel_values, grid = auto.image_processor([picture(150, 150)])
    assert torch.equal(auto(pixel_values, grid).pooler_output, forward(hf, pixel_values, grid)[1])


def test_order_and_values_whatever_the_batching(monkeypatch):
    images = [picture(64 + 32 * i, 200, i) for i in range(5)]
    whole = qwenvit.encode(images, model="demo", device="cpu")
    monkeypatch.setattr(encoder_module, "PATCHES_PER_BATCH", 300)
    pieces = qwenvit.encode(images, model="demo", device="cpu")
    assert torch.equal(pieces.grid_thw, whole.grid_thw)
    torch.testing.assert_close(pieces.packed, whole.packed, rtol=1e-4, atol=1e-4)
    assert [len(item.deepstack) for item in pieces] == [3] * 5


def test_a_batch_takes_as_many_patches_as_it_may(monkeypatch):
    enc, runs = Encoder(ours_from(build_tower(TINY), TINY)), []
    run = Encoder._run
    monkeypatch.setattr(Encoder, "_run", lambda self, write, grid: runs.append(grid.patches) or run(self, write, grid))
    images = [picture(64, 64)] * 4
    patches = int(enc.image_processor(images[:1])[1].prod())
    for limit, expected in ((2 * patches, [2, 2]), (2 * patches - 1, [1] * 4), (4 * patches, [4])):
        monkeypatch.setattr(encoder_module, "PATCHES_PER_BATCH", limit)
        enc.encode(images)
        assert runs == [patches * count for count in expected]
        runs.clear()


@pytest.mark.parametrize("field", ["patch_size", "temporal_patch_size", "merge_size"])
@pytest.mark.parametrize("kind", ["image", "video"])
def test_a_processor_of_other_sizes_than_the_towers_is_refused(kind, field):
    enc = Encoder(ours_from(build_tower(TINY), TINY))
    right = {"image_processor": enc.image_processor, "video_processor": enc.video_processor}
    Encoder(enc.tower, **right)
    processor = right[f"{kind}_processor"]
    wrong = replace(processor, **{field: 2 * getattr(processor, field)})
    with pytest.raises(ValueError, match=f"{kind} processor: .* do not fit the tower's"):
        Encoder(enc.tower, **right | {f"{kind}_processor": wrong})


def test_gradients_reach_the_tower_when_asked(tmp_path):
    save_checkpoint("qwen3_vl", tmp_path)
    enc = Encoder.from_pretrained(tmp_path, device="cpu")
    pixel_values, grid = enc.image_processor([picture(64, 96)])
    assert not enc(pixel_values, grid).pooler_output.requires_grad
    enc.tower.requires_grad_()
    enc(pixel_values, grid).pooler_output.sum().backward()
    assert all(p.grad is not None for name, p in enc.tower.named_parameters() if "deepstack" not in name)
    assert not enc.encode(picture(64, 96)).packed.requires_grad


def test_module_level_encode_keeps_its_encoder(monkeypatch):
    loads = []
    load = Encoder.from_pretrained.__func__
    monkeypatch.setattr(
        Encoder, "from_pretrained", classmethod(lambda cls, *a, **k: loads.append(a) or load(cls, *a, **k))
    )
    monkeypatch.setattr(default_encoder, "_current", {"key": None, "encoder": None})
    with ThreadPoolExecutor(4) as pool:
        outs = list(pool.map(lambda _: qwenvit.encode(picture(64, 64), model="demo", device="cpu"), range(4)))
    assert len(loads) == 1
    assert all(torch.equal(out.packed, outs[0].packed) for out in outs)
    qwenvit.encode(picture(64, 64), model="demo", device="cpu", dtype="bfloat16")
    assert len(loads) == 2


def test_an_unknown_option_is_refused_before_the_model_is_loaded():
    with pytest.raises(TypeError, match=r"options: expected only min_pixels, .*, got max_pixel$"):
        qwenvit.encode(picture(64, 64), model="no-such-model", max_pixel=3)


def test_demo_announces_itself_and_is_reached_by_name_only(tmp_path):
    with pytest.warns(UserWarning, match="random weights: shapes and plumbing are real, features are not"):
        first = Encoder.from_pretrained("demo", device="cpu")
    assert torch.equal(
        first.encode(picture(64, 64)).packed,
        Encoder.from_pretrained("demo", device="cpu").encode(picture(64, 64)).packed,
    )
    assert qwenvit.encode.__kwdefaults__["model"] == "Qwen/Qwen2.5-VL-7B-Instruct"
    with pytest.raises((ValueError, OSError), match=r"Qwen/Qwen2\.5-VL-7B-Instruct"):
        Encoder.from_pretrained("Qwen/Qwen2.5-VL-7B-Instruct", cache_dir=tmp_path, local_files_only=True)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"model": "no-such-model"}, "model: 'no-such-model' is no existing path"),
        ({"model": ""}, "model: '' is no existing path"),
        ({"model": "Qwen2.5-VL-7B-Instruct"}, "did you mean 'Qwen/Qwen2.5-VL-7B-Instruct'"),
        ({"model": "Demo"}, "did you mean 'demo'"),
        ({"model": "tower/model.safetensors"}, "is no existing path"),
        ({"model": "demo", "device": "meta"}, "device: 'meta' cannot be used"),
        ({"model": "demo", "device": "cpu", "impl": "triton"}, "impl: 'triton' cannot run here: cpu is no CUDA device"),
        ({"model": "demo", "impl": "cuda"}, "impl: expected 'auto', 'triton' or 'reference', got 'cuda'"),
        ({"model": "demo", "dtype": "int8"}, "dtype: expected one of"),
        ({"model": "demo", "dtype": torch.int8}, "dtype: expected one of"),
    ],
)
def test_bad_arguments(arguments, message, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(ValueError, match=message):
        Encoder.from_pretrained(**arguments)


@pytest.mark.filterwarnings("ignore:model='demo'")
def test_bad_pixel_values():
    enc = Encoder.from_pretrained("demo", device="cpu")
    grid = torch.tensor([[1, 4, 4]])
    with pytest.raises(ValueError, match=r"got \[1, 3, 64, 64\]; for whole images use encode\(\)"):
        enc(torch.rand(1, 3, 64, 64), grid)
    with pytest.raises(ValueError, match=r"expected \[patches, 1536\].*got \[16, 1176\]"):
        enc(torch.rand(16, 1176), grid)
    with pytest.raises(ValueError, match="describes 16 patches, got 12"):
        enc(torch.rand(12, 1536), grid)
    with pytest.raises(ValueError, match=r"\[1, 4, 4\]\] and 1992 more describes 32000 patches, got 12"):
        enc(torch.rand(12, 1536), grid.repeat(2000, 1))
    with pytest.raises(TypeError, match=r"expected a floating tensor.*torch.uint8"):
        enc(torch.zeros(16, 1536, dtype=torch.uint8), grid)
    with pytest.raises(TypeError, match="ndarray"):
        enc(np.zeros((16, 1536), dtype=np.float32), grid)


def test_config_json_that_is_missing_or_broken(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"expected one of model_visual\.safetensors, .* got no files"):
        Encoder.from_pretrained(tmp_path)
    save_file({"visual.merger.mlp.0.weight": torch.ones(2)}, tmp_path / "model.safetensors")
    with pytest.raises(FileNotFoundError, match=r"no config\.json"):
        Encoder.from_pretrained(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match="expected JSON"):
        Encoder.from_pretrained(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(ValueError, match=r"config\.json.*unknown model_type 'bert'"):
        Encoder.from_pretrained(tmp_path)
