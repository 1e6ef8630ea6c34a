"""The figures of `bench_encode.py`, the bars they are held to, and which reach them."""

from dataclasses import dataclass
from typing import Any

from encode_bench.folders import FULL_HD, MIX, PHOTOS

Result = dict[str, Any]
"""All figures of one model, as `--json` writes them."""
Row = dict[str, Any]
"""Figures of one step."""

ENCODE, TOWER, FEATURES, LAST_MAP = "encode", "tower alone", "features", "map of the last layer"
PIPELINE, VECTORS, TOKENS = "pipeline", "vectors", "tokens"
GPU_RIVAL = "transformers' processor on the GPU + qwenvit's tower"
CPU_RIVAL = "transformers' processor on the CPU + qwenvit's tower"
HF_RIVAL = "transformers' processor on the GPU + its tower"
RIVALS = (GPU_RIVAL, CPU_RIVAL, HF_RIVAL)

WARM_BARS = {FULL_HD: 1.08, PHOTOS: 1.12, MIX: 1.15}
"""Largest allowed ratio of `encode` to the tower alone, by folder."""
COLD_BARS = {MIX: 1.4}
"""The same for the first pass of an encoder without CUDA graphs."""
LATENCY_BAR = 2.0
"""Most ms of one 1920×1080 file beyond decoding and the tower."""
PREPROCESSING_BAR = 0.2
"""Most ms of resizing, normalising and cutting 1920×1080 on the GPU."""
VIDEO_BAR = 1.10
"""Largest allowed ratio of `encode_video` to the tower alone."""
FEATURES_BARS = {896: 1.05}
"""Largest allowed ratio of four layers' maps to that of the last layer alone, by the side of the image."""
VECTORS_BAR, TOKENS_BAR = 1 / 0.95, 1 / 0.85
"""Largest allowed ratio of a data-set job to the encoder's pipeline; with tokens, to the slower of it and the disk."""
MEMORY_BAR = 200.0
"""Most MB that host memory grows."""


@dataclass(frozen=True)
class Verdict:
    """One figure and its bar; less is better."""

    name: str
    value: float
    limit: float
    unit: str = "×"

    @property
    def met(self) -> bool:
        return self.value <= self.limit

    def __str__(self) -> str:
        return f"{self.name}: {self.value:.2f}{self.unit} (≤ {self.limit:.4g}) {'✓' if self.met else '✗'}"


def over_the_tower(row: Row) -> float:
    return row["times"][ENCODE] / row["times"][TOWER]


def cold_over_the_tower(row: Row) -> float:
    return row["cold"] / row["times"][TOWER]


def beyond_ms(one: Row) -> float:
    """Return the milliseconds of one file beyond decoding and the tower."""
    return (one[ENCODE] - one["decode"] - one[TOWER]) * 1e3


def over_the_pipeline(job: Row, output: str) -> float:
    """Return a job's time over the pipeline's; with tokens, over the time that the disk takes for them if longer."""
    return job[output] / max(job[PIPELINE], job["disk"] if output == TOKENS else 0.0)


def growth_mb(memory: Row) -> float:
    return (memory["most"] - memory["before"]) / 1e6


def verdicts(result: Result) -> list[Verdict]:
    """Return the verdict for every bar whose figure was measured."""
    found = []
    for row in result["rows"]:
        if row["name"] in WARM_BARS:
            found.append(Verdict(row["name"], over_the_tower(row), WARM_BARS[row["name"]]))
        if row["name"] in COLD_BARS:
            found.append(Verdict(f"{row['name']}, cold", cold_over_the_tower(row), COLD_BARS[row["name"]]))
    if one := result["one"]:
        found.append(Verdict("one file", beyond_ms(one), LATENCY_BAR, " ms"))
    if step := result["preprocessing"]:
        found.append(Verdict("preprocessing", step["seconds"] * 1e3, PREPROCESSING_BAR, " ms"))
    if video := result["video"]:
        found.append(Verdict("video", video[ENCODE] / video[TOWER], VIDEO_BAR))
    found += [
        Verdict(f"features, {row['side']}²", row[FEATURES] / row[LAST_MAP], FEATURES_BARS[row["side"]])
        for row in result.get("features") or ()  # figures from before this step have none
        if row["side"] in FEATURES_BARS and LAST_MAP in row
    ]
    if job := result.get("data set"):
        found.append(Verdict("data set, vectors", over_the_pipeline(job, VECTORS), VECTORS_BAR))
        found.append(Verdict("data set, tokens", over_the_pipeline(job, TOKENS), TOKENS_BAR))
    if memory := result["memory"]:
        found.append(Verdict("host memory", growth_mb(memory), MEMORY_BAR, " MB"))
    return found
