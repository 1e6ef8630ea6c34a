"""The towers of one model with the same weights, ours and others', and what `bench_e2e.py` measures on them."""

import argparse
import copy
import gc
import statistics
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from common.hf_towers import build_tower, save_tower
from compare.runs import check_ends, run_ours, run_theirs
from e2e.cases import MODELS, Case, gate_case, pixel_values, random_sizes
from e2e.cold import cold_start
from e2e.graphs import afresh, exact, graph_costs, rounding_by
from e2e.timing import kernel_times, memory_of, replay_time, take_turns
from e2e.verdicts import LEFT_OUT, NO_DEEPSTACK, OURS, Row
from peers.timm_tower import timm_tower
from peers.towers import NAMES, SDPA, TIMM, Call, Outputs, Prepare, eager, transformers_rivals
from qwenvit import Encoder, parity
from qwenvit.config.published import published_config
from qwenvit.graphs.capacity import capacity_for
from qwenvit.plan.grid_plan import GridPlan
from qwenvit.towers import cost
from qwenvit.towers.fast import FastTower

DTYPE = torch.bfloat16
CUDA = torch.device("cuda")
RIVALS = 3.0
"""Most that a rival's error may be of transformers' own: the same work, but not held to our standard."""
ROUNDS, SHARE, FEWEST = 16, 0.4, 5
"""Turns of each contender of a case; of a rival that would take longer than so many seconds, fewer, but five."""


class Bench:
    """Towers of one model with the same weights, and what is measured on them. It keeps no CUDA graph between."""

    def __init__(self, model: str, options: argparse.Namespace) -> None:
        self.model, self.config = model, published_config(MODELS[model])
        self.hf = build_tower(self.config, dtype=DTYPE, device=CUDA)
        self.truth = copy.deepcopy(self.hf).float()
        self.folder = tempfile.TemporaryDirectory()
        source = save_tower(self.hf, self.config, Path(self.folder.name))
        self.tower = Encoder.from_pretrained(source, device=CUDA, dtype=DTYPE, impl="triton").tower
        self.gate = self.judge(Encoder.from_pretrained(source, device=CUDA, dtype=torch.float32, impl="triton"))
        weights = sum(parameter.nbytes for parameter in self.tower.parameters())
        self.padding = weights - cost.parameters(self.config) * DTYPE.itemsize
        self.rivals = transformers_rivals(self.hf, self.config, options.rivals, options.fa3 is not None)
        given = {"fa3": options.fa3, "timm": options.timm}
        self.absent = {
            NAMES[kind]: f"not given {LEFT_OUT}{kind})" for kind in options.rivals if not given.get(kind, True)
        }
        unasked = f"not asked for {LEFT_OUT}rivals)"
        self.absent |= {name: unasked for kind, name in NAMES.items() if kind not in options.rivals}
        if options.timm and "timm" in options.rivals:
            try:
                self.rivals[TIMM] = timm_tower(options.timm, self.hf, self.config)
                self.rivals[NO_DEEPSTACK] = self.without_deepstack()
            except Exception as error:  # noqa: BLE001 (named with the reason, and the others run)
                self.absent[TIMM] = first_line(error)

    def cold(self) -> dict[str, Any]:
        """Load to first embedding in a process of its own."""
        return cold_start(Path(self.folder.name))

    def judge(self, exact: Encoder) -> list[parity.Check]:
        """The whole gate of `compare_hf.py`, on images of awkward sizes and a video."""
        case = gate_case(self.config)
        inputs = pixel_values(case, self.config, CUDA, DTYPE).float(), case.grid_thw()
        true_outputs, true_calls = run_theirs(self.truth, *inputs)
        our_truths, _ = run_ours(exact, *inputs)
        (ours, our_calls), (theirs, their_calls) = run_ours(afresh(self.tower), *inputs), run_theirs(self.hf, *inputs)
        checks = [parity.close(name, a, b) for (name, a), (_, b) in zip(our_truths, true_outputs, strict=True)]
        calls = (self.tower.blocks, our_calls), (self.hf.blocks, their_calls)
        return checks + parity.blocks_no_worse(*calls, true_calls) + check_ends(ours, theirs, true_outputs)

    def ours(self, case: Case, pixels: Tensor, tower: FastTower | None = None) -> Call:
        """A new encoder, without graphs, around our tower."""
        encoder, grid = afresh(tower or self.tower), case.grid_thw()

        def call() -> Outputs:
            output = encoder(pixels, grid)
            return [output.pooler_output, *output.deepstack_features]

        return call

    def without_deepstack(self) -> Prepare:
        tower = FastTower(replace(self.config, deepstack_visual_indexes=())).to(CUDA, DTYPE)
        tower.load_state_dict(self.tower.state_dict(), strict=False)
        return lambda case, pixels: self.ours(case, pixels, tower)

    def measure(self, case: Case) -> Row:
        """Check, then time."""
        pixels = pixel_values(case, self.config, CUDA, DTYPE)
        truth = eager(self.truth, "sdpa")(case, pixels.float())()
        theirs, reference = memory_of(lambda: eager(self.hf, "sdpa")(case, pixels))
        peak, _ = memory_of(lambda: self.ours(case, pixels))
        gc.collect()
        row: Row = {"name": case.name, "grid": case.grid, "patches": case.patches, "frames": case.frames}
        row |= {"missing": dict(self.absent), "errors": {SDPA: errors(reference, truth)}}
        row["peak"] = {OURS: peak + self.padding, SDPA: theirs}
        calls: dict[str, Call] = {}
        for name, prepare in {OURS: self.ours, **self.rivals}.items():
            try:
                call = prepare(case, pixels)
                call()
                row["errors"][name] = errors(call(), truth)
                if name != OURS and (wrong := failures(row["errors"][name], row["errors"][SDPA], RIVALS)):
                    raise ValueError(f"other work: {wrong[0]}")
                calls[name] = call
            except Exception as error:  # a rival that fails is named with the reason, and others run
                if name == OURS:
                    raise
                row["missing"][name] = first_line(error)
        failed = failures(row["errors"][OURS], row["errors"][SDPA]) + [c.name for c in self.gate if not c.passed]
        row |= {"passed": not failed, "failure": "; ".join(failed)}
        turns = take_turns(calls, ROUNDS, SHARE, FEWEST, always={OURS})
        row["times"] = {name: quantiles(times) for name, times in turns.items()}
        row["flops"] = cost.flops(self.config, GridPlan.build(case.grid_thw(), self.config))
        return row

    def sizes(self) -> list[Row]:
        """Random sizes by an encoder that meets one after another, each beside one of its exact capacity."""
        found, encoder = [], afresh(self.tower)
        for case in random_sizes(self.config):
            pixels, grid = pixel_values(case, self.config, CUDA, DTYPE), case.grid_thw()
            ours = rounding_by(capacity_for, encoder, pixels, grid)
            calls = {"ours": ours, "exact": rounding_by(exact, afresh(self.tower), pixels, grid)}
            medians = {name: statistics.median(times) for name, times in take_turns(calls, ROUNDS, 1, ROUNDS).items()}
            found.append({"name": case.name, "patches": case.patches, **medians})
        return found

    def profile(self, case: Case) -> dict[str, Any]:
        """Where the time of one forward pass goes."""
        call = self.ours(case, pixel_values(case, self.config, CUDA, DTYPE))
        call()
        return {"replay": replay_time(call), **kernel_times(call)}

    def graphs(self) -> dict[str, Any]:
        """What captures cost."""
        return graph_costs(self.tower, DTYPE)


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
