"""The plugin in a real vLLM engine: log-probabilities must be those of vLLM's own tower."""

import shutil

import pytest
from safetensors.torch import load_file, save_file

from support.errors import error
from support.tiny_checkpoints import save_tiny_checkpoint, save_tiny_text_checkpoint
from support.vllm_process import ENGINE, PROMPTS, TOLERANCE, VLLM_VERSIONS, difference, needs_vllm, run_engines

pytestmark = needs_vllm

MATRIX = {
    "off": {},
    "tower": {"options": {"tower": "tower"}},
    "packed": {"options": {"impl": "reference"}, "change": "packed"},
    "attention": {"options": {"tower": "attention"}},
    "pixel values": {"options": {"tower": "tower", "pixels": False}},
    "spoiled": {"options": {"tower": "tower"}, "change": "spoiled"},
    "spoiled attention": {"options": {"tower": "attention"}, "change": "spoiled attention"},
}
MODELS = "vllm.model_executor.models"
REPORTS = {
    "tower": ("tower", "ReferenceTower", 0),
    "packed": ("tower", "FastTower", 0),
    "attention": ("attention", None, 1),
    "pixel values": ("tower", "ReferenceTower", 0),
    "spoiled": ("tower", "ReferenceTower", 0),
    "spoiled attention": ("attention", None, 1),
}
"""The mode, the class of our tower, and how many towers of vLLM there are."""


def engine(folder, way, **arguments):
    """Return an engine as `vllm_engine.py` takes it; it has the plugin if `way` has options for it."""
    way, arguments = dict(way), ENGINE | {"model": str(folder)} | arguments
    if (options := way.pop("options", None)) is not None:
        arguments |= {"additional_config": {"qwenvit": options}}
        way["plugin"] = True
    return way | {"arguments": arguments}


def compare(answers, ways, own="off"):
    """Return the largest difference from vLLM's own tower by way, and print each."""
    largest = {}
    for way in ways:
        for prompt in PROMPTS:
            found = difference(answers[way, prompt], answers[own, prompt])
            print(f"{way}, {prompt}: log-probabilities differ by up to {found:.1e}")
            largest[way] = max(largest.get(way, 0), found)
    return largest


@pytest.mark.parametrize(
    "family",
    [
        "qwen2_vl",
        "qwen2_5_vl",
        "qwen3_vl",
        pytest.param(
            "qwen3_5",
            marks=pytest.mark.skipif(
                VLLM_VERSIONS == ["0.24.0"], reason="vLLM 0.24.0's own Qwen3.5 does not run on a CPU: dtype mismatch"
            ),
        ),
    ],
)
def test_every_mode_gives_the_log_probabilities_of_vllm_own_tower(family, tmp_path):
    save_tiny_checkpoint(family, tmp_path / "model")
    # vLLM runs Qwen3.5 on a CPU in bfloat16 alone, and a language model of random weights amplifies its rounding.
    dtype, tolerance, far = ("bfloat16", 0.02, None) if family == "qwen3_5" else ("float32", 1e-5, 1e-3)
    engines = {name: engine(tmp_path / "model", way, dtype=dtype) for name, way in MATRIX.items()}
    answers, log = run_engines(tmp_path, engines, PROMPTS)
    for name, expected in REPORTS.items():
        report = answers[name, "report"]
        assert report["class"].startswith("qwenvit.integrations.vllm.models."), name
        assert (report["mode"], report["tower"], report["vllm_towers"]) == expected, name
    own = answers["off", "report"]
    assert own["class"].startswith(MODELS)
    assert answers["attention", "report"]["attention"] == f"Rope{own['attention']}"
    assert "qwenvit: tower mode" in log
    assert "qwenvit: attention mode" in log
    assert "images travel as RGB bytes" in log
    assert "images travel as pixel values, because additional_config: qwenvit.pixels is false" in log
    differences = compare(answers, [name for name in MATRIX if name != "off"])
    errors = {name: error(answers[name, "report"]["embeddings"], own["embeddings"]) for name in differences}
    print("embeddings, relative L2:", {name: f"{found:.1e}" for name, found in errors.items()})
    spoiled = [name for name in MATRIX if "spoiled" in name]
    right = [name for name in differences if name not in spoiled]
    assert max(errors[name] for name in right) <= tolerance
    if far is not None:
        assert min(errors[name] for name in spoiled) > far
        assert max(differences[name] for name in right) <= TOLERANCE
        assert min(differences[name] for name in spoiled) > TOLERANCE


def save_with_tower_of(folder, other, target):
    """Write the checkpoint in a folder with the vision tower of another."""
    shutil.copytree(folder, target)
    tensors = load_file(folder / "model.safetensors")
    tower = {name: tensor for name, tensor in load_file(other / "model.safetensors").items() if "visual." in name}
    assert 0 < len(tower) < len(tensors)
    save_file(tensors | tower, target / "model.safetensors", {"format": "pt"})


@pytest.mark.parametrize("family", ["qwen2_5_vl", "qwen3_vl"])
def test_weights_are_reloaded(family, tmp_path):
    for name, seed in {"old": 0, "new": 1}.items():
        save_tiny_checkpoint(family, tmp_path / name, seed)
    save_with_tower_of(tmp_path / "old", tmp_path / "new", tmp_path / "mixed")
    packed = MATRIX["packed"]
    reloaded = packed | {"reload": str(tmp_path / "new")}
    engines = {
        "new off": engine(tmp_path / "new", {}),
        "mixed off": engine(tmp_path / "mixed", {}),
        "old": engine(tmp_path / "old", packed),
        "reloaded": engine(tmp_path / "old", reloaded),
        "tower reloaded": engine(tmp_path / "old", reloaded | {"in_parts": True}),
    }
    answers, log = run_engines(tmp_path, engines, PROMPTS)
    assert compare(answers, ["reloaded"], "new off")["reloaded"] <= TOLERANCE
    assert compare(answers, ["tower reloaded"], "mixed off")["tower reloaded"] <= TOLERANCE
    assert min(compare(answers, ["old"], own)["old"] for own in ("new off", "mixed off")) > 0.1
    assert "Following weights were not loaded" not in log


@pytest.fixture(scope="module")
def qwen3_vl(tmp_path_factory):
    """Return the folder of a checkpoint, and the answers of vLLM's own tower."""
    folder = tmp_path_factory.mktemp("qwen3_vl")
    save_tiny_checkpoint("qwen3_vl", folder / "model")
    return folder / "model", run_engines(folder, {"off": engine(folder / "model", {})}, PROMPTS)[0]


def ask_in_processes(tmp_path, arguments):
    """Return the answers and the log of an engine in processes of its own, which find the plugin by its entry point."""
    variables = {
        "VLLM_ENABLE_V1_MULTIPROCESSING": "1",
        "VLLM_PLUGINS": "qwenvit",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    }
    return run_engines(tmp_path, {"on": {"arguments": arguments}}, PROMPTS, variables)


def test_an_engine_in_processes_of_its_own_finds_the_plugin(qwen3_vl, tmp_path):
    folder, own = qwen3_vl
    answers, log = ask_in_processes(tmp_path, engine(folder, MATRIX["attention"])["arguments"])
    assert compare(answers | own, ["on"])["on"] <= TOLERANCE
    assert log.count("qwenvit: attention mode (impl 'auto') in vLLM's tower, because qwenvit.tower is 'attention'") == 1
    assert "images travel as RGB bytes" in log


@pytest.mark.parametrize(("tower_parallel", "mode"), [("data", "tower"), ("weights", "attention")])
def test_tensor_parallel_engines(tower_parallel, mode, qwen3_vl, tmp_path):
    """With "data" each rank encodes its share of the images; split weights leave the attention."""
    folder, own = qwen3_vl
    ranks = {"tensor_parallel_size": 2, "mm_encoder_tp_mode": tower_parallel, "distributed_executor_backend": "mp"}
    answers, log = ask_in_processes(tmp_path, engine(folder, {"options": {"impl": "reference"}}, **ranks)["arguments"])
    assert compare(answers | own, ["on"])["on"] <= TOLERANCE
    assert log.count(f"qwenvit: {mode} mode") == 1
    if mode == "attention":
        assert "because tensor_parallel_size=2 splits the tower's weights" in log


def test_a_language_model_alone_is_as_without_the_plugin(tmp_path):
    save_tiny_text_checkpoint(tmp_path / "model")
    engines = {name: engine(tmp_path / "model", MATRIX[name]) for name in ("off", "tower")}
    for one in engines.values():
        del one["arguments"]["limit_mm_per_prompt"]
    answers, log = run_engines(tmp_path, engines, {"text": {"prompt": "What is it?"}})
    assert answers["tower", "report"] == answers["off", "report"]
    assert answers["off", "report"]["class"].startswith(MODELS)
    assert difference(answers["tower", "text"], answers["off", "text"]) == 0
    assert "qwenvit: " not in log
