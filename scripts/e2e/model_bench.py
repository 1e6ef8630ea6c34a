"""The towers of one model with the same weights, qwenvit's and its rivals', and the measurements of `bench_e2e.py`."""

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

from common.encoders import fresh_encoder
from common.hf_towers import build_tower, save_tower
from common.steps import first_line
from common.tower_inputs import Case, Outputs, PrepareCall, TowerCall, pixel_values
from compare.checks import fp32_checks, low_precision_checks
from compare.runs import run_qwenvit, run_transformers
from e2e.cases import MODELS, parity_case, random_sizes
from e2e.cold import cold_start
from e2e.graphs import call_with_capacity, exact_capacity, graph_costs
from e2e.timing import kernel_times, peak_memory, replay_time, time_in_a_row, time_interleaved
from e2e.verdicts import NO_DEEPSTACK, OMITTED_BY_OPTION, OURS, Row
from peers.rivals import RIVAL_NAMES, SDPA, TIMM
from peers.timm_tower import timm_tower
from peers.transformers_towers import eager, transformers_rivals
from qwenvit import Encoder, parity
from qwenvit.config.published import published_config
from qwenvit.graphs.capacity import capacity_for
from qwenvit.plan.grid_plan import GridPlan
from qwenvit.towers import cost
from qwenvit.towers.fast import FastTower

DTYPE = torch.bfloat16
CUDA = torch.device("cuda")
RIVAL_ERROR_FACTOR = 3.0
"""Largest error of a rival over transformers': enough to show that it does the same work. Ours has to be closer."""
ROUNDS, MAX_SECONDS, MIN_ROUNDS = 16, 0.4, 5
"""Timed rounds of a case. A rival that would take longer than MAX_SECONDS in all skips rounds, down to MIN_ROUNDS."""


class ModelBench:
    """Towers of one model with the same weights, and what is measured on them.

    No CUDA graph stays alive between measurements.
    """

    def __init__(self, model: str, options: argparse.Namespace) -> None:
        self.model, self.config = model, published_config(MODELS[model])
        self.hf = build_tower(self.config, dtype=DTYPE, device=CUDA)
        self.truth = copy.deepcopy(self.hf).float()
        self.folder = tempfile.TemporaryDirectory()
        source = save_tower(self.hf, self.config, Path(self.folder.name))
        self.tower = Encoder.from_pretrained(source, device=CUDA, dtype=DTYPE, impl="triton").tower
        fp32_encoder = Encoder.from_pretrained(source, device=CUDA, dtype=torch.float32, impl="triton")
        self.parity_checks = self.check_parity(fp32_encoder)
        weight_bytes = sum(parameter.nbytes for parameter in self.tower.parameters())
        self.padding_bytes = weight_bytes - cost.parameters(self.config) * DTYPE.itemsize
        given = {"fa3": options.fa3, "fa4": options.fa4, "timm": options.timm}
        loaded = [kind for kind in ("fa3", "fa4") if given[kind]]
        self.rivals = transformers_rivals(self.hf, self.config, options.rivals, loaded)
        self.missing = {
            RIVAL_NAMES[kind]: f"not given {OMITTED_BY_OPTION}{kind})"
            for kind in options.rivals
            if not given.get(kind, True)
        }
        not_asked = f"not asked for {OMITTED_BY_OPTION}rivals)"
        self.missing |= {name: not_asked for kind, name in RIVAL_NAMES.items() if kind not in options.rivals}
        if options.timm and "timm" in options.rivals:
            try:
                self.rivals[TIMM] = timm_tower(options.timm, self.hf, self.config)
                self.rivals[NO_DEEPSTACK] = self.without_deepstack()
            except Exception as error:  # noqa: BLE001 (the report names the reason, and the other rivals run)
                self.missing[TIMM] = first_line(error)

    def cold_start(self) -> dict[str, Any]:
        """Time from load to first embedding in a new process."""
        return cold_start(Path(self.folder.name))

    def check_parity(self, fp32_encoder: Encoder) -> list[parity.Check]:
        """Return the checks of `compare_hf.py` on images of awkward sizes and a video."""
        case = parity_case(self.config)
        inputs = pixel_values(case, self.config, CUDA, DTYPE).float(), case.grid_thw()
        truth = run_transformers(self.truth, *inputs)
        our_fp32 = run_qwenvit(fp32_encoder, *inputs)
        ours = run_qwenvit(fresh_encoder(self.tower), *inputs)
        theirs = run_transformers(self.hf, *inputs)
        return fp32_checks(our_fp32, truth) + low_precision_checks(ours, theirs, truth)

    def prepare_qwenvit(self, case: Case, pixels: Tensor, tower: FastTower | None = None) -> TowerCall:
        """Return the call of a new encoder, without graphs, around `tower` (default: qwenvit's tower)."""
        encoder, grid = fresh_encoder(tower or self.tower), case.grid_thw()

        def call() -> Outputs:
            output = encoder(pixels, grid)
            return [output.pooler_output, *output.deepstack_features]

        return call

    def without_deepstack(self) -> PrepareCall:
        tower = FastTower(replace(self.config, deepstack_visual_indexes=())).to(CUDA, DTYPE)
        tower.load_state_dict(self.tower.state_dict(), strict=False)
        return lambda case, pixels: self.prepare_qwenvit(case, pixels, tower)

    def measure(self, case: Case) -> Row:
        """Compare the outputs of all contenders with the fp32 truth, then time those that pass.

        A rival that fails is listed under `missing` with the reason; a failure of qwenvit is raised.
        """
        pixels = pixel_values(case, self.config, CUDA, DTYPE)
        truth = eager(self.truth, "sdpa")(case, pixels.float())()
        their_peak, their_outputs = peak_memory(lambda: eager(self.hf, "sdpa")(case, pixels))
        our_peak, _ = peak_memory(lambda: self.prepare_qwenvit(case, pixels))
        gc.collect()
        row: Row = {"name": case.name, "grid": case.grid, "patches": case.patches, "frames": case.frames}
        row |= {"missing": dict(self.missing), "errors": {SDPA: relative_errors(their_outputs, truth)}}
        row["peak"] = {OURS: our_peak + self.padding_bytes, SDPA: their_peak}
        calls: dict[str, TowerCall] = {}
        for name, prepare in {OURS: self.prepare_qwenvit, **self.rivals}.items():
            try:
                call = prepare(case, pixels)
                call()
                row["errors"][name] = relative_errors(call(), truth)
                wrong = wrong_outputs(row["errors"][name], row["errors"][SDPA], RIVAL_ERROR_FACTOR)
                if name != OURS and wrong:
                    raise ValueError(f"other work: {wrong[0]}")
                calls[name] = call
            except Exception as error:
                if name == OURS:
                    raise
                row["missing"][name] = first_line(error)
        failed = wrong_outputs(row["errors"][OURS], row["errors"][SDPA])
        failed += [check.name for check in self.parity_checks if not check.passed]
        row |= {"passed": not failed, "failure": "; ".join(failed)}
        seconds = time_interleaved(calls, ROUNDS, MAX_SECONDS, MIN_ROUNDS, every_round={OURS})
        row["times"] = {name: quantiles(times) for name, times in seconds.items()}
        row["flops"] = cost.flops(self.config, GridPlan.build(case.grid_thw(), self.config))
        return row

    def in_a_row(self, case: Case) -> dict[str, float]:
        """Time calls of qwenvit with no rival between them, which the figures say of themselves (`in_a_row`)."""
        call = self.prepare_qwenvit(case, pixel_values(case, self.config, CUDA, DTYPE))
        return quantiles(time_in_a_row(call)) | {"in_a_row": True}

    def measure_random_sizes(self) -> list[Row]:
        """Time random sizes on one encoder, each against an encoder whose graph has exactly its shape."""
        found, encoder = [], fresh_encoder(self.tower)
        for case in random_sizes(self.config):
            inputs = pixel_values(case, self.config, CUDA, DTYPE), case.grid_thw()
            ours = call_with_capacity(capacity_for, encoder, *inputs)
            calls = {"ours": ours, "exact": call_with_capacity(exact_capacity, fresh_encoder(self.tower), *inputs)}
            seconds = time_interleaved(calls, ROUNDS, max_seconds=1, min_rounds=ROUNDS)
            medians = {name: statistics.median(times) for name, times in seconds.items()}
            found.append({"name": case.name, "patches": case.patches, **medians})
        return found

    def profile(self, case: Case) -> dict[str, Any]:
        """Return the time of one graph replay and of each kernel in it."""
        call = self.prepare_qwenvit(case, pixel_values(case, self.config, CUDA, DTYPE))
        call()
        return {"replay": replay_time(call), **kernel_times(call)}

    def graph_costs(self) -> dict[str, Any]:
        """Return what captures cost."""
        return graph_costs(self.tower, DTYPE)


def relative_errors(outputs: Outputs, truth: Outputs) -> list[float]:
    """Return the relative L2 error of each output; of the first alone for timm's tower, which has no others."""
    return [parity.Difference.of(a, b).relative_l2 for a, b in zip(outputs, truth, strict=False)]


def wrong_outputs(ours: list[float], theirs: list[float], factor: float = parity.ERROR_FACTOR) -> list[str]:
    """Describe the outputs whose error is above `factor` times transformers'.

    Where transformers' own error is beyond meaning, a deep tower has amplified rounding, and the factor is at least
    RIVAL_ERROR_FACTOR.
    """
    return [
        f"output {i}: error {a:.2e}, transformers' {b:.2e}"
        for i, (a, b) in enumerate(zip(ours, theirs, strict=False))
        if not a <= b * (factor if b <= parity.MEANINGFUL_ERROR else max(factor, RIVAL_ERROR_FACTOR))
    ]


def quantiles(times: list[float]) -> dict[str, float]:
    """Return the median, the 10th and 90th percentile, and the number of times."""
    tenths = statistics.quantiles(times, n=10, method="inclusive")
    return {"median": statistics.median(times), "p10": tenths[0], "p90": tenths[8], "rounds": len(times)}
