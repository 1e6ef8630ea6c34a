"""Figures of vLLM's own tower, from the JSON files of its bench."""

import json
from pathlib import Path

VLLM_MODELS = {"qwen25": "Qwen2.5-VL-7B", "qwen3": "Qwen3-VL-8B"}
"""As its bench calls them."""


def read_vllm(path: Path) -> dict[tuple[str, int, bool], dict[str, float]]:
    """Seconds of wall time by model, patches and whether it is a video; then by way of running.

    Args:
        path: folder of its bench's JSON files, or one of them.

    Raises:
        ValueError: no figures there.
    """
    found: dict[tuple[str, int, bool], dict[str, float]] = {}
    for file in sorted(path.glob("*.json")) if path.is_dir() else [path]:
        for row in json.loads(file.read_text()).get("rows", []):
            key = VLLM_MODELS[row["model"]], int(row["patches"]), " x " in row["case"]
            ways = found.setdefault(key, {})
            if "eager" in row:
                ways[f"vLLM {row['mode']}"] = row["eager"][1] / 1e3
            if graphs := [row[way][1] for way in ("graph", "mgr_exact") if way in row]:
                ways[f"vLLM {row['mode']} + graph"] = min(graphs) / 1e3
    if not found:
        raise ValueError(f"--vllm: no figures of its bench in {path}")
    return found
