"""Draw the chart of `bench_e2e.py`."""

from pathlib import Path

from e2e.verdicts import OURS, Result, Row
from peers.rivals import SDPA

MODELS = ("Qwen2.5-VL-7B", "Qwen3-VL-8B")
CASES = ("448²", "672²", "896²", "1344²", "batch of 8", "16 frames, 448²")
RIVAL_KINDS = {"vLLM": "vLLM, best mode", "transformers compiled": "transformers compiled, best mode",
               "transformers FA": "transformers FlashAttention, best", SDPA: SDPA}  # fmt: skip
"""Labels by the prefix of rivals' names. The chart shows the fastest rival of each prefix."""
COLOURS = ("#1f5fbf", "#8c8c8c", "#ababab", "#c6c6c6", "#dedede")


def milliseconds_by_label(row: Row) -> dict[str, float]:
    """Return the milliseconds of qwenvit and of the fastest rival of each kind."""
    found = {OURS: row["times"][OURS]["median"] * 1e3}
    for prefix, label in RIVAL_KINDS.items():
        if times := [time["median"] for name, time in row["times"].items() if name.startswith(prefix)]:
            found[label] = min(times) * 1e3
    return found


def draw(results: list[Result], path: Path) -> None:
    """Draw a row for each model, a panel for each case and a bar for each contender. Each panel has its own scale."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    chosen = [result for result in results if result["model"] in MODELS and result["rows"]]
    labels = [OURS, *RIVAL_KINDS.values()]
    colours = dict(zip(labels, COLOURS, strict=True))
    drawn = [case for case in CASES if any(row["name"] == case for result in chosen for row in result["rows"])]
    shape = max(len(chosen), 1), max(len(drawn), 1)
    figure, axes = plt.subplots(*shape, figsize=(2.6 + 1.75 * shape[1], 0.9 + 1.75 * shape[0]), squeeze=False)
    for model_axes, result in zip(axes, chosen, strict=False):
        rows = {row["name"]: milliseconds_by_label(row) for row in result["rows"]}
        shown = [label for label in labels if any(label in rows[case] for case in drawn if case in rows)]
        for axis, case in zip(model_axes, drawn, strict=False):
            times = rows.get(case, {})
            for y, label in enumerate(shown):
                if label in times:
                    axis.barh(y, times[label], 0.78, color=colours[label])
                    weight = "bold" if label == OURS else "normal"
                    axis.annotate(f"{times[label]:.1f}", (times[label], y), (3, 0), textcoords="offset points",
                                  va="center", fontsize=8, fontweight=weight)  # fmt: skip
            axis.set_ylim(len(shown) - 0.5, -0.5)
            axis.set_xlim(0, 1.3 * max(times.values(), default=1))
            axis.set_yticks(range(len(shown)), shown if axis is model_axes[0] else [""] * len(shown), fontsize=8)
            axis.tick_params(left=False, bottom=False, labelbottom=False)
            axis.spines[["top", "right", "bottom"]].set_visible(False)
            axis.set_title(case, fontsize=9)
        model_axes[0].set_ylabel(result["model"], fontsize=10, fontweight="bold", labelpad=12)
    machines = ", ".join(dict.fromkeys(result["machine"].partition(",")[0] for result in chosen))
    figure.suptitle(f"Whole vision tower, ms (less is better); {machines}, bf16", fontsize=11)
    figure.tight_layout()
    figure.savefig(path, dpi=130)
    plt.close(figure)
