"""How engines are started: the arguments of `vllm.LLM`, and the environment of its process."""

import os
import tomllib
from collections.abc import Collection, Mapping
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

from vllm_bench.cases import IMAGES, REQUEST, TOWER, VIDEO_CASE, Mode, Shape, graph_budgets

SCRIPTS = Path(__file__).resolve().parents[1]
ENTRY_POINTS = "vllm.general_plugins"
PLUGIN_NAME = "qwenvit"
LOAD_FORMAT = "seeded"
"""The name under which vLLM finds `worker.SeededLoader`."""
MAX_TOKENS, TINY_MAX_TOKENS = 8192, 2048
"""Tokens of the longest request, text and images."""
CACHE_BYTES, SMALL_CACHE_BYTES = 3 * 2**30, 2**30
"""Memory for keys and values, the latter where the tower alone is measured. All engines of a model must fit the GPU;
engines that start together must not count each other's memory as their own."""
LOG_PROBABILITIES = 100
"""Most likely first tokens whose log-probabilities are compared."""
SEQUENCES = 256
"""Of a step: more than a crowd has. Each engine's sampler keeps memory for as many rows of logits, by default 1024."""
FEW_GRAPHS = [1, 2, 4, 8]
"""Sizes of the text's CUDA graphs in engines whose tower alone is measured."""
DEFAULTS = {
    "HF_HUB_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_LOGGING_LEVEL": "INFO",
}
TINY = {
    "TORCHDYNAMO_DISABLE": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",  # GiB
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # each process would import vLLM anew, which is most of the time
}


def engine_options(
    mode: Mode,
    shape: Shape,
    checkpoint: Path,
    parts: Collection[str],
    cases: Collection[str],
    more: Mapping[str, Any],
) -> dict[str, Any]:
    """Return the arguments of `vllm.LLM`.

    Args:
        mode: the way to run vLLM.
        shape: the model's sizes.
        checkpoint: the folder of `write_checkpoint`.
        parts: what this engine is measured for.
        cases: the chosen cases, for the sizes of CUDA graphs.
        more: arguments that replace others (`--llm`), those of `compilation_config` one by one.
    """
    options: dict[str, Any] = {
        "model": str(checkpoint),
        "load_format": LOAD_FORMAT,
        "worker_extension_cls": "vllm_bench.worker.BenchWorker",
        "dtype": shape.dtype,
        "seed": 0,
        "max_model_len": TINY_MAX_TOKENS if shape.tiny else MAX_TOKENS,
        "limit_mm_per_prompt": {"image": IMAGES, "video": int(TOWER in parts and VIDEO_CASE in cases)},
        "mm_processor_cache_gb": 0,
        "enable_prefix_caching": False,
        "enable_mm_embeds": True,
        "max_logprobs": LOG_PROBABILITIES,
    }
    compilation: dict[str, Any] = {}
    if mode.best_settings:
        compilation = {
            "compile_mm_encoder": True,
            "cudagraph_mm_encoder": True,
            "encoder_cudagraph_token_budgets": graph_budgets(shape, parts, cases),
            "encoder_cudagraph_max_vision_items_per_batch": IMAGES,
            "encoder_cudagraph_max_frames_per_batch": IMAGES,  # as many frame groups as the video has
        }
    if shape.tiny:
        options |= {"enforce_eager": True, "max_num_seqs": 2, "skip_mm_profiling": True}
    else:
        options |= {"kv_cache_memory_bytes": CACHE_BYTES, "gpu_memory_utilization": 0.05}  # the latter: free at least
        options["max_num_seqs"] = SEQUENCES
        if REQUEST not in parts:
            options["kv_cache_memory_bytes"] = SMALL_CACHE_BYTES
            compilation["cudagraph_capture_sizes"] = FEW_GRAPHS
    more = dict(more)
    if not shape.tiny and (compilation or "compilation_config" in more):
        options["compilation_config"] = compilation | more.pop("compilation_config", {})
    if mode.plugin is not None:
        options["additional_config"] = {"qwenvit": mode.plugin}
    return options | more


def environment(mode: Mode, shape: Shape, folder: Path) -> dict[str, str]:
    """Return the environment of an engine's process.

    Args:
        mode: the way to run vLLM.
        shape: the model's sizes.
        folder: where what is compiled is kept, and the plugin's entry point if qwenvit is not installed.
    """
    found = {**DEFAULTS, **(TINY if shape.tiny else {}), **os.environ}
    paths = [str(SCRIPTS), *entry_point_folder(folder / "plugin")]
    found["PYTHONPATH"] = os.pathsep.join([*paths, *filter(None, [os.environ.get("PYTHONPATH")])])
    found["VLLM_CACHE_ROOT"] = str(
        folder / "cache"
    )  # compiled towers of different modes must not be taken for each other
    found["VLLM_PLUGINS"] = "none" if mode.plugin is None else PLUGIN_NAME
    return found


def entry_point_folder(folder: Path) -> list[str]:
    """Return the folder to import from so that vLLM finds the plugin: none where qwenvit is installed with it.

    A checkout that is only on PYTHONPATH declares no entry points, so this writes what an installation would.

    Raises:
        KeyError: the checkout's pyproject.toml does not declare the plugin.
    """
    if any(point.name == PLUGIN_NAME for point in entry_points(group=ENTRY_POINTS)):
        return []
    project = tomllib.loads((SCRIPTS.parent / "pyproject.toml").read_text())["project"]
    declared = project["entry-points"][ENTRY_POINTS][PLUGIN_NAME]
    about = folder / f"qwenvit-{project['version']}.dist-info"
    about.mkdir(parents=True, exist_ok=True)
    (about / "METADATA").write_text(f"Metadata-Version: 2.1\nName: qwenvit\nVersion: {project['version']}\n")
    (about / "entry_points.txt").write_text(f"[{ENTRY_POINTS}]\n{PLUGIN_NAME} = {declared}\n")
    return [str(folder)]
