"""Measure one model for `bench_e2e.py`, step by step: here, or in a process of its own."""

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from common.machine import Ceilings, describe_machine
from common.progress import progress
from common.steps import Step, steps_of
from e2e.cases import MODELS, all_cases
from e2e.model_bench import MIN_ROUNDS, ROUNDS, ModelBench
from e2e.verdicts import OMITTED_BY_OPTION, OURS, Result
from peers.rivals import HOW_RIVALS_RUN
from peers.vllm_figures import VLLM_MODELS, read_vllm
from qwenvit.config.published import published_config

SIZES, PROFILE, GRAPHS, COLD = "random sizes", "profile", "graphs", "cold process"
EXTRAS = (SIZES, PROFILE, GRAPHS, COLD)
PROFILED = ("448²", "896²", "1344²")
TIMEOUT = 900
"""Seconds after which the process of a model is killed."""
NOT_FORWARDED_OPTIONS = ("models", "json", "read", "chart", "page", "readme")
"""Options of the command that a model's own process does not receive, or receives with other values."""


METHOD = (
    "Times are medians of wall time in ms from `encoder(pixel_values, grid)`, with pixel values on the GPU in bf16 "
    "and the grid on the CPU, until the result is ready; p10–p90 in brackets. The contenders of a row take turns in "
    f"one process, in another order each time: {ROUNDS} rounds, of which slow rivals skip some (at least {MIN_ROUNDS} "
    "remain). vLLM runs in its own, its calls in a row, which is slower where the GPU is at its power limit: beside "
    "it, qwenvit's time is the slower of calls in turns and calls in a row, and says so. Every call of a case has the "
    "same grid, and qwenvit caches its table. Best rival: the fastest of those that do the whole tower's work and have "
    "the case; none is named where an option left one out. TFLOP/s counts matrix products. MiB is the peak of a call "
    "above one copy of the weights as the checkpoint has them. It includes results, static buffers, the pool of this "
    "case's CUDA graph alone (none beyond 32768 patches), padding of weights and cuBLAS' workspaces. No speedup is "
    "given where the outputs' error against fp32 is above 1.05 times transformers' own in bf16 (3 times, where that is "
    "above 5 %)."
)
"""How the figures are measured, which each result keeps: later runs may measure otherwise."""


def empty_result(model: str) -> Result:
    return {"model": model, "method": f"{METHOD}\n\n{HOW_RIVALS_RUN}", "machine": "", "ceilings": "", "gemm": 0.0,
            "gate": "", "rows": [], "sizes": [], "profiles": {}, "graphs": None, "cold": None, "failed": [],
            "seconds": {}, "complete": False}  # fmt: skip


def run_model(model: str, options: argparse.Namespace, limits: Ceilings, save: Callable[[Result], None]) -> Result:
    """Measure everything about one model. A step that fails is listed under `failed`, and the next steps run.

    Args:
        model: a key of MODELS.
        options: the command's options.
        limits: the machine's ceilings.
        save: called with all figures so far, after each step.
    """
    host, _, measured = describe_machine(limits, options.commit).partition("\n\n")
    result = empty_result(model) | {"machine": host, "ceilings": measured, "gemm": limits.gemm_throughput}

    step = steps_of(result, save)
    bench: ModelBench | None = None
    vllm = read_vllm(options.vllm) if options.vllm else {}
    with step("weights and parity"):
        bench = ModelBench(model, options)
        checks = bench.parity_checks
        worst = max(checks, key=lambda check: check.value / check.bound if check.bound else check.value)
        passed = f"{sum(check.passed for check in checks)} of {len(checks)} checks pass"
        result["gate"] = f"{passed}, nearest its bound: {worst.name} {worst.value:.3g} (≤ {worst.bound:g})"
    if bench is not None:
        run_steps(bench, result, options, vllm, step)
    progress("")
    result["complete"] = True  # the run reached its end, whatever failed
    save(result)
    return result


def run_steps(
    bench: ModelBench, result: Result, options: argparse.Namespace, vllm: dict[Any, dict[str, float]], step: Step
) -> None:
    """Add the figures that `--cases` asks for to the result."""
    if COLD in options.cases:
        with step(COLD):
            result["cold"] = bench.cold_start()
    for case in (case for case in all_cases(bench.config) if case.name in options.cases):
        with step(case.name):
            row = bench.measure(case)
            figures = vllm.get((result["model"], case.patches, bool(case.frames)), {}) if len(case.grid) == 1 else {}
            row["times"] |= {name: {"median": seconds} for name, seconds in figures.items()}
            result["rows"].append(row)
            if figures:  # of calls in a row
                measured = row["times"][OURS], bench.in_a_row(case)
                row["times"][OURS] = max(measured, key=lambda times: times["median"])
            else:
                row["missing"]["vLLM"] = why_no_vllm_figure(result["model"], bool(vllm))
        if case.name in PROFILED and PROFILE in options.cases:
            with step(f"{PROFILE} of {case.name}"):
                result["profiles"][case.name] = bench.profile(case)
    if SIZES in options.cases:
        with step(SIZES):
            result["sizes"] = bench.measure_random_sizes()
    if GRAPHS in options.cases:
        with step(GRAPHS):
            result["graphs"] = bench.graph_costs()


def why_no_vllm_figure(model: str, given: bool) -> str:
    """Return the reason why vLLM has no figure.

    Args:
        model: a key of MODELS.
        given: whether `--vllm` gave any figures.
    """
    if model not in VLLM_MODELS.values():
        return "vLLM's benchmark does not include this model"
    no_figures = f"no figures were given {OMITTED_BY_OPTION}vllm)"
    return "vLLM's benchmark does not include this case" if given else no_figures


def run_in_new_process(model: str, options: argparse.Namespace, script: Path) -> Result:
    """Measure one model in a new process, so that a fatal CUDA error costs this model alone."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "result.json")
        command = [sys.executable, str(script), "--models", model, "--json", str(file)]
        for name, value in vars(options).items():
            if name not in NOT_FORWARDED_OPTIONS and value is not None:
                command += [f"--{name}", *(value if isinstance(value, list) else [str(value)])]
        try:
            ending = f"ended with {subprocess.run(command, stdout=subprocess.DEVNULL, timeout=TIMEOUT).returncode}"
        except subprocess.TimeoutExpired:
            ending = f"was killed after {TIMEOUT} s"
        result = json.loads(file.read_text())[0] if file.exists() else empty_result(model)
    if not result["complete"]:
        result["failed"].append(("its process", ending))
    return result


def case_names() -> list[str]:
    """Return the choices of `--cases`."""
    return [*(case.name for case in all_cases(published_config(next(iter(MODELS.values()))))), *EXTRAS]
