"""What must not happen silently around the encoder: lost files, stale towers, leaks, overflow, global defaults."""

import json
import os
import weakref
from dataclasses import replace

import pytest
import torch
from PIL import Image

import qwenvit
from common.hf_towers import build_tower, save_tower
from qwenvit import default_encoder
from qwenvit import encoder as encoder_module
from qwenvit.cli.parser import main
from qwenvit.encoder import Encoder
from qwenvit.outputs import TowerOutput
from support.towers import SMALL, ours_from

CONFIG = replace(SMALL["qwen3_vl"], depth=2, deepstack_visual_indexes=(0,))
GREY = Image.linear_gradient("L").resize((320, 256)).convert("RGB")


def small_encoder(seed=0):
    return Encoder(ours_from(build_tower(CONFIG, seed=seed), CONFIG))


@pytest.mark.parametrize(
    "shadow", ["model_visual.safetensors", "model.safetensors.index.json", "processor_config.json"]
)
def test_a_tower_is_not_saved_where_other_files_would_be_read_instead(tmp_path, shadow):
    (tmp_path / shadow).write_text("{}")
    with pytest.raises(ValueError, match=shadow):
        small_encoder().save_pretrained(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [shadow]


def test_fetching_a_checkpoint_onto_itself_leaves_it_whole(tmp_path, capsys):
    save_tower(build_tower(CONFIG), CONFIG, tmp_path)
    whole = {"model_type": "qwen3_vl", "vision_config": CONFIG.to_hf()}
    (tmp_path / "config.json").write_text(json.dumps(whole))
    before = (tmp_path / "model.safetensors").read_bytes()
    assert main(["fetch", str(tmp_path), str(tmp_path)]) == 1
    assert "choose an empty one" in capsys.readouterr().err
    assert (tmp_path / "model.safetensors").read_bytes() == before


def test_info_counts_tokens_by_the_checkpoints_own_bounds(tmp_path, capsys):
    enc = small_encoder()
    enc.image_processor = enc.image_processor.with_bounds(max_pixels=70_000)
    enc.save_pretrained(tmp_path)
    assert main(["info", str(tmp_path), "--size", "448x448"]) == 0
    tokens = len(enc.encode(GREY.resize((448, 448)))[0].tokens)
    assert f", {tokens} tokens" in capsys.readouterr().out


@pytest.mark.filterwarnings("ignore:model='demo'")
def test_an_interrupted_encode_keeps_what_is_done(tmp_path, monkeypatch):
    for name in ("a.png", "b.png", "c.png"):
        GREY.save(tmp_path / name)
    encode, seen = Encoder.encode, []

    def interrupted(self, image, **options):
        seen.append(image)
        if len(seen) == 3:
            raise KeyboardInterrupt
        return encode(self, image, **options)

    monkeypatch.setattr(Encoder, "encode", interrupted)
    target = tmp_path / "out.safetensors"
    assert main(["encode", str(tmp_path), "-m", "demo", "-o", str(target)]) == 130
    from safetensors.torch import load_file

    assert {key for key in load_file(target) if key.endswith("tokens")} == {"a.png/tokens", "b.png/tokens"}


@pytest.mark.parametrize("output", ["out.safetensor", "file.png/out.safetensors"])
def test_an_impossible_output_is_refused_before_any_work(tmp_path, capsys, output):
    GREY.save(tmp_path / "file.png")
    assert main(["encode", str(tmp_path / "file.png"), "-m", "no-such-model", "-o", str(tmp_path / output)]) == 1
    assert "no-such-model" not in capsys.readouterr().err


def test_hidden_states_of_earlier_batches_are_released(monkeypatch):
    enc, alive, most = small_encoder(), [], []
    run = Encoder._run

    def watched(self, pixel_values, grid):
        most.append(sum(ref() is not None for ref in alive))
        output = run(self, pixel_values, grid)
        alive.append(weakref.ref(output.last_hidden_state))
        return TowerOutput(output.last_hidden_state, output.pooler_output, output.deepstack_features)

    monkeypatch.setattr(Encoder, "_run", watched)
    monkeypatch.setattr(encoder_module, "PATCHES_PER_BATCH", 1)
    enc.encode([GREY] * 5)
    assert len(most) == 5
    assert max(most) <= 1


@pytest.mark.parametrize("layer", ["merger", "deepstack_mergers.0", "deepstack_mergers.1"])
def test_float16_overflow_raises(layer):
    """In the tokens, and in each layer of DeepStack alone."""
    config = replace(CONFIG, deepstack_visual_indexes=(0, 1))
    enc = Encoder(ours_from(build_tower(config), config).half())
    enc.encode(GREY)
    with torch.no_grad():
        enc.tower.get_submodule(layer).fc2.weight.mul_(60_000)
    for encode in (enc.encode, enc.encode_video, lambda images: list(enc.iter_encode(images))):
        with pytest.raises(OverflowError, match="use bfloat16 or float32"):
            encode([GREY] * 2)


def test_a_relative_path_means_another_tower_in_another_directory(tmp_path, monkeypatch):
    monkeypatch.setattr(default_encoder, "_current", {"key": None, "encoder": None})
    for seed in (0, 1):
        small_encoder(seed).save_pretrained(tmp_path / str(seed) / "tower")
    outs = []
    for seed in (0, 1):
        monkeypatch.chdir(tmp_path / str(seed))
        outs.append(qwenvit.encode(GREY, model="tower", device="cpu").packed)
        assert torch.equal(outs[-1], small_encoder(seed).encode(GREY).packed)
    kept = default_encoder._current["encoder"]
    qwenvit.encode(GREY, model=os.path.join(tmp_path, "1", "tower"), device=torch.device("cpu"), dtype=torch.float32)
    assert default_encoder._current["encoder"] is kept


@pytest.mark.parametrize("frames", [2, 3])
def test_a_video_is_a_map_of_four_dimensions_however_short(frames):
    out = small_encoder().encode_video([GREY] * frames)[0]
    assert out.spatial().ndim == 4
    assert out.spatial().shape[0] == (frames + 1) // 2


@pytest.mark.filterwarnings("ignore:model='demo'")
def test_torchs_global_defaults_change_nothing(monkeypatch):
    expected = Encoder.from_pretrained("demo", device="cpu").encode(GREY).packed
    torch.set_default_dtype(torch.bfloat16)
    try:
        for resize in ("pillow", "torch"):
            pixels = small_encoder().image_processor(GREY, resize=resize)[0]
            assert pixels.dtype == torch.float32
        with torch.device("meta"):
            got = Encoder.from_pretrained("demo", device="cpu").encode(GREY).packed
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(got, expected)


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
@pytest.mark.parametrize("device", ["cuda", "nonsense"])
def test_a_device_that_is_not_there_is_named(device, capsys):
    with pytest.raises(ValueError, match=f"device: '{device}' cannot be used on this machine"):
        Encoder.from_pretrained("demo", device=device)
    assert main(["info", "demo", "--load", "--device", device]) == 1
    assert "Traceback" not in capsys.readouterr().err


def test_a_compiled_function_may_call_an_encoder():
    encoder = small_encoder()
    compiled = torch.compile(lambda pixels, grid: encoder(pixels, grid).pooler_output, backend="eager")
    for grid in ([[1, 4, 4]], [[1, 4, 4]], [[1, 2, 6], [1, 4, 2]]):
        pixels = torch.randn(sum(t * h * w for t, h, w in grid), CONFIG.patch_dim)
        torch.testing.assert_close(compiled(pixels, torch.tensor(grid)), encoder(pixels, grid).pooler_output)
