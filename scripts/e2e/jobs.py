"""One model of `bench_e2e.py`: part by part, figures kept as they come; and the same in a process of its own."""

import argparse
import contextlib
import gc
import json
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch

from common.jobs import progress
from common.machine import Ceilings, machine
from e2e.cases import MODELS, all_cases
from e2e.towers import Bench, first_line
from e2e.verdicts import LEFT_OUT, Result
from peers.vllm_figures import VLLM_MODELS, read_vllm
from qwenvit.config.published import published_config

SIZES, PROFILE, GRAPHS, COLD = "random sizes", "profile", "graphs", "cold process"
EXTRAS = (SIZES, PROFILE, GRAPHS, COLD)
PROFILED = ("448²", "896²", "1344²")
Part = Callable[[str], AbstractContextManager[None]]
LIMIT = 900
"""Seconds after which the process of a model is ended."""
SAID = ("models", "json", "read", "chart", "readme")
"""Options that a model's own process is not given, or is given others of."""


def blank(model: str) -> Result:
    """Nothing measured yet."""
    return {"model": model, "machine": "", "ceilings": "", "gemm": 0.0, "gate": "", "rows": [], "sizes": [],
            "profiles": {}, "graphs": None, "cold": None, "failed": [], "seconds": {}, "complete": False}  # fmt: skip


def run_model(model: str, options: argparse.Namespace, limits: Ceilings, keep: Callable[[Result], None]) -> Result:
    """Everything about one model; what fails is named, and the rest is measured. `keep` is given all so far."""
    host, _, measured = machine(limits, options.commit).partition("\n\n")
    result = blank(model) | {"machine": host, "ceilings": measured, "gemm": limits.gemm}

    @contextlib.contextmanager
    def part(name: str) -> Iterator[None]:
        progress(f"{model}: {name}")
        start = time.perf_counter()
        try:
            yield
        except Exception as error:  # noqa: BLE001 (one failure is reported, and the rest is measured)
            progress("")
            traceback.print_exc()
            result["failed"].append((name, first_line(error)))
        result["seconds"][name] = round(time.perf_counter() - start, 1)
        keep(result)
        gc.collect()
        with contextlib.suppress(RuntimeError):  # once a CUDA error has happened, this fails as well
            torch.cuda.empty_cache()

    bench: Bench | None = None
    vllm = read_vllm(options.vllm) if options.vllm else {}
    with part("weights and parity"):
        bench = Bench(model, options)
        worst = max(bench.gate, key=lambda check: check.value / check.bound if check.bound else check.value)
        passed = f"{sum(check.passed for check in bench.gate)} of {len(bench.gate)} checks pass"
        result["gate"] = f"{passed}, nearest its bound: {worst.name} {worst.value:.3g} (≤ {worst.bound:g})"
    if bench is not None:
        run_parts(bench, result, options, vllm, part)
    progress("")
    result["complete"] = True  # it came to its end, whatever failed
    keep(result)
    return result


def run_parts(
    bench: Bench, result: Result, options: argparse.Namespace, vllm: dict[Any, dict[str, float]], part: Part
) -> None:
    """What was asked for, into the result."""
    if COLD in options.cases:
        with part(COLD):
            result["cold"] = bench.cold()
    for case in (case for case in all_cases(bench.config) if case.name in options.cases):
        with part(case.name):
            row = bench.measure(case)
            own = vllm.get((result["model"], case.patches, bool(case.frames)), {}) if len(case.grid) == 1 else {}
            row["times"] |= {name: {"median": seconds} for name, seconds in own.items()}
            if not own:
                row["missing"]["vLLM"] = without_vllm(result["model"], bool(vllm))
            result["rows"].append(row)
        if case.name in PROFILED and PROFILE in options.cases:
            with part(f"{PROFILE} of {case.name}"):
                result["profiles"][case.name] = bench.profile(case)
    if SIZES in options.cases:
        with part(SIZES):
            result["sizes"] = bench.sizes()
    if GRAPHS in options.cases:
        with part(GRAPHS):
            result["graphs"] = bench.graphs()


def without_vllm(model: str, given: bool) -> str:
    """Why there is no figure of vLLM's."""
    if model not in VLLM_MODELS.values():
        return "its own bench has not this model"
    return "its own bench has not this case" if given else f"no figures were given {LEFT_OUT}vllm)"


def run_apart(model: str, options: argparse.Namespace, script: Path) -> Result:
    """The same in a new process: a CUDA error that no call survives costs this model alone."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "result.json")
        command = [sys.executable, str(script), "--models", model, "--json", str(file)]
        for name, value in vars(options).items():
            if name not in SAID and value is not None:
                command += [f"--{name}", *(value if isinstance(value, list) else [str(value)])]
        try:
            ended = f"ended with {subprocess.run(command, stdout=subprocess.DEVNULL, timeout=LIMIT).returncode}"
        except subprocess.TimeoutExpired:
            ended = f"was ended after {LIMIT} s"
        result = json.loads(file.read_text())[0] if file.exists() else blank(model)
    if not result["complete"]:
        result["failed"].append(("its process", ended))
    return result


def case_names() -> list[str]:
    """What `--cases` chooses from."""
    return [*(case.name for case in all_cases(published_config(next(iter(MODELS.values()))))), *EXTRAS]
