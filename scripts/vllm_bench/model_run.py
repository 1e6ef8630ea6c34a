"""Measure one model for `bench_vllm.py`, step by step: its engines start together and are measured in turn."""

import argparse
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch

from common.progress import progress
from common.steps import Step, steps_of
from common.tower_inputs import Case
from e2e.model_bench import quantiles
from vllm_bench.cases import (
    CROWD,
    CROWD_CASE,
    CROWD_SIDE,
    MODELS,
    MODES,
    OFF,
    PARTS,
    PROMPTS,
    REQUEST,
    REQUESTS,
    TOWER,
    Shape,
    tower_cases,
)
from vllm_bench.checkpoint import write_checkpoint
from vllm_bench.engine_options import engine_options, environment
from vllm_bench.engines import Engine, Engines
from vllm_bench.parity import agreement, plugin_failure, tower_failures
from vllm_bench.prompts import Asked
from vllm_bench.truth import Truth

Result = dict[str, Any]
"""All figures of one model, as `--json` writes them."""

FEW_LAYERS = 4
"""Text layers of engines whose tower alone is measured: more only take memory, and time to start."""
WARM_CALLS, CALLS = 3, 6
"""Untimed and timed calls of the tower, by each engine in turn."""
FIRST_REQUESTS, WARM_REQUESTS, TIMED_REQUESTS, STAGED_REQUESTS = 3, 1, 5, 4
"""Requests of each engine in turn: the untimed of its first turn, in which CUDA graphs may be captured, and of later
ones, which follow a pause; the timed; those whose stages are timed."""
CROWD_ROUNDS = 2
PROMPT_ROUNDS = 8
ANSWER_SECONDS = 90.0
"""Seconds within which an engine has to do what one message asks."""


def in_turn(names: Iterable[str], number: int) -> list[str]:
    """Return the names in their order in even rounds, and backwards in odd ones."""
    return list(names)[:: -1 if number % 2 else 1]


def empty_result(model: str, options: argparse.Namespace) -> Result:
    return {"model": model, "machine": "", "text_layers": options.text_layers[model], "tiny": options.tiny,
            "engines": {}, "tower": [], "requests": [], "crowd": None, "agreement": None, "failed": [], "logs": {},
            "seconds": {}}  # fmt: skip


def run_model(
    model: str, options: argparse.Namespace, machine: str, deadline: float, save: Callable[[Result], None]
) -> Result:
    """Measure everything about one model. A step or an engine that fails is listed, and the others go on.

    Args:
        model: a key of MODELS.
        options: the command's options.
        machine: what the figures were measured on.
        deadline: when all has to be done, by `time.monotonic`.
        save: called with all figures so far, after each step.
    """
    result = empty_result(model, options) | {"machine": machine}
    step, engines = steps_of(result, save), Engines(result, deadline)
    shape = Shape(model, options.text_layers[model], options.tiny)
    run = ModelRun(shape, options, engines, options.work / MODELS[model])
    try:
        with step("engines"):
            run.start_engines()
        if engines.running:
            with step("fp32 tower"):
                run.write_truth()
            with step("waiting"):
                engines.wait(options.start_seconds)
                run.check_plugins(result)
            run.steps(result, step)
    finally:
        engines.stop()
        progress("")
    save(result)
    return result


class ModelRun:
    """One model's engines and files, and the steps of its measurement.

    Args:
        shape: the model's sizes.
        options: the command's options.
        engines: where the engines are started.
        folder: for checkpoints, inputs, outputs and logs.
    """

    def __init__(self, shape: Shape, options: argparse.Namespace, engines: Engines, folder: Path) -> None:
        self.shape, self.options, self.engines, self.folder = shape, options, engines, folder
        self.device = "cpu" if shape.tiny else "cuda"
        self.prompts: list[Asked] = [
            (tuple(map(shape.side, sides)), 100 + number)
            for number, sides in enumerate(PROMPTS * (1 if shape.tiny else PROMPT_ROUNDS))
        ]
        self.checkpoints: dict[Shape, Path] = {}
        self.truths: list[torch.Tensor] = []
        self.next_seed = 1000
        folder.mkdir(parents=True, exist_ok=True)

    def parts_of(self, name: str) -> list[str]:
        """Return what an engine is measured for."""
        return [part for part in PARTS if part in self.options.parts and part in MODES[name].parts]

    def with_part(self, part: str) -> list[str]:
        """Return the running engines that are measured for a part."""
        return [name for name in self.engines.running if part in self.parts_of(name)]

    def start_engines(self) -> None:
        """Write the checkpoints, then start an engine for each chosen mode."""
        few = Shape(self.shape.model, min(FEW_LAYERS, self.shape.text_layers), self.shape.tiny)
        for name in (name for name in self.options.modes if self.parts_of(name)):
            parts = self.parts_of(name)
            shape = self.shape if REQUEST in parts else few
            checkpoint = self.checkpoint_of(shape)
            mode, cases = MODES[name], self.options.cases
            arguments = engine_options(mode, shape, checkpoint, parts, cases, self.options.llm)
            variables = environment(mode, shape, self.folder / name)
            self.engines.start(Engine(name, arguments, variables, self.folder / f"{name}.log"))

    def checkpoint_of(self, shape: Shape) -> Path:
        """Return the model's folder; written once, since engines may be reading it."""
        if shape not in self.checkpoints:
            self.checkpoints[shape] = write_checkpoint(shape, self.folder / f"layers_{shape.text_layers}")
        return self.checkpoints[shape]

    def write_truth(self) -> None:
        """Write inputs and the fp32 tower's outputs, while the engines start."""
        truth = Truth(self.shape, self.device)
        if TOWER in self.options.parts:
            for case in tower_cases(self.shape, self.options.cases):
                truth.write_case(case, self.case_file(case))
        if REQUEST in self.options.parts:
            checkpoint = self.checkpoint_of(self.shape)
            self.truths = truth.write_requests(self.prompts, checkpoint, self.folder / "embeddings.pt")

    def case_file(self, case: Case) -> Path:
        return self.folder / f"{case.patches}_{case.frames}_{len(case.grid)}.pt"

    def check_plugins(self, result: Result) -> None:
        """Stop every engine whose tower is not the one that its mode asks for."""
        for name in list(self.engines.running):
            if why := plugin_failure(MODES[name], result["engines"][name]):
                self.engines.note(name, "start", why)
                self.engines.drop(name)

    def steps(self, result: Result, step: Step) -> None:
        """Add the figures that the options ask for."""
        if TOWER in self.options.parts:
            for case in tower_cases(self.shape, self.options.cases):
                with step(f"tower, {case.name}"):
                    self.tower(case, result)
        if REQUEST in self.options.parts:
            self.request_steps(result, step)
        with step("graphs"):
            for name in [name for name in self.engines.running if MODES[name].best_settings]:
                found = self.engines.ask(name, "graphs", ANSWER_SECONDS)
                result["engines"][name]["graphs"] = found
                in_graphs = found and found["hits"] and not found["misses"]
                if name in self.engines.running and not in_graphs and not self.shape.tiny:
                    self.engines.note(name, "graphs", f"expected every image in one of vLLM's CUDA graphs, got {found}")

    def request_steps(self, result: Result, step: Step) -> None:
        """Add the figures of whole requests."""
        with step("log-probabilities"):
            result["agreement"] = self.agreement()
        for name in (name for name in REQUESTS if name in self.options.cases):
            with step(f"requests, {name}"):
                self.requests(name, result)
        if CROWD_CASE in self.options.cases:
            with step(CROWD_CASE):
                self.crowd(result)

    def tower(self, case: Case, result: Result) -> None:
        """Compare the towers with fp32, then time them."""
        names, path = self.with_part(TOWER), str(self.case_file(case))
        errors = self.engines.ask_each(names, "worker", ANSWER_SECONDS, call="bench_tower_errors", path=path)
        seconds: dict[str, list[float]] = {}
        for number in range(self.options.rounds):
            calls = {"warm_calls": WARM_CALLS, "calls": CALLS}
            asked = {"call": "bench_tower_times", "path": path, **calls}
            self.collect(seconds, self.engines.ask_each(in_turn(errors, number), "worker", ANSWER_SECONDS, **asked))
        row = {"name": case.name, "patches": case.patches, "frames": case.frames, "errors": errors}
        result["tower"].append(row | {"failures": tower_failures(errors), "times": all_quantiles(seconds)})

    def agreement(self) -> dict[str, Any]:
        """Compare log-probabilities and embeddings of requests with those of the fp32 tower's embeddings."""
        names = self.with_part(REQUEST)
        kept = {name: self.folder / f"kept_{name}.pt" for name in names}
        found = {
            name: self.engines.ask(name, "log_probabilities", ANSWER_SECONDS, asked=self.prompts, kept=str(kept[name]))
            for name in names
        }
        found = {name: answer for name, answer in found.items() if answer is not None}
        images = [len(sides) for sides, _ in self.prompts]
        path = str(self.folder / "embeddings.pt")
        truth = self.engines.ask(OFF, "log_probabilities_of_embeddings", ANSWER_SECONDS, path=path, images=images)
        return agreement(found, truth, {name: torch.load(kept[name]) for name in found}, self.truths)

    def requests(self, name: str, result: Result) -> None:
        """Time requests of one case until their first token, then their stages."""
        sides, names = self.shape.sides(name), self.with_part(REQUEST)
        seconds: dict[str, list[float]] = {}
        for number in range(self.options.rounds):
            warm = WARM_REQUESTS if number else FIRST_REQUESTS
            ask = {"asked": self.new_requests(sides, warm + TIMED_REQUESTS), "warm": warm}
            turn = in_turn(names, number)
            self.collect(seconds, self.engines.ask_each(turn, "first_token_times", ANSWER_SECONDS, **ask))
        asked = self.new_requests(sides, WARM_REQUESTS + STAGED_REQUESTS)
        stages = self.engines.ask_each(names, "stage_times", ANSWER_SECONDS, asked=asked, warm=WARM_REQUESTS)
        row: dict[str, Any] = {"name": name, "tokens": sum(map(self.shape.tokens, REQUESTS[name]))}
        row |= {"times": all_quantiles(seconds), "stages": {}}
        for mode, each in stages.items():
            measured = dict.fromkeys(stage for one in each for stage in one)
            row["stages"][mode] = {s: quantiles([one.get(s, 0.0) for one in each]) for s in measured}
        result["requests"].append(row)

    def crowd(self, result: Result) -> None:
        """Time many requests that are sent at once."""
        count = 4 if self.shape.tiny else CROWD
        side, names = self.shape.side(CROWD_SIDE), self.with_part(REQUEST)
        seconds: dict[str, list[float]] = {}
        for number in range(1 + CROWD_ROUNDS):
            asked = self.new_requests((side,), count)
            answers = self.engines.ask_each(in_turn(names, number), "crowd_time", ANSWER_SECONDS, asked=asked)
            if number:  # the first is not timed
                self.collect(seconds, {name: [each] for name, each in answers.items()})
        result["crowd"] = {"name": CROWD_CASE, "images": count, "times": all_quantiles(seconds)}

    def new_requests(self, sides: tuple[int, ...], count: int) -> list[Asked]:
        """Return requests that no engine has seen."""
        self.next_seed += count
        return [(sides, self.next_seed - index) for index in range(count)]

    @staticmethod
    def collect(seconds: dict[str, list[float]], more: dict[str, Iterable[float]]) -> None:
        for name, times in more.items():
            seconds.setdefault(name, []).extend(times)


def all_quantiles(seconds: dict[str, list[float]]) -> dict[str, dict[str, float]]:
    """Return the quantiles of each mode's seconds; a single one, of an engine that failed then, has none."""
    return {name: quantiles(times) for name, times in seconds.items() if len(times) > 1}
