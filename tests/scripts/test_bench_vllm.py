"""`scripts/bench_vllm.py`: its inputs, weights and truth, how it compares, what it prints. Nothing here is timed."""

import json
import math
from importlib.metadata import EntryPoint

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor

from generate_bench.models import TEXT_CONFIGS, official_config
from qwenvit.config.vision_config import VisionConfig
from vllm_bench import cases, engine_options, parity, truth
from vllm_bench.cases import ATTENTION, BEST, MODES, OFF, PIXELS, PLUGIN, REQUEST, TOWER, Shape
from vllm_bench.checkpoint import write_checkpoint
from vllm_bench.prompts import SHOWN, request
from vllm_bench.truth import Truth, output_errors
from vllm_bench.weights import seeded_tower, seeded_weights

QWEN2_5, QWEN3 = cases.MODELS
TINY = {model: Shape(model, 4, tiny=True) for model in cases.MODELS}


@pytest.fixture(scope="module", params=cases.MODELS)
def tiny(request):
    return TINY[request.param]


@pytest.fixture(scope="module")
def folder(tiny, tmp_path_factory):
    return write_checkpoint(tiny, tmp_path_factory.mktemp("checkpoint"))


@pytest.mark.parametrize(("model", "tokens"), [(QWEN2_5, (256, 576, 1024, 2304)), (QWEN3, (196, 441, 784, 1764))])
def test_cases(model, tokens):
    shape = Shape(model, 28)
    assert [shape.side(side) for side in cases.IMAGE_SIDES] == list(cases.IMAGE_SIDES)
    assert [shape.tokens(side) for side in cases.IMAGE_SIDES] == list(tokens)
    inputs = cases.tower_cases(shape)
    assert [case.name for case in inputs] == list(cases.TOWER_CASES)
    assert [case.patches // 4 for case in inputs] == [*tokens, 8 * tokens[0], 8 * tokens[0]]
    assert [len(case.grid) for case in inputs] == [1, 1, 1, 1, 8, 1]
    assert (inputs[-1].grid[0][0], inputs[-1].frames) == (8, 16)
    assert [case.name for case in cases.tower_cases(shape, ["896²", "16 frames, 448²"])] == ["896²", "16 frames, 448²"]


def test_sizes_of_cuda_graphs_are_those_of_the_cases():
    shape = Shape(QWEN2_5, 28)
    assert cases.graph_budgets(shape, [TOWER, REQUEST], cases.CASES) == [256, 576, 1024, 2048, 2304, 4096, 8192]
    assert cases.graph_budgets(shape, [TOWER], cases.CASES) == [256, 576, 1024, 2048, 2304]
    prompts = 576  # the largest of those whose log-probabilities are compared
    assert cases.graph_budgets(shape, [REQUEST], ["896²"]) == [prompts, 1024]
    assert cases.graph_budgets(shape, [REQUEST], ["4 × 896²"]) == [prompts, 4096]
    assert cases.graph_budgets(shape, [TOWER, REQUEST], ["672²"]) == [576]


@pytest.mark.parametrize("model", cases.MODELS)
@pytest.mark.parametrize("is_tiny", [False, True])
def test_processors_make_as_many_tokens_as_the_cases_say(model, is_tiny, tmp_path):
    shape = Shape(model, 4, is_tiny)
    processor = AutoProcessor.from_pretrained(write_checkpoint(shape, tmp_path))
    for name in ("448²", "896²", "4 × 896²"):
        asked = request(shape.sides(name), 0)
        images = asked["multi_modal_data"]["image"]
        inputs = processor(text=asked["prompt"], images=images, return_tensors="pt")
        expected = [shape.tokens(side) for side in cases.REQUESTS[name]]
        assert (inputs["image_grid_thw"].prod(-1) // 4).tolist() == expected
        image_token = json.loads((tmp_path / "config.json").read_text())["image_token_id"]
        assert int((inputs["input_ids"] == image_token).sum()) == sum(expected)


def test_pictures_never_repeat():
    pictures = [request((56, 56), seed)["multi_modal_data"]["image"] for seed in range(4)]
    arrays = [np.asarray(image) for images in pictures for image in images]
    assert len({array.tobytes() for array in arrays}) == len(arrays) == 8
    assert all(array.std() > 20 for array in arrays)
    assert request((56, 84), 3)["prompt"].count(SHOWN) == 2
    again = np.asarray(request((56, 56), 1)["multi_modal_data"]["image"][0])
    assert np.array_equal(again, arrays[2])


@pytest.mark.parametrize("model", cases.MODELS)
def test_official_shapes(model, tmp_path):
    write_checkpoint(Shape(model, 4), tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    official = official_config(model, 4).to_dict()
    sizes = TEXT_CONFIGS[model] | {"num_hidden_layers": 4}
    assert {key: config["text_config"][key] for key in sizes} == sizes
    assert VisionConfig.from_hf(config) == VisionConfig.from_hf(official)


def test_weights_are_those_of_a_checkpoint(tiny, folder):
    config = json.loads((folder / "config.json").read_text())
    model = AutoModelForImageTextToText.from_config(AutoConfig.from_pretrained(folder))
    model.load_state_dict(dict(seeded_weights(folder, torch.float32, "cpu")))
    assert VisionConfig.from_hf(config) == tiny.vision
    drawn = dict(seeded_weights(folder, torch.float32, "cpu"))
    assert drawn.keys() == dict(model.named_parameters()).keys()
    for name, parameter in model.named_parameters():
        assert torch.equal(drawn[name], parameter), name
        assert parameter.std() > 0, name
    text = [drawn[name].flatten()[:8] for name in drawn if "layers" in name and "mlp" in name]
    assert len({tuple(values.tolist()) for values in text}) == len(text)


def test_weights_do_not_depend_on_the_default_dtype(tiny, monkeypatch):
    expected = seeded_tower(tiny.vision, torch.bfloat16, "cpu").state_dict()
    torch.set_default_dtype(torch.bfloat16)  # as vLLM does while it loads a model
    try:
        found = seeded_tower(tiny.vision, torch.bfloat16, "cpu").state_dict()
        assert torch.get_default_dtype() == torch.bfloat16
    finally:
        torch.set_default_dtype(torch.float32)
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


def test_normalised_levels_are_those_of_the_processor(tiny, folder):
    processor = AutoProcessor.from_pretrained(folder).image_processor
    image = request((112 if tiny.model == QWEN2_5 else 128,), 5)["multi_modal_data"]["image"][0]
    expected = processor(images=[image], return_tensors="pt")["pixel_values"]
    levels = processor(images=[image], do_rescale=False, do_normalize=False, return_tensors="pt")["pixel_values"]
    mean, std = processor.image_mean, processor.image_std
    torch.testing.assert_close(truth.normalise(levels.to(torch.uint8), mean, std), expected, rtol=1e-5, atol=1e-5)
    assert [*mean] == [*(truth.OPENAI_CLIP_MEAN if tiny.vision.traits.windowed else truth.IMAGENET_STANDARD_MEAN)]


def test_inputs_and_truth(tiny, folder, tmp_path):
    found = Truth(tiny, "cpu")
    tower = seeded_tower(tiny.vision, torch.float32, "cpu")
    for case in cases.tower_cases(tiny, ["448²", "8 × 448²", "16 frames, 448²"]):
        found.write_case(case, tmp_path / "case.pt")
        written = torch.load(tmp_path / "case.pt")
        assert written["grid"].tolist() == [list(grid) for grid in case.grid]
        assert written["levels"].dtype == torch.uint8
        assert (written["levels"].min(), written["levels"].max()) == (0, 255)
        assert written["truth"].shape == (1 + len(tiny.vision.deepstack_visual_indexes), case.patches // 4, 128)
        joined = torch.cat([*_forward(tower, written["pixel_values"], written["grid"])], dim=1)
        assert max(output_errors(joined, written["truth"])) < 1e-6
        errors = output_errors(joined * 1.01, written["truth"])
        assert all(abs(error - 0.01) < 1e-4 for error in errors)


def _forward(tower, pixels, grid):
    with torch.no_grad():
        output = tower(pixels, grid_thw=grid)
    return [output.pooler_output, *(getattr(output, "deepstack_features", None) or [])]


def test_truth_of_requests(tiny, folder, tmp_path):
    asked = [(tiny.sides("448²"), 1), (tiny.sides("448²") * 2, 2)]
    truths = Truth(tiny, "cpu").write_requests(asked, folder, tmp_path / "embeddings.pt")
    written = torch.load(tmp_path / "embeddings.pt")
    tokens = tiny.tokens(448)
    width = 128 * (1 + len(tiny.vision.deepstack_visual_indexes))
    assert [list(one["image_embeds"].shape) for one in written] == [[tokens, width], [2 * tokens, width]]
    assert [one["image_grid_thw"].shape[0] for one in written] == [1, 2]
    kept = [one["image_embeds"] for one in written]
    assert max(parity.embedding_errors({OFF: kept}, truths)[OFF]) < 1e-7
    whole = {OFF: [torch.cat(kept)]}  # two requests in one step
    assert max(parity.embedding_errors(whole, truths)[OFF]) < 1e-7
    assert min(parity.embedding_errors({OFF: kept[::-1]}, truths)[OFF]) > 0.01


# ---- how engines are started


def options_for(name, shape=None, parts=(TOWER, REQUEST), only=cases.CASES, more=None):
    from pathlib import Path

    return engine_options.engine_options(
        MODES[name], shape or Shape(QWEN2_5, 28), Path("model"), parts, only, more or {}
    )


def test_engine_options():
    off, best, plugin, pixels, attention = map(options_for, (OFF, BEST, PLUGIN, PIXELS, ATTENTION))
    assert "compilation_config" not in off
    assert "additional_config" not in off | best
    assert best["compilation_config"]["encoder_cudagraph_token_budgets"] == [256, 576, 1024, 2048, 2304, 4096, 8192]
    assert (
        best["compilation_config"]["cudagraph_mm_encoder"] is best["compilation_config"]["compile_mm_encoder"] is True
    )
    assert "compilation_config" not in plugin
    assert plugin["additional_config"] == {"qwenvit": {"tower": "tower", "pixels": False}}
    assert pixels["additional_config"] == {"qwenvit": {"tower": "tower", "pixels": True}}
    assert attention["additional_config"] == {"qwenvit": {"tower": "attention", "pixels": False}}
    for one in (off, best, plugin, pixels):
        assert (one["mm_processor_cache_gb"], one["enable_prefix_caching"]) == (0, False)
    assert off["limit_mm_per_prompt"] == {"image": 8, "video": 1}
    assert options_for(OFF, parts=[REQUEST])["limit_mm_per_prompt"] == {"image": 8, "video": 0}
    few = options_for(BEST, parts=[TOWER])["compilation_config"]
    assert few["cudagraph_capture_sizes"] == engine_options.FEW_GRAPHS
    assert few["encoder_cudagraph_token_budgets"][-1] == 2304
    assert options_for(OFF, more={"max_model_len": 512})["max_model_len"] == 512
    more = {"compilation_config": {"mode": 0, "compile_mm_encoder": False}}
    replaced = options_for(BEST, more=more)["compilation_config"]
    assert replaced == best["compilation_config"] | more["compilation_config"]
    assert options_for(OFF, more=more)["compilation_config"] == more["compilation_config"]
    tiny = options_for(BEST, TINY[QWEN3])
    assert "compilation_config" not in tiny
    assert tiny["enforce_eager"] is True


def test_no_graph_is_smaller_than_the_number_of_images_it_takes():
    for model in cases.MODELS:
        compilation = options_for(BEST, Shape(model, 28))["compilation_config"]
        assert (
            min(compilation["encoder_cudagraph_token_budgets"])
            >= compilation["encoder_cudagraph_max_vision_items_per_batch"]
        )


@pytest.mark.parametrize("installed", [True, False])
def test_the_plugin_is_found_once(installed, monkeypatch, tmp_path):
    found = [EntryPoint("qwenvit", "qwenvit.integrations.vllm:register", "vllm.general_plugins")] if installed else []
    monkeypatch.setattr(engine_options, "entry_points", lambda **_: found)
    monkeypatch.setenv("PYTHONPATH", "/elsewhere")
    monkeypatch.delenv("VLLM_PLUGINS", raising=False)
    variables = engine_options.environment(MODES[PLUGIN], TINY[QWEN3], tmp_path)
    paths = variables["PYTHONPATH"].split(":")
    assert (paths[0], paths[-1]) == (str(engine_options.SCRIPTS), "/elsewhere")
    assert len(paths) == (2 if installed else 3)
    if not installed:
        from importlib.metadata import distributions

        (one,) = distributions(path=[paths[1]])
        assert one.metadata["Name"] == "qwenvit"
        (point,) = one.entry_points
        assert (point.group, point.name) == ("vllm.general_plugins", "qwenvit")
        assert point.load().__name__ == "register"
    assert variables["VLLM_PLUGINS"] == "qwenvit"
    assert engine_options.environment(MODES[OFF], TINY[QWEN3], tmp_path)["VLLM_PLUGINS"] == "none"


# ---- what is compared

DESCRIBED = {
    OFF: {"tower": "vllm.models.Tower", "tower_packages": ["torch", "vllm"]},
    PLUGIN: {"tower": "qwenvit.integrations.vllm.tower.VllmTower", "tower_packages": ["qwenvit", "torch"]},
    ATTENTION: {"tower": "vllm.models.Tower", "tower_packages": ["qwenvit", "torch", "vllm"]},
}


@pytest.mark.parametrize("asked", [OFF, PLUGIN, ATTENTION])
@pytest.mark.parametrize("got", [OFF, PLUGIN, ATTENTION])
def test_an_engine_must_have_the_tower_of_its_mode(asked, got):
    why = parity.plugin_failure(MODES[asked], DESCRIBED[got])
    assert (why is None) == (asked == got)
    assert why is None or DESCRIBED[got]["tower"] in why


def test_towers_are_held_to_the_error_of_vllm():
    errors = {OFF: [0.01, 0.02], BEST: [0.029, 0.02], PLUGIN: [0.0105, 0.021], ATTENTION: [0.01, 0.0211]}
    wrong = parity.tower_failures(errors)
    assert wrong == {OFF: [], BEST: [], PLUGIN: [], ATTENTION: ["output 1: error 2.11e-02, vLLM's 2.00e-02"]}
    assert parity.tower_failures({OFF: [0.01], PLUGIN: [math.nan]})[PLUGIN]
    assert parity.tower_failures({OFF: [0.8], PLUGIN: [0.1]}) == {
        OFF: ["output 0: error 8.00e-01, vLLM's 8.00e-01"],
        PLUGIN: ["output 0: error 1.00e-01, vLLM's 8.00e-01"],
    }
    assert parity.tower_failures({PLUGIN: [0.01]}) == {PLUGIN: ["vLLM's own tower has no figures to compare with"]}
    assert parity.tower_failures({OFF: [1e-6], PLUGIN: [9e-6]})[PLUGIN] == []  # fp32


def test_whole_requests_are_held_to_the_error_of_vllm():
    levels = torch.randn(2, 6, 4, generator=torch.Generator().manual_seed(0))
    joined = torch.cat(tuple(levels), dim=1)
    noise = torch.randn(joined.shape, generator=torch.Generator().manual_seed(1))
    kept = {OFF: [joined + 0.01 * noise], PLUGIN: [joined + 0.01 * noise], PIXELS: [joined + 0.01 * noise]}
    exact = [{"1": -1.0, "2": -2.0, "3": -3.0}, {"1": -3.0, "2": -2.0}]
    off = [{"1": -1.1, "2": -1.9, "9": -4.0}, {"1": -3.1, "2": -2.1}]
    answers = {name: {"first": off, "bytes": name == PIXELS} for name in kept}
    found = parity.agreement(answers, exact, kept, [levels])
    assert {name: row["failures"] for name, row in found["modes"].items()} == {OFF: [], PLUGIN: [], PIXELS: []}
    assert found["modes"][OFF]["rms"] == pytest.approx(0.1)
    assert (found["modes"][OFF]["same"], found["same_bits"]) == (2, True)
    assert found["other"] == pytest.approx(math.sqrt((2.0**2 + 0.2**2) / 2))

    worse = [{token: value * 1.2 for token, value in one.items()} for one in exact]
    wrong = answers | {PLUGIN: {"first": worse, "bytes": False}, PIXELS: answers[PIXELS] | {"bytes": False}}
    found = parity.agreement(wrong, exact, kept | {PIXELS: [joined + 0.02 * noise]}, [levels])
    assert found["modes"][PLUGIN]["failures"][0].startswith("log-probabilities: error")
    assert found["same_bits"] is False
    assert [line.split(":")[0] for line in found["modes"][PIXELS]["failures"]] == [
        "output 0",
        "output 1",
        "no pixels came as bytes",
    ]
    assert parity.agreement(answers, None, kept, [])["modes"][OFF]["failures"]  # no truth, no ratio
