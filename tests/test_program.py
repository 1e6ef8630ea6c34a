"""Exported programs, run by torch and by onnxruntime, against transformers' towers."""

import copy
import sys

import pytest
import torch

import qwenvit
from common.hf_towers import build_tower, forward
from qwenvit.encoder import Encoder
from qwenvit.program import export
from support.hidden_states import hidden_states
from support.towers import SMALL, narrow, ours_from, random_pixels

GRIDS = [[1, 12, 10], [2, 4, 6]]
FAMILIES = list(SMALL)
IN_ONNX = [
    pytest.param(family, marks=() if family in ("qwen2_vl", "qwen2_5_omni", "qwen3_vl") else pytest.mark.long)
    for family in FAMILIES
]
"""Each conversion takes seconds. These three have everything that the others have."""


def tower_and_encoder(family, dtype=torch.float32):
    """Return transformers' tower of two blocks, the second with full attention, and an encoder of the same weights."""
    config = narrow(family, depth=2)
    hf = build_tower(config, dtype=dtype)
    return hf, Encoder(ours_from(hf, config))


def expected(hf, pixel_values):
    hidden, tokens, deepstack = forward(hf, pixel_values, torch.tensor(GRIDS))
    levels = {f"deepstack_features_{i}": level for i, level in enumerate(deepstack)}
    return {"last_hidden_state": hidden, "pooler_output": tokens} | levels


def expected_layers(hf, config, pixel_values, layers):
    with torch.no_grad():
        items = hidden_states(hf, config, pixel_values, GRIDS)
    return {f"layer_{layer}": torch.cat([item[layer].flatten(0, 2) for item in items]) for layer in layers}


def assert_close(outputs, truth, tolerance=1e-5):
    assert list(outputs) == list(truth)
    for name, tensor in outputs.items():
        assert tensor.shape == truth[name].shape
        assert (tensor - truth[name]).norm() <= tolerance * truth[name].norm(), name


def run_onnx(file, pixel_values):
    onnxruntime = pytest.importorskip("onnxruntime", reason="needs onnxruntime: pip install 'qwenvit[onnx]'")
    session = onnxruntime.InferenceSession(file)
    assert [put.name for put in session.get_inputs()] == ["pixel_values"]
    outputs = session.run(None, {"pixel_values": pixel_values.numpy()})
    names = [put.name for put in session.get_outputs()]
    return dict(zip(names, map(torch.from_numpy, outputs), strict=True))


@pytest.mark.parametrize("family", FAMILIES)
def test_the_program_gives_what_transformers_gives(family, tmp_path):
    hf, encoder = tower_and_encoder(family)
    pixel_values = random_pixels(168, encoder.config)
    program = export(encoder, GRIDS, tmp_path / "tower.pt2")
    truth = expected(hf, pixel_values)
    assert len(truth) == 2 + len(encoder.config.deepstack_visual_indexes)
    for module in (program.module(), torch.export.load(tmp_path / "tower.pt2").module()):
        assert_close(module(pixel_values), truth)


@pytest.mark.parametrize("family", IN_ONNX)
def test_the_onnx_file_gives_what_transformers_gives(family, tmp_path):
    hf, encoder = tower_and_encoder(family)
    pixel_values = random_pixels(168, encoder.config)
    export(encoder, GRIDS, tmp_path / "tower.onnx")
    assert_close(run_onnx(tmp_path / "tower.onnx", pixel_values), expected(hf, pixel_values))


@pytest.mark.parametrize("family", ["qwen2_5_vl", "qwen3_vl"])
def test_layers_are_maps_in_reading_order(family):
    hf, encoder = tower_and_encoder(family)
    pixel_values = random_pixels(168, encoder.config)
    program = export(encoder, torch.tensor(GRIDS), layers=(-1, 0, 2))
    assert_close(program.module()(pixel_values), expected_layers(hf, encoder.config, pixel_values, (0, 2)))


def test_tokens_and_norm_in_onnx(tmp_path):
    hf, encoder = tower_and_encoder("qwen2_5_vl")
    pixel_values = random_pixels(168, encoder.config)
    export(encoder, GRIDS, tmp_path / "maps.onnx", layers=[1], what="tokens", norm=True)
    with torch.no_grad():
        items = hidden_states(hf, encoder.config, pixel_values, GRIDS)
        normed = [hf.merger.ln_q(item[1]) for item in items]
    tokens = [item.unflatten(2, (-1, 2)).unflatten(1, (-1, 2)).mean((2, 4)).flatten(0, 2) for item in normed]
    assert_close(run_onnx(tmp_path / "maps.onnx", pixel_values), {"layer_1": torch.cat(tokens)})


def test_a_program_of_maps_has_no_weights_but_theirs():
    _, encoder = tower_and_encoder("qwen3_vl")
    names = encoder.tower.state_dict().keys()
    needed = {name for name in names if name.startswith(("patch_embed.", "pos_embed.", "blocks.0."))}
    norm = {"merger.norm.weight", "merger.norm.bias"}
    for request, expected in (
        ({"layers": [1]}, needed),
        ({"layers": [1], "norm": True}, needed | norm),
        ({"layers": [0]}, {name for name in needed if not name.startswith("blocks.")}),
        ({}, {*names}),
    ):
        assert set(export(encoder, GRIDS, **request).state_dict) == {f"tower.{name}" for name in expected}
    assert encoder.tower.state_dict().keys() == names


@pytest.mark.parametrize("layers", [None, [1]])
def test_a_program_moves_to_another_device_as_a_whole(layers):
    """The meta device refuses tensors of others as a GPU does."""
    _, encoder = tower_and_encoder("qwen2_5_vl")
    module = export(encoder, GRIDS, layers=layers).module().to("meta")
    outputs = module(torch.empty(168, encoder.config.patch_dim, device="meta"))
    assert all(tensor.is_meta for tensor in outputs.values())


@pytest.mark.parametrize("layers", [None, [1, 2]], ids=["tower", "maps"])
@pytest.mark.parametrize("family", ["qwen2_vl", "qwen2_5_vl", "qwen3_vl"])
def test_no_operation_of_a_program_names_a_device(family, layers):
    """Not even an assertion, which would fail on another device, but not on meta."""
    _, encoder = tower_and_encoder(family)
    program = export(encoder, GRIDS, layers=layers)
    graphs = [part.graph for part in program.graph_module.modules() if isinstance(part, torch.fx.GraphModule)]
    seen = []
    for node in (node for graph in graphs for node in graph.nodes):
        torch.fx.node.map_aggregate((node.args, node.kwargs), lambda value: seen.append(value) or value)
    assert seen
    assert not [value for value in seen if isinstance(value, torch.device)]


def test_gradients_flow_through_the_program():
    hf, encoder = tower_and_encoder("qwen3_vl")
    pixel_values = random_pixels(168, encoder.config).requires_grad_()
    weights = torch.randn(42, encoder.config.out_hidden_size, generator=torch.Generator().manual_seed(1))
    tokens = hf(pixel_values, grid_thw=torch.tensor(GRIDS)).pooler_output
    (truth,) = torch.autograd.grad((tokens * weights).sum(), pixel_values)
    tokens = export(encoder, GRIDS).module()(pixel_values)["pooler_output"]
    (ours,) = torch.autograd.grad((tokens * weights).sum(), pixel_values)
    assert truth.norm() > 0
    assert (ours - truth).norm() <= 1e-5 * truth.norm()


def test_a_name_is_loaded_in_float32_on_the_cpu():
    with pytest.warns(UserWarning, match="random weights"):
        program = qwenvit.export("demo", [[1, 4, 4]])
    with pytest.warns(UserWarning, match="random weights"):
        encoder = Encoder.from_pretrained("demo", impl="reference", device="cpu", dtype="float32")
    pixel_values = random_pixels(16, encoder.config)
    out = program.module()(pixel_values)
    assert torch.allclose(out["pooler_output"], encoder(pixel_values, torch.tensor([[1, 4, 4]])).pooler_output)


def test_bfloat16_is_exported_as_the_tower_computes():
    hf, encoder = tower_and_encoder("qwen2_5_vl", torch.bfloat16)
    pixel_values = random_pixels(168, encoder.config)
    out = export(encoder, GRIDS).module()(pixel_values)
    assert torch.equal(out["pooler_output"], expected(hf, pixel_values)["pooler_output"])


def test_what_cannot_be_exported_is_refused_before_anything_is_loaded(tmp_path, monkeypatch):
    monkeypatch.setattr(Encoder, "from_pretrained", lambda *_, **__: pytest.fail("loaded"))
    with pytest.raises(ValueError, match=r"path: expected a file that ends in \.pt2 or \.onnx, got 'tower\.pth'"):
        export("demo", GRIDS, "tower.pth")
    for maps in ({"what": "tokens"}, {"norm": True}):
        with pytest.raises(ValueError, match="layers: expected some"):
            export("demo", GRIDS, **maps)
    with pytest.raises(FileNotFoundError, match="path: expected a file in a folder that exists"):
        export("demo", GRIDS, tmp_path / "nowhere" / "tower.pt2")
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    with pytest.raises(ImportError, match=r"pip install 'qwenvit\[onnx\]'"):
        export("demo", GRIDS, tmp_path / "tower.onnx")


@pytest.mark.parametrize("layers", [None, [1]])
def test_a_tower_in_training_stays_in_it_and_its_program_has_no_dropout(layers):
    _, encoder = tower_and_encoder("qwen3_vl")
    block = encoder.tower.blocks[0]
    block.mlp = torch.nn.Sequential(block.mlp, torch.nn.Dropout(0.5))
    block.train()
    before = [part.training for part in encoder.tower.modules()]
    module = export(encoder, GRIDS, layers=layers).module()
    assert [part.training for part in encoder.tower.modules()] == before
    pixel_values = random_pixels(168, encoder.config)
    for one, other in zip(module(pixel_values).values(), module(pixel_values).values(), strict=True):
        assert torch.equal(one, other)


def test_the_callers_autocast_is_not_in_the_program():
    _, encoder = tower_and_encoder("qwen3_vl")
    pixel_values = random_pixels(168, encoder.config)
    with torch.autocast("cpu"):
        program = export(encoder, GRIDS, layers=[1])
    (plain,) = export(encoder, GRIDS, layers=[1]).module()(pixel_values).values()
    (found,) = program.module()(pixel_values).values()
    assert torch.equal(found, plain)


def test_what_no_program_can_be_of_is_refused(tmp_path):
    _, encoder = tower_and_encoder("qwen2_vl", torch.bfloat16)
    with pytest.raises(ValueError, match="grid_thw"):
        export(encoder, [[1, 3, 4]])
    with pytest.raises(ValueError, match="expected float32 or float16 for ONNX, got bfloat16"):
        export(encoder, GRIDS, tmp_path / "tower.onnx")
    with pytest.raises(ValueError, match="layers"):
        export(encoder, GRIDS, layers=[3])
    config = narrow("qwen2_vl", depth=1)
    packed = qwenvit.towers.fast.FastTower(config, impl="reference")
    with pytest.raises(ValueError, match="impl='reference'"):
        export(Encoder(packed), GRIDS)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_the_program_of_a_tower_on_a_gpu_runs_there(tmp_path):
    _, encoder = tower_and_encoder("qwen2_5_vl")
    encoder.tower.cuda()
    pixel_values = random_pixels(168, encoder.config).cuda()
    truth = encoder(pixel_values, torch.tensor(GRIDS))
    export(encoder, GRIDS, tmp_path / "tower.pt2")
    expected = {"last_hidden_state": truth.last_hidden_state, "pooler_output": truth.pooler_output}
    assert_close(torch.export.load(tmp_path / "tower.pt2").module()(pixel_values), expected)
    on_the_host = Encoder(copy.deepcopy(encoder.tower).cpu())
    assert_close(export(on_the_host, GRIDS).module().cuda()(pixel_values), expected)
    maps = export(encoder, GRIDS, layers=[2], what="tokens").module()(pixel_values)
    assert maps["layer_2"].shape == (42, encoder.config.hidden_size)
    assert maps["layer_2"].is_cuda
