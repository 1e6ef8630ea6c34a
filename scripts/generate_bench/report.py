"""Figures of `bench_generate.py`, the bars they are held to, and both as markdown."""

import itertools
from collections.abc import Iterable
from typing import Any

from common.pages import table
from common.steps import failures
from generate_bench.measure import ENCODER, INSIDE, NEW_TOKENS, NOISE_FACTOR, OURS, POSITIONS, USE_TOWER, Row
from generate_bench.models import TEXT_CONFIGS, TOKENS_AROUND
from peers.rivals import SDPA
from qwenvit import parity

Result = dict[str, Any]
"""All figures of one model, as `--json` writes them."""

OVERHEAD_BAR = 0.15
"""Most ms that the tower inside `get_image_features` of one image takes beyond the encoder alone."""
SAVED_BAR = 0.95
"""Least part of what the tower saves that the first token has to come sooner by."""
GENERATE_MARKERS = ("<!-- bench_generate.py: begin -->", "<!-- bench_generate.py: end -->")
"""Around all figures of whole models, in BENCHMARKS.md."""
METHOD = (
    "A cell has the ms until the first token, and in brackets those of `get_image_features`, which runs the vision "
    "tower, and their share. Times are medians of wall time until the result is ready; contenders take turns in one "
    "process; encoder alone, tower inside and get_image_features beyond it do by themselves. First token: "
    "`model.generate(**inputs, max_new_tokens=1, do_sample=False)`, the inputs on the GPU, pixel values in bf16; the "
    f"processor's own time is left out. A prompt has all images, and {TOKENS_AROUND} text tokens "
    "before and after them. transformers runs in eager mode, the language model with sdpa; the attention named is the "
    "tower's (FA2: `torch.nn.attention.varlen.varlen_attn`; FA3: `_vllm_fa3_C.fwd`). Encoder alone: "
    "`encoder(pixel_values, grid)` of the same images, the grid on the CPU. Tower inside: the call of it in "
    "`get_image_features`, which then asks the GPU for the grids. Weights are random. The fewer text layers, "
    "the larger the tower's share; what the tower saves does not depend on them. No figure is given where an error "
    f"against the whole model in fp32 is too large: of the tower's outputs, above {parity.ERROR_FACTOR} times that of "
    f"transformers with sdpa (3 times, where that is above 5 %); of log-probabilities at {POSITIONS} positions of the "
    f"prompt, above {NOISE_FACTOR} times, with the whole model in bf16 and with the tower alone in bf16. Nor where "
    f"one of {NEW_TOKENS} greedy tokens differs from transformers', unless fp32 sees the two closer together than "
    "transformers' own largest error."
)


def empty_result(model: str, text_layers: int) -> Result:
    return {"model": model, "text_layers": text_layers, "machine": "", "ceilings": "", "extra_bytes": 0, "rows": [],
            "failed": [], "seconds": {}}  # fmt: skip


def median_ms(row: Row, kind: str, name: str) -> float:
    return row[kind][name]["median"] * 1e3


def saved_ms(row: Row, kind: str) -> float:
    """Return the milliseconds that `use_tower` saves over transformers with sdpa: `first` or `tower`."""
    return median_ms(row, kind, SDPA) - median_ms(row, kind, USE_TOWER)


def overhead_ms(row: Row, name: str) -> float:
    """Return the milliseconds that a call of the tower in its model takes beyond the encoder alone."""
    return median_ms(row, "close", name) - median_ms(row, "close", ENCODER)


def verdicts(row: Row) -> dict[str, bool]:
    """Return each bar of a case in words, with its figures, and whether it is met."""
    sooner, saved, overhead = saved_ms(row, "first"), saved_ms(row, "tower"), overhead_ms(row, INSIDE)
    text = f"{row['name']}: the tower saves {saved:.2f} ms, the first token comes {sooner:.2f} ms sooner"
    found = {f"{text} (≥ {SAVED_BAR:g} of that)": sooner >= SAVED_BAR * saved > 0}
    if row["images"] == 1:
        text = f"{row['name']}: the tower inside get_image_features {overhead:+.3f} ms beyond the encoder alone"
        found[f"{text} (≤ {OVERHEAD_BAR:g})"] = overhead <= OVERHEAD_BAR
    return found


def times_table(result: Result) -> str:
    """Return a row for each case: every contender, what `use_tower` saves, and what it adds to the encoder alone."""
    names = list(dict.fromkeys(name for row in result["rows"] for name in row["first"]))
    head = ["", "prompt tokens", *(f"{name}, ms" for name in names), "first token sooner by, ms", "tower saves, ms"]
    lines = []
    for row in result["rows"]:
        cells = [row["name"], str(row["prompt"])]
        for name in names:
            first, tower = (median_ms(row, kind, name) for kind in ("first", "tower"))
            shown = f"**{first:.1f}**" if name in OURS else f"{first:.1f}"
            cells.append(f"{shown} ({tower:.2f}, {tower / first:.0%})")
        speedup = median_ms(row, "first", SDPA) / median_ms(row, "first", USE_TOWER)
        cells += [f"{saved_ms(row, 'first'):.2f} ({speedup:.2f}×)", f"{saved_ms(row, 'tower'):.2f}"]
        cells += [f"{median_ms(row, 'close', ENCODER):.2f}"]
        lines.append([*cells, *(f"{overhead_ms(row, name):+.3f}" for name in (INSIDE, USE_TOWER))])
    last = ["encoder alone, ms", "tower inside beyond it, ms", "get_image_features beyond it, ms"]
    return table([*head, *last], lines)


def parity_table(result: Result) -> str:
    """Return a row for each case and contender: errors against fp32, and the tokens that are transformers'."""
    head = ["", "", "tower's outputs", "log-probabilities", "by the tower alone", "largest error", "same tokens"]
    lines = []
    for row in result["rows"]:
        found = row["parity"]
        for name, errors in found["features"].items():
            cells = [row["name"], name, ", ".join(f"{error:.2e}" for error in errors)]
            cells += [f"{found[kind][name]:.2e}" for kind in ("whole", "tower")]
            cells += [f"{found['noise']:.2e}", "–"] if name == SDPA else ["–", tokens_text(found, name)]
            lines.append(cells)
    return table(head, lines)


def tokens_text(found: Row, name: str) -> str:
    """Return how many of the first tokens are transformers', and how close the two are that differ."""
    same = found["tokens"][name]
    tie = "" if same == NEW_TOKENS else f", then two tokens {found['gap'][name]:.2e} apart in fp32"
    return f"{same} of {NEW_TOKENS}{tie}"


def notes(result: Result, for_readers: bool) -> list[str]:
    """Return the lines below a model's table; bars unless `for_readers`."""
    layers, of = result["text_layers"], TEXT_CONFIGS[result["model"]]["num_hidden_layers"]
    found = [
        f"{layers} of {of} text layers. `use_tower` holds {result['extra_bytes'] / 2**20:.0f} MiB of packed weights"
    ]
    if not for_readers:
        bars = {text: met for row in result["rows"] for text, met in verdicts(row).items()}
        found += [f"{sum(bars.values())} of {len(bars)} bars met"] if bars else []
        found += [f"{text} {'✓' if met else '✗'}" for text, met in bars.items()]
        found += [f"Seconds of the steps: {result['seconds']}"]
    return found + [f"Failed: {line}" for line in failures(result)]


def section(result: Result, for_readers: bool) -> str:
    """Return one model's table, its notes, and the errors folded up."""
    parts = [f"### Until the first token, {result['model']}"]
    parts += [times_table(result)] if result["rows"] else []
    parts += ["\n".join(f"- {note}." for note in notes(result, for_readers))]
    if result["rows"]:
        summary = "Errors against fp32: relative L2 of the tower's outputs, root mean square of log-probabilities"
        parts += [f"<details><summary>{summary}</summary>\n\n{parity_table(result)}\n\n</details>"]
    return "\n\n".join(parts)


def block(results: Iterable[Result], for_readers: bool) -> str:
    """Return the sections of all models, under the machines they ran on; bars unless `for_readers`."""
    parts = []
    for (machine, ceilings), group in itertools.groupby(results, key=lambda r: (r["machine"], r["ceilings"])):
        parts += [machine, f"{ceilings}.", *(section(result, for_readers) for result in group)]
    return "\n\n".join([*parts, METHOD])
