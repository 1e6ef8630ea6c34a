"""Figures of `bench_vllm.py` as markdown."""

import itertools
import math
from collections.abc import Iterable, Sequence
from typing import Any

from common.pages import table
from common.steps import failures
from generate_bench.models import TEXT_CONFIGS
from qwenvit import parity
from vllm_bench.cases import (
    ATTENTION,
    ATTENTION_BEST,
    BEST,
    CROWD,
    CROWD_SIDE,
    IMAGES,
    MODES,
    OFF,
    PIXELS,
    PLUGIN,
    REQUEST,
    TOWER,
)
from vllm_bench.engine_options import LOG_PROBABILITIES
from vllm_bench.parity import NOISE_FACTOR
from vllm_bench.stages import STAGES
from vllm_bench.verdicts import Result, Row, fastest_of_vllm, frames_a_second, speedup, verdicts, wrong_modes

VLLM_MARKERS = ("<!-- bench_vllm.py: begin -->", "<!-- bench_vllm.py: end -->")
"""Around all figures of vLLM with the plugin, in BENCHMARKS.md."""
METHOD = (
    "Every mode is an engine in a process of its own, with the same seeded weights; the engines of a model start "
    "together and are measured in turn on one GPU. vLLM: as `LLM(model)` makes it. Best settings: "
    "`compile_mm_encoder`, where this version has it for the model, and `cudagraph_mm_encoder` with budgets of "
    f"exactly the cases' tokens and {IMAGES} images. Times are medians of wall time in ms; p10–p90 in brackets. The "
    "tower alone: `embed_multimodal` of the model, or vLLM's manager of CUDA graphs in its place, in the engine's "
    "worker, with pixel values on the GPU and the grid on the CPU, as vLLM's model runner gives them. First token: "
    "`LLM.generate` of one request at a time with `max_tokens=1`, images as PIL, none ever repeated, without prefix "
    f"cache and processor cache. Images/s: {CROWD} such requests with an image of {CROWD_SIDE}² each in one call. "
    "Stages are of other requests, the GPU synchronised around each, so that together they take longer. No ratio is "
    "given where the error of the tower's outputs against transformers' tower in fp32 is above "
    f"{parity.ERROR_FACTOR} times that of vLLM's, nor for whole requests where "
    f"that is so of their images, or where the error of the first token's {LOG_PROBABILITIES} largest "
    f"log-probabilities, against an engine that is given the fp32 tower's embeddings, is above {NOISE_FACTOR} times "
    "vLLM's."
)


def milliseconds(times: dict[str, float], bold: bool = False) -> str:
    """Return the median and the spread."""
    median, low, high = (times[name] * 1e3 for name in ("median", "p10", "p90"))
    digits = 1 if high >= 100 else 2
    shown = f"{median:.{digits}f}"
    return f"{f'**{shown}**' if bold else shown} ({low:.{digits}f}–{high:.{digits}f})"


def ratio(value: float) -> str:
    return "–" if math.isnan(value) else f"{value:.2f}×"


def shown_modes(rows: Iterable[Row], part: str) -> list[str]:
    """Return the modes that have a time in any row, in the order of MODES."""
    timed = {name for row in rows for name in row["times"]}
    return [name for name, mode in MODES.items() if part in mode.parts and name in timed]


def tower_table(result: Result) -> str:
    """Return a row for each case of the tower alone, and a column for each mode."""
    modes = shown_modes(result["tower"], TOWER)
    head, lines = ["tower alone, ms", "patches", *(MODES[mode].name for mode in modes)], []
    pairs = [pair for pair in ((PLUGIN, BEST), (ATTENTION, OFF), (ATTENTION_BEST, BEST)) if set(pair) <= set(modes)]
    head += [f"{MODES[ours].name} over {MODES[theirs].name}" for ours, theirs in pairs]
    for row in result["tower"]:
        cells = [row["name"], str(row["patches"])]
        for mode in modes:
            cell = milliseconds(row["times"][mode], mode == PLUGIN) if mode in row["times"] else "–"
            video = f", {frames_a_second(row, mode):.0f} frames/s" if row["frames"] and mode in row["times"] else ""
            cells.append(cell + video)
        lines.append([*cells, *(ratio(speedup(result, row, *pair)) for pair in pairs)])
    return table(head, lines)


def request_table(result: Result) -> str:
    """Return a row for each case of whole requests, and for all at once."""
    rows = [*result["requests"], *([result["crowd"]] if result["crowd"] else [])]
    modes = shown_modes(rows, REQUEST)
    ours = [mode for mode in (PLUGIN, PIXELS) if mode in modes]
    head = ["until the first token, ms", "image tokens", *(MODES[mode].name for mode in modes)]
    head += [f"{MODES[mode].name} to vLLM's best" for mode in ours]
    lines = []
    for row in result["requests"]:
        cells = [row["name"], str(row["tokens"])]
        cells += [milliseconds(row["times"][mode], mode in ours) if mode in row["times"] else "–" for mode in modes]
        lines.append([*cells, *(ratio(1 / speedup(result, row, mode, fastest_of_vllm(row))) for mode in ours)])
    if row := result["crowd"]:
        cells = [f"{row['name']} at once, {CROWD_SIDE}², images/s", "–"]
        for mode in modes:
            rates = sorted(row["images"] / row["times"][mode][name] for name in ("median", "p10", "p90")) \
                if mode in row["times"] else []  # fmt: skip
            cells.append(f"{rates[1]:.1f} ({rates[0]:.1f}–{rates[2]:.1f})" if rates else "–")
        lines.append([*cells, *(ratio(speedup(result, row, mode, fastest_of_vllm(row))) for mode in ours)])
    return table(head, lines)


def stage_table(result: Result) -> str:
    """Return a row for each case and mode with the time of every stage."""
    lines = [
        [row["name"], MODES[mode].name, *(milliseconds(found[stage]) if stage in found else "–" for stage in STAGES)]
        for row in result["requests"]
        for mode, found in row["stages"].items()
    ]
    return table(["stages, ms", "", *STAGES], lines)


def errors_text(errors: Sequence[float]) -> str:
    return ", ".join(f"{error:.2e}" for error in errors) or "–"


def parity_table(result: Result) -> str:
    """Return a row for each case and mode: errors of the outputs, and whether they pass."""
    lines = []
    for row in result["tower"]:
        for mode, errors in row["errors"].items():
            lines.append([row["name"], MODES[mode].name, errors_text(errors), "–", "–", verdict(row["failures"][mode])])
    compared: dict[str, Any] = (result["agreement"] or {}).get("modes", {})
    for mode, found in compared.items():
        cells = ["requests", MODES[mode].name, errors_text(found["errors"]), f"{found['rms']:.2e}"]
        lines.append([*cells, f"{found['most']:.2e}", verdict(found["failures"])])
    return table(["errors against fp32", "", "outputs", "log-probabilities", "largest", ""], lines)


def verdict(failures: Sequence[str]) -> str:
    return "; ".join(failures) or "✓"


def parity_failures(result: Result) -> list[str]:
    """Return a line for each mode and case whose results differ by more than rounding."""
    rows = [(row["name"], wrong_modes(result, row)) for row in result["tower"]]
    if result["agreement"]:
        rows.append(("requests", {name: one["failures"] for name, one in result["agreement"]["modes"].items()}))
    return [
        f"{case}, {MODES[mode].name}: {'; '.join(why)}" for case, wrong in rows for mode, why in wrong.items() if why
    ]


def notes(result: Result, for_readers: bool) -> list[str]:
    """Return the lines below a model's tables; bars unless `for_readers`."""
    of = TEXT_CONFIGS[result["model"]]["num_hidden_layers"]
    versions = dict.fromkeys(f"vLLM {engine['vllm']}" for engine in result["engines"].values())
    found = [f"{', '.join(versions) or 'No engine'}; {result['text_layers']} of {of} text layers"]
    if result["tiny"]:
        found[0] += "; tiny widths in fp32 on the CPU, which say nothing about speed"
    if agreement := result["agreement"]:
        same = {True: "the same bits", False: "not the same bits", None: None}[agreement["same_bits"]]
        found += [f"Embeddings with pixels and without: {same}"] if same else []
        found += [f"Log-probabilities of one picture and of another differ by {agreement['other']:.2e} (vLLM)"]
    found += [f"Parity failed: {line}" for line in parity_failures(result)]
    if not for_readers:
        bars = verdicts(result)
        found += [f"{sum(bar.met for bar in bars)} of {len(bars)} bars met"] if bars else []
        found += [str(bar) for bar in bars]
        for name, engine in result["engines"].items():
            cost = f"{engine['load_seconds']:.0f} s to start, {engine['memory'] / 2**30:.1f} GiB"
            found.append(f"{MODES[name].name}: {engine['tower']}, {cost}")
            found += [f"{MODES[name].name}: log: {line}" for line in engine["log"]]
            if graphs := engine.get("graphs"):
                sizes = ", ".join(map(str, graphs["sizes"]))
                words = f"{graphs['hits']} images and videos in them, {graphs['misses']} without"
                found.append(f"{MODES[name].name}: CUDA graphs of {sizes} tokens, {words}")
        found += [f"Seconds of the steps: {result['seconds']}"]
    return found + [f"Failed: {line}" for line in failures(result)]


def section(result: Result, for_readers: bool) -> str:
    """Return one model's tables and notes; stages and errors folded up."""
    parts = [f"### In vLLM, {result['model']}"]
    parts += [tower_table(result)] if result["tower"] else []
    parts += [request_table(result)] if result["requests"] or result["crowd"] else []
    parts += ["\n".join(f"- {note}." for note in notes(result, for_readers))]
    if any(row["stages"] for row in result["requests"]):
        parts += [f"<details><summary>Stages of a request</summary>\n\n{stage_table(result)}\n\n</details>"]
    if result["tower"] or result["agreement"]:
        summary = "Errors: relative L2 of tokens and DeepStack levels, root mean square of log-probabilities"
        parts += [f"<details><summary>{summary}</summary>\n\n{parity_table(result)}\n\n</details>"]
    return "\n\n".join(parts)


def block(results: Iterable[Result], for_readers: bool) -> str:
    """Return the sections of all models, under the machines they ran on; bars unless `for_readers`."""
    parts = []
    for machine, group in itertools.groupby(results, key=lambda result: result["machine"]):
        parts += [machine, *(section(result, for_readers) for result in group)]
    return "\n\n".join([*parts, METHOD])
