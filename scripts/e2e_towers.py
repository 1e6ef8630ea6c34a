"""The towers of one model with the same weights, ours and others', and what `bench_e2e.py` measures on them."""

import argparse
import copy
import gc
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from compare_hf import check_ends, run_ours, run_theirs
from e2e_cases import MODELS, Case, all_cases, gate_case, pixel_values, random_sizes
from e2e_report import NO_DEEPSTACK, OURS, Row
from e2e_rivals import NAMES, SDPA, TIMM, Call, Outputs, Prepare, eager, timm_tower, transformers_rivals
from hf_towers import build_tower, save_tower
from kernel_timing import held_bytes, kernel_times, take_turns
from torch import Tensor, nn

from qwenvit import Encoder, cost, device_plan, parity
from qwenvit.fast import FastTower
from qwenvit.graphs import Buffers, Graph
from qwenvit.grid import GridPlan
from qwenvit.registry import published_config

DTYPE = torch.bfloat16
CUDA = torch.device("cuda")
RIVALS = 3.0
"""Most that a rival's error may be of transformers' own: the same work, but not held to our standard."""
SECONDS, ROUNDS = 1.0, (4, 40)
"""How long the contenders of a case take turns, and how often at least and at most."""


class Bench:
    """Towers of one model with the same weights, and what is measured on them."""

    def __init__(self, model: str, options: argparse.Namespace) -> None:
        self.model, self.config = model, published_config(MODELS[model])
        self.hf = build_tower(self.config, dtype=DTYPE, device=CUDA)
        self.truth = copy.deepcopy(self.hf).float()
        first = all_cases(self.config)[0]
        pixels = pixel_values(first, self.config, CUDA, DTYPE)
        with tempfile.TemporaryDirectory() as folder:
            source = save_tower(self.hf, self.config, Path(folder))
            start = time.perf_counter()
            self.encoder = Encoder.from_pretrained(source, device=CUDA, dtype=DTYPE, impl="triton")
            self.encoder(pixels, first.grid_thw()).pooler_output.sum().item()
            self.load = time.perf_counter() - start
            exact = Encoder.from_pretrained(source, device=CUDA, dtype=torch.float32, impl="triton")
            self.gate = self.judge(exact)
        weights = sum(parameter.nbytes for parameter in self.encoder.tower.parameters())
        self.padding = weights - cost.parameters(self.config) * DTYPE.itemsize
        self.rivals = transformers_rivals(self.hf, self.config, options.rivals, options.fa3 is not None)
        given = {"fa3": options.fa3, "timm": options.timm}
        self.absent = {NAMES[kind]: f"not given (--{kind})" for kind in options.rivals if not given.get(kind, True)}
        if options.timm and "timm" in options.rivals:
            try:
                self.rivals[TIMM] = timm_tower(options.timm, self.hf, self.config)
                self.rivals[NO_DEEPSTACK] = self.without_deepstack()
            except Exception as error:  # noqa: BLE001 (named with the reason, and the others run)
                self.absent[TIMM] = first_line(error)

    def judge(self, exact: Encoder) -> list[parity.Check]:
        """The whole gate of `compare_hf.py`, on images of awkward sizes and a video."""
        case = gate_case(self.config)
        inputs = pixel_values(case, self.config, CUDA, DTYPE).float(), case.grid_thw()
        true_outputs, true_calls = run_theirs(self.truth, *inputs)
        our_truths, _ = run_ours(exact, *inputs)
        (ours, our_calls), (theirs, their_calls) = run_ours(self.encoder, *inputs), run_theirs(self.hf, *inputs)
        checks = [parity.close(name, a, b) for (name, a), (_, b) in zip(our_truths, true_outputs, strict=True)]
        calls = (self.encoder.tower.blocks, our_calls), (self.hf.blocks, their_calls)
        return checks + parity.blocks_no_worse(*calls, true_calls) + check_ends(ours, theirs, true_outputs)

    def ours(self, case: Case, pixels: Tensor, tower: nn.Module | None = None) -> Call:
        """A new encoder, without graphs, around our tower."""
        encoder, grid = Encoder(tower or self.encoder.tower), case.grid_thw()

        def call() -> Outputs:
            output = encoder(pixels, grid)
            return [output.pooler_output, *output.deepstack_features]

        return call

    def without_deepstack(self) -> Prepare:
        tower = FastTower(replace(self.config, deepstack_visual_indexes=())).to(CUDA, DTYPE)
        tower.load_state_dict(self.encoder.tower.state_dict(), strict=False)
        return lambda case, pixels: self.ours(case, pixels, tower)

    def measure(self, case: Case) -> Row:
        """Check, then time."""
        pixels = pixel_values(case, self.config, CUDA, DTYPE)
        truth = eager(self.truth, "sdpa")(case, pixels.float())()
        reference = eager(self.hf, "sdpa")(case, pixels)()
        row: Row = {"name": case.name, "grid": case.grid, "patches": case.patches, "frames": case.frames}
        row |= {"missing": dict(self.absent), "peak": {}, "errors": {SDPA: errors(reference, truth)}, "first": {}}
        calls: dict[str, Call] = {}
        for name, prepare in {OURS: self.ours, **self.rivals}.items():
            try:
                calls[name], row["peak"][name], row["first"][name], out = set_up(prepare, case, pixels)
                row["errors"][name] = errors(out, truth)
                if name != OURS and (wrong := failures(row["errors"][name], row["errors"][SDPA], RIVALS)):
                    raise ValueError(f"other work: {wrong[0]}")
                del out
            except Exception as error:  # a rival that fails is named with the reason, and others run
                if name == OURS:
                    raise
                row["missing"][name] = first_line(error)
                calls.pop(name, None)
        row["peak"][OURS] += self.padding
        failed = failures(row["errors"][OURS], row["errors"][SDPA]) + [c.name for c in self.gate if not c.passed]
        row |= {"passed": not failed, "failure": "; ".join(failed)}
        row["times"] = {name: quantiles(times) for name, times in take_turns(calls, SECONDS, *ROUNDS).items()}
        row["flops"] = cost.flops(self.config, GridPlan.build(case.grid_thw(), self.config))
        return row

    def sizes(self) -> list[Row]:
        """Random sizes, each beside a graph of its exact shape."""
        found = []
        for case in random_sizes(self.config):
            pixels, grid = pixel_values(case, self.config, CUDA, DTYPE), case.grid_thw()
            calls = {"ours": partial(self.encoder, pixels, grid), "exact": self.exact(grid, pixels)}
            medians = {name: statistics.median(times) for name, times in take_turns(calls, 0.2, *ROUNDS).items()}
            found.append({"name": case.name, "patches": case.patches, **medians})
        return found

    def profile(self, case: Case) -> dict[str, Any]:
        """Where the time of one forward pass goes."""
        call = self.ours(case, pixel_values(case, self.config, CUDA, DTYPE))
        call()
        return kernel_times(call)

    def exact(self, grid: Tensor, pixels: Tensor) -> Callable[[], Any]:
        """A graph with room for this input and no more; the table of the grid is made and copied as ever."""
        tower = self.encoder.tower
        need = device_plan.measure(grid, self.config)
        angles = device_plan.angle_tables(self.config, need.side, CUDA)
        with torch.no_grad():
            graph = Graph(tower, need, angles, Buffers(), torch.cuda.Stream(), torch.cuda.graph_pool_handle())
        return lambda: graph.replay(device_plan.tabulate(grid, self.config, need.items).pin_memory(), pixels)


def set_up(prepare: Prepare, case: Case, pixels: Tensor) -> tuple[Call, int, float, Outputs]:
    """A call, its peak memory with what it keeps, seconds that the first one took, and what it returns."""
    gc.collect()
    torch.cuda.synchronize()
    held, start = held_bytes(), time.perf_counter()
    call = prepare(case, pixels)
    call()
    torch.cuda.synchronize()
    first = time.perf_counter() - start
    kept, before = held_bytes() - held, torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    out = call()
    torch.cuda.synchronize()
    return call, kept + torch.cuda.max_memory_allocated() - before, first, out


def errors(outputs: Outputs, truth: Outputs) -> list[float]:
    """Relative L2 of each output; timm's tower has only the first."""
    return [parity.Difference.of(a, b).relative_l2 for a, b in zip(outputs, truth, strict=False)]


def failures(ours: list[float], theirs: list[float], factor: float = parity.ERROR_FACTOR) -> list[str]:
    """Outputs too far from fp32; rounding that a deep tower amplified beyond meaning is held to a wider bound."""
    return [
        f"output {i}: error {a:.2e}, transformers' {b:.2e}"
        for i, (a, b) in enumerate(zip(ours, theirs, strict=False))
        if not a <= b * (factor if b <= parity.MEANINGFUL_ERROR else max(factor, RIVALS))
    ]


def first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')[:160]}"


def quantiles(times: list[float]) -> dict[str, float]:
    """Median, 10th and 90th percentile, and how many."""
    tenths = statistics.quantiles(times, n=10, method="inclusive")
    return {"median": statistics.median(times), "p10": tenths[0], "p90": tenths[8], "rounds": len(times)}
