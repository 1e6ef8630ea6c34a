"""Whether engines compute what they should: held to the fp32 tower, and to vLLM's own error against it."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from e2e.model_bench import RIVAL_ERROR_FACTOR
from qwenvit import parity
from vllm_bench.cases import BEST, MODES, OFF, PIXELS, PLUGIN, Mode
from vllm_bench.truth import output_errors

NOISE_FACTOR = 1.25
"""Largest ratio of the error of log-probabilities to vLLM's own, both against the fp32 tower's embeddings. The tower's
outputs have a sharper bound (`parity.ERROR_FACTOR`); the language model makes more or less of an error at random."""
LOG_PROBABILITY_BOUND = 1e-3
"""An error of log-probabilities that always passes: right towers in fp32 differ by about 1e-5."""
OUR_PACKAGE, THEIR_PACKAGE = "qwenvit", "vllm"
FirstTokens = Sequence[Mapping[str, float]]
"""Log-probabilities by token, of each request."""


def plugin_failure(mode: Mode, described: Mapping[str, Any]) -> str | None:
    """Return why an engine is not one of its mode, or None.

    Args:
        mode: the way to run vLLM.
        described: what `BenchWorker.bench_model` returns.
    """
    owner = described["tower"].partition(".")[0]
    ours = OUR_PACKAGE in described["tower_packages"]
    if mode.plugin is None:
        expected, right = "vLLM's own tower", owner == THEIR_PACKAGE and not ours
    elif mode.plugin["tower"] == "attention":
        expected, right = "qwenvit's attention in vLLM's tower", owner == THEIR_PACKAGE and ours
    else:
        expected, right = "qwenvit's tower", owner == OUR_PACKAGE
    packages = ", ".join(described["tower_packages"])
    return None if right else f"expected {expected}, got {described['tower']} with parts of {packages}"


def wrong_outputs(ours: Sequence[float], theirs: Sequence[float], factor: float) -> list[str]:
    """Describe the outputs whose relative L2 error is above `factor` times vLLM's, or where vLLM's is beyond meaning.

    With these weights no tower amplifies rounding: a large error is a mistake, also vLLM's own.
    """
    return [
        f"output {index}: error {a:.2e}, vLLM's {b:.2e}"
        for index, (a, b) in enumerate(zip(ours, theirs, strict=True))
        if not (a <= max(b * factor, parity.FP32_BOUND) and b <= parity.MEANINGFUL_ERROR)
    ]


def tower_failures(errors: Mapping[str, Sequence[float]]) -> dict[str, list[str]]:
    """Return what is wrong with each mode's outputs; vLLM's compiled tower needs only to do the same work."""
    theirs = errors.get(OFF)
    if theirs is None:
        return {name: ["vLLM's own tower has no figures to compare with"] for name in errors}
    factors = {name: RIVAL_ERROR_FACTOR if name == BEST else parity.ERROR_FACTOR for name in errors}
    return {name: wrong_outputs(errors[name], theirs, factor) for name, factor in factors.items()}


def embedding_errors(kept: Mapping[str, Sequence[Tensor]], truths: Sequence[Tensor]) -> dict[str, list[float]]:
    """Return the relative L2 errors of the embeddings of all requests, by mode.

    Args:
        kept: by mode, `[tokens, out·(1 + levels)]` of each call of the tower.
        truths: what `Truth.write_requests` returns.
    """
    truth = torch.cat(tuple(truths), dim=1)
    return {name: output_errors(torch.cat(tuple(outputs)), truth) for name, outputs in kept.items()}


def same_bits(kept: Mapping[str, Sequence[Tensor]]) -> bool | None:
    """Return whether the plugin's embeddings are the same with pixels and without; None where one did not run."""
    if not {PLUGIN, PIXELS} <= kept.keys():
        return None
    return torch.equal(*(torch.cat(tuple(kept[name])) for name in (PLUGIN, PIXELS)))


def difference(ours: FirstTokens, theirs: FirstTokens) -> dict[str, float]:
    """Return root mean square and largest difference of log-probabilities of tokens that both list.

    `same` is the number of requests whose most likely token is the same.
    """
    pairs = list(zip(ours, theirs, strict=True))
    each = [abs(a[token] - b[token]) for a, b in pairs for token in a.keys() & b.keys()]
    rms = math.sqrt(sum(x * x for x in each) / len(each)) if each else math.nan
    same = sum(max(a, key=a.__getitem__) == max(b, key=b.__getitem__) for a, b in pairs)
    return {"rms": rms, "most": max(each, default=math.nan), "same": same}


def agreement(
    answers: Mapping[str, Mapping[str, Any]], truth: FirstTokens | None, kept: Mapping[str, Sequence[Tensor]],
    truths: Sequence[Tensor],
) -> dict[str, Any]:  # fmt: skip
    """Compare whole requests with those that are given the fp32 tower's embeddings.

    Args:
        answers: by mode, what `Session.log_probabilities` returns.
        truth: the log-probabilities for the fp32 tower's embeddings; None if there are none.
        kept: see `embedding_errors`.
        truths: see `embedding_errors`.

    Returns:
        `requests`: how many; `modes`: by mode, `errors` of the embeddings, `rms`, `most` and `same` of `difference`,
        and `failures`; `other`: `rms` of vLLM's log-probabilities for one picture and for another; `same_bits`.
    """
    errors = embedding_errors(kept, truths) if truths else {}
    wrong = tower_failures(errors)
    modes: dict[str, Any] = {}
    for name, answer in answers.items():
        found = difference(answer["first"], truth) if truth is not None else {"rms": math.nan, "most": math.nan}
        failures = list(wrong.get(name, ["there is no fp32 tower to compare with"]))
        if MODES[name].plugin and MODES[name].plugin["pixels"] and not answer["bytes"]:  # type: ignore[index]
            failures.append("no pixels came as bytes")
        modes[name] = {"errors": errors.get(name, []), **found, "bytes": answer["bytes"], "failures": failures}
    for name, row in modes.items():
        own = modes.get(OFF, {}).get("rms", math.nan)
        factor = RIVAL_ERROR_FACTOR if name == BEST else NOISE_FACTOR
        if not row["rms"] <= max(own * factor, LOG_PROBABILITY_BOUND):
            row["failures"].append(f"log-probabilities: error {row['rms']:.2e}, vLLM's {own:.2e}")
    first = answers[OFF]["first"] if OFF in answers else []
    other = difference(first[1:], first[:-1])["rms"] if len(first) > 1 else math.nan
    return {"requests": len(truths), "modes": modes, "other": other, "same_bits": same_bits(kept)}
