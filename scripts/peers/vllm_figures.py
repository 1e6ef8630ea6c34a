"""Read figures of vLLM's tower from the JSON files of vLLM's own benchmark."""

import json
from pathlib import Path

VLLM_MODELS = {"qwen25": "Qwen2.5-VL-7B", "qwen3": "Qwen3-VL-8B"}
"""Model names of `bench_e2e.py` by vLLM's benchmark's."""


def read_vllm(path: Path) -> dict[tuple[str, int, bool], dict[str, float]]:
    """Return median seconds by (model, patches, whether it is a video), then by mode.

    Args:
        path: a JSON file of vLLM's benchmark, or a folder of them.

    Raises:
        ValueError: the files have no figures.
    """
    found: dict[tuple[str, int, bool], dict[str, float]] = {}
    for file in sorted(path.glob("*.json")) if path.is_dir() else [path]:
        for row in json.loads(file.read_text()).get("rows", []):
            key = VLLM_MODELS[row["model"]], int(row["patches"]), " x " in row["case"]
            modes = found.setdefault(key, {})
            if "eager" in row:
                modes[f"vLLM {row['mode']}"] = row["eager"][1] / 1e3
            if graphs := [row[kind][1] for kind in ("graph", "mgr_exact") if kind in row]:
                modes[f"vLLM {row['mode']} + graph"] = min(graphs) / 1e3
    if not found:
        raise ValueError(f"--vllm: expected figures of vLLM's benchmark, got none in {path}")
    return found
