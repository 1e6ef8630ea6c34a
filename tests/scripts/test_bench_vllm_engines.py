"""Processes and steps of `scripts/bench_vllm.py`, with a stand-in for vLLM: what fails costs none of the rest."""

import argparse
import os
import signal
import time
from pathlib import Path

import pytest
import torch

from common.steps import steps_of
from vllm_bench import engines, model_run
from vllm_bench.cases import BEST, CASES, CROWD_CASE, MODES, OFF, PARTS, PIXELS, PLUGIN, REQUEST, TOWER, Shape
from vllm_bench.engine_options import SCRIPTS
from vllm_bench.engines import Engine, EngineError, Engines
from vllm_bench.model_run import ModelRun, run_model
from vllm_bench.stages import STAGES, WHOLE

QWEN2_5 = "Qwen2.5-VL-7B"
VLLM = """
import os, subprocess, sys, time
from types import SimpleNamespace
from vllm.multimodal.processing import Processor

class LLM:
    def __init__(self, **options):
        print("] qwenvit: tower mode", "options", sorted(options), flush=True)
        self.options, self.processor = options, Processor()
        self.calls = []
        if "refuse" in options:
            raise ValueError("it cannot\\nbe done")
        if "die" in options:
            os._exit(7)
        if "child" in options:
            subprocess.Popen(["sleep", "300"], stdout=open(options["child"], "w"))
        time.sleep(options.get("sleep", 0))

    def collective_rpc(self, method, kwargs):
        self.calls.append((method, kwargs))
        if method == "bench_model":
            return [{"vllm": "0", "tower": "vllm.Tower", "tower_packages": ["vllm"]}]
        if method == "fail":
            raise RuntimeError("as asked")
        if method == "die":
            os._exit(9)
        if method == "hang":
            time.sleep(60)
        if method == "calls":
            return [[call for call, _ in self.calls]]
        if method == "bench_take_times":
            return [{"tower": 0.25}]
        return [{"count": 1, "bytes": False}]

    def generate(self, requests, sampling, use_tqdm):
        assert sampling.max_tokens == 1 and not use_tqdm
        for request in requests:
            self.processor.apply(request)
        first = {7: SimpleNamespace(logprob=-0.5), 8: SimpleNamespace(logprob=-1.5)}
        return [SimpleNamespace(outputs=[SimpleNamespace(logprobs=[first])]) for _ in requests]

class SamplingParams(SimpleNamespace):
    pass
"""
PROCESSING = """
import time

class BaseMultiModalProcessor:
    def apply(self, request):
        time.sleep(0.02)

class Processor(BaseMultiModalProcessor):
    def apply(self, request):
        return super().apply(request)
"""
STAND_IN = {"vllm/__init__.py": VLLM, "vllm/multimodal/__init__.py": "", "vllm/multimodal/processing.py": PROCESSING}


@pytest.fixture
def start(tmp_path):
    """Return a function that starts an engine of the stand-in."""
    for name, text in STAND_IN.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    started = []

    def run(name="off", **options):
        variables = os.environ | {"PYTHONPATH": f"{tmp_path}:{SCRIPTS}:{SCRIPTS.parent}"}
        started.append(Engine(name, options, variables, tmp_path / f"{name}.log"))
        return started[-1]

    yield run
    for engine in started:
        if not engine.stopped:
            engine.stop()


def soon(seconds=60.0):
    return time.monotonic() + seconds


def test_an_engine_answers(start):
    engine = start()
    assert engine.answer(soon())["vllm"] == "0"
    asked = [((56,), seed) for seed in range(3)]
    seconds = engine.ask("first_token_times", soon(), asked=asked, warm=1)
    assert len(seconds) == 2
    assert all(0.02 < each < 10 for each in seconds)
    assert engine.ask("crowd_time", soon(), asked=asked) > 0.06
    first = engine.ask("log_probabilities", soon(), asked=asked, kept="kept.pt")
    assert first == {"first": [{"7": -0.5, "8": -1.5}] * 3, "count": 1, "bytes": False}
    assert engine.ask("worker", soon(), call="calls")[-3:] == ["bench_keep", "bench_kept", "calls"]
    assert engine.log_lines("] qwenvit") == ["] qwenvit: tower mode options []"]


def test_stages_of_a_request(start):
    engine = start()
    engine.answer(soon())
    stages = engine.ask("stage_times", soon(), asked=[((56,), seed) for seed in range(3)], warm=1)
    assert len(stages) == 2
    for one in stages:
        assert one.keys() == {"processor", "tower", WHOLE}
        assert one["tower"] == 0.25
        assert 0.02 < one["processor"] <= one[WHOLE]  # once, though the class calls the one above it
    again = engine.ask("worker", soon(), call="calls")
    assert again.count("bench_watch") == 2


def test_a_failure_is_reported_and_the_engine_goes_on(start):
    engine = start()
    engine.answer(soon())
    with pytest.raises(EngineError, match="RuntimeError: as asked"):
        engine.ask("worker", soon(), call="fail")
    assert engine.ask("worker", soon(), call="calls")[-1] == "calls"
    engine.stop()
    assert engine.stopped
    assert engine.process.poll() is not None


@pytest.mark.parametrize(("options", "why"), [({"refuse": 1}, "be done"), ({"die": 1}, "its process ended")])
def test_an_engine_that_does_not_start(start, options, why):
    with pytest.raises(EngineError, match=why):
        start(**options).answer(soon())


def test_an_engine_that_dies_or_hangs_is_killed(start):
    for call, limit, why in (("die", 60, "its process ended"), ("hang", 0.3, "no answer in time")):
        engine = start(call)
        engine.answer(soon())
        with pytest.raises(EngineError, match=why):
            engine.ask("worker", soon(limit), call=call)
        assert engine.stopped
        assert engine.process.poll() is not None


def empty():
    options = argparse.Namespace(text_layers={QWEN2_5: 4}, tiny=True)
    return model_run.empty_result(QWEN2_5, options)


def test_engines_that_fail_are_listed_with_their_logs(start, capsys):
    result = empty()
    group = Engines(result, soon(120))
    for name, options in ((OFF, {}), (BEST, {"refuse": 1}), (PLUGIN, {"die": 1})):
        group.start(start(name, **options))
    group.wait(120)
    assert list(group.running) == list(result["engines"]) == [OFF]
    assert result["engines"][OFF]["log"] == ["] qwenvit: tower mode options []"]
    failed = dict(result["failed"])
    assert failed.keys() == {f"{BEST}, start", f"{PLUGIN}, start"}
    assert failed[f"{BEST}, start"] == "be done"
    assert failed[f"{PLUGIN}, start"].startswith("its process ended")
    assert "options ['refuse']" in result["logs"][BEST][-1]
    assert "be done" in capsys.readouterr().err
    assert group.ask_each([OFF, BEST], "worker", 120, call="calls").keys() == {OFF}
    assert group.ask(OFF, "worker", 120, call="fail") is None
    assert list(group.running) == [OFF]
    group.deadline = time.monotonic()
    assert group.ask(OFF, "worker", 120, call="hang") is None
    assert group.running == {}


def test_an_engine_that_is_not_ready_in_time(start):
    result = empty()
    group = Engines(result, soon())
    engine = start(PIXELS, sleep=60)
    group.start(engine)
    group.wait(0.2)
    assert (group.running, result["failed"]) == ({}, [(f"{PIXELS}, start", "no answer in time")])
    assert engine.process.poll() is not None
    group.stop()


def test_engines_that_are_ready_are_not_killed_because_one_is_not(start):
    group = Engines(empty(), soon(60))
    for engine in (start(PIXELS, sleep=60), start(OFF)):
        group.start(engine)
    group.wait(120)
    assert list(group.running) == [OFF]
    assert group.ask(OFF, "worker", 5, call="calls") is not None
    group.stop()


def test_an_engine_that_the_benchmark_has_left_ends_with_its_processes(start, tmp_path):
    os.mkfifo(tmp_path / "alive")
    engine = start(child=str(tmp_path / "alive"))
    with (tmp_path / "alive").open() as alive:  # which the engine's own process keeps open for writing
        engine.answer(soon())
        engine.connection.close()
        assert engine.process.wait(20) == -signal.SIGKILL
        assert alive.read() == ""


# ---- the steps of a model, with engines that answer at once


class Stub:
    """An engine whose answers are made up; `broken` has the methods that fail."""

    def __init__(self, name, options, environment, _log, broken=()):
        self.name, self.options, self.broken, self.stopped, self.asked = name, options, broken, False, []
        self.environment = environment

    def answer(self, _deadline):
        if "start" in self.broken:
            raise EngineError("no answer in time")
        plugin = MODES[self.name].plugin
        ours = plugin is not None and plugin["tower"] == "tower"
        tower = "qwenvit.Tower" if ours else "vllm.Tower"
        return {"vllm": "0", "tower": tower, "tower_packages": ["qwenvit", "vllm"] if plugin else ["vllm"],
                "load_seconds": 1.0, "memory": 0}  # fmt: skip

    def ask(self, method, _deadline, **arguments):
        method = arguments.get("call", method)
        self.asked.append((method, arguments))
        if method in self.broken:
            raise EngineError(f"{method} failed")
        if method == "bench_tower_errors":
            assert Path(arguments["path"]).exists()
            return [0.01]
        if method == "bench_tower_times":
            return [0.5] * arguments["calls"]
        if method == "first_token_times":
            return [0.25] * (len(arguments["asked"]) - arguments["warm"])
        if method == "stage_times":
            return [dict.fromkeys(STAGES, 0.125)] * (len(arguments["asked"]) - arguments["warm"])
        if method == "crowd_time":
            return 2.0
        if method == "graphs":
            return {"sizes": [64], "hits": 1, "misses": 0}
        if method == "log_probabilities_of_embeddings":
            return [{"1": -1.0} for _ in arguments["images"]]
        assert method == "log_probabilities"
        embeddings = torch.load(Path(arguments["kept"]).parent / "embeddings.pt")
        torch.save([one["image_embeds"] for one in embeddings], arguments["kept"])
        return {"first": [{"1": -1.0} for _ in arguments["asked"]], "bytes": self.name == PIXELS}

    def log_lines(self, containing=""):
        return ["the end"] if not containing else []

    def stop(self):
        self.stopped = True


def run_stubs(monkeypatch, tmp_path, broken=None, **changes):
    stubs = {}

    def make(name, options, environment, log):
        stubs[name] = Stub(name, options, environment, log, (broken or {}).get(name, ()))
        return stubs[name]

    monkeypatch.setattr(model_run, "Engine", make)
    options = {"text_layers": {QWEN2_5: 4}, "tiny": True, "parts": PARTS, "cases": ["448²", "4 × 896²", CROWD_CASE]}
    options |= {"modes": list(MODES), "rounds": 2, "work": tmp_path, "llm": {}, "start_seconds": 9.0} | changes
    saved = []
    result = run_model(QWEN2_5, argparse.Namespace(**options), "a machine", soon(), lambda one: saved.append(dict(one)))
    assert all(stub.stopped for stub in stubs.values())
    assert saved[-1] == result
    return result, stubs


def test_all_steps(monkeypatch, tmp_path):
    asked, ask = [], Stub.ask
    monkeypatch.setattr(
        Stub,
        "ask",
        lambda self, method, *rest, **more: asked.append((self.name, method)) or ask(self, method, *rest, **more),
    )
    result, stubs = run_stubs(monkeypatch, tmp_path)
    requests_in_order = [name for name, mode in MODES.items() if REQUEST in mode.parts]
    assert result["failed"] == []
    (tower,) = result["tower"]
    assert tower["name"] == "448²"
    assert set(tower["times"]) == {name for name, mode in MODES.items() if TOWER in mode.parts}
    assert tower["times"][OFF] == {"median": 0.5, "p10": 0.5, "p90": 0.5, "rounds": 2 * model_run.CALLS}
    assert [row["name"] for row in result["requests"]] == ["448²", "4 × 896²"]
    requests = {name for name, mode in MODES.items() if REQUEST in mode.parts}
    assert [row["tokens"] for row in result["requests"]] == [16, 256]
    for row in result["requests"]:
        assert set(row["times"]) == set(row["stages"]) == requests
        assert row["times"][PIXELS]["rounds"] == 2 * model_run.TIMED_REQUESTS
        assert row["stages"][PIXELS]["processor"]["median"] == 0.125
    assert result["crowd"]["times"].keys() == requests
    assert result["crowd"]["times"][OFF]["rounds"] == model_run.CROWD_ROUNDS
    assert {name: row["failures"] for name, row in result["agreement"]["modes"].items()} == {n: [] for n in requests}
    assert result["agreement"]["same_bits"] is True
    assert result["engines"][BEST]["graphs"]["hits"] == 1
    seeds = [seed for _, arguments in stubs[BEST].asked for _, seed in arguments.get("asked", [])]
    assert len(set(seeds)) == len(seeds) > 50  # images never repeat
    order = [name for name, method in asked if method == "first_token_times"]
    assert order == [*requests_in_order, *requests_in_order[::-1]] * 2  # who is first alternates
    assert stubs[OFF].environment["VLLM_PLUGINS"] == "none"
    assert stubs[PIXELS].environment["VLLM_PLUGINS"] == "qwenvit"


def test_one_part_and_a_few_modes(monkeypatch, tmp_path):
    result, stubs = run_stubs(monkeypatch, tmp_path, parts=[TOWER], modes=[OFF, PLUGIN, PIXELS])
    assert set(stubs) == {OFF, PLUGIN}
    assert (len(result["tower"]), result["requests"], result["crowd"], result["agreement"]) == (1, [], None, None)
    result, stubs = run_stubs(monkeypatch, tmp_path, parts=[REQUEST], cases=["448²"])
    assert set(stubs) == {OFF, BEST, PLUGIN, PIXELS}
    assert (result["tower"], len(result["requests"]), result["crowd"]) == ([], 1, None)


@pytest.mark.parametrize(
    "graphs", [{}, {"sizes": [64], "hits": 0, "misses": 0}, {"sizes": [64], "hits": 9, "misses": 1}]
)
def test_vllms_best_settings_without_its_graphs_are_a_failure(monkeypatch, tmp_path, graphs):
    ask = Stub.ask
    monkeypatch.setattr(
        Stub,
        "ask",
        lambda self, method, *rest, **more: graphs if method == "graphs" else ask(self, method, *rest, **more),
    )
    options = argparse.Namespace(parts=[], cases=[], modes=[BEST], llm={})
    run = ModelRun(Shape(QWEN2_5, 28), options, Engines(empty(), soon()), tmp_path)
    run.engines.start(Stub(BEST, {}, {}, None))
    result = run.engines.result
    result["engines"][BEST] = {}
    run.steps(result, steps_of(result, lambda _: None))
    assert [what for what, _ in result["failed"]] == [f"{BEST}, graphs"]
    assert result["engines"][BEST]["graphs"] == graphs


def test_what_fails_costs_none_of_the_rest(monkeypatch, tmp_path):
    broken = {BEST: ["start"], PLUGIN: ["first_token_times"], PIXELS: ["log_probabilities"]}
    result, _ = run_stubs(monkeypatch, tmp_path, broken)
    failed = [what for what, _ in result["failed"]]
    assert f"{BEST}, start" in failed
    assert f"{PLUGIN}, first_token_times" in failed
    assert f"{PIXELS}, log_probabilities" in failed
    assert result["logs"][BEST] == ["the end"]
    assert set(result["tower"][0]["times"]) == {OFF, PLUGIN, "attention", "attention-best"}
    assert set(result["requests"][0]["times"]) == {OFF, PIXELS}
    assert set(result["agreement"]["modes"]) == {OFF, PLUGIN}
    assert result["agreement"]["same_bits"] is None


def test_an_engine_without_the_plugin_it_should_have_is_not_measured(monkeypatch, tmp_path):
    own = Stub.answer
    described = {"vllm": "0", "tower": "vllm.Tower", "tower_packages": ["vllm"], "load_seconds": 1.0, "memory": 0}
    monkeypatch.setattr(Stub, "answer", lambda self, _: described if self.name == PLUGIN else own(self, _))
    result, _ = run_stubs(monkeypatch, tmp_path)
    assert result["failed"] == [(f"{PLUGIN}, start", "expected qwenvit's tower, got vllm.Tower with parts of vllm")]
    assert PLUGIN not in result["tower"][0]["times"]


def test_engines_whose_tower_alone_is_measured_have_few_layers(monkeypatch, tmp_path):
    shape = Shape(QWEN2_5, 28)
    options = argparse.Namespace(parts=PARTS, cases=CASES, modes=list(MODES), llm={})
    made = {}
    monkeypatch.setattr(
        model_run, "Engine", lambda name, *rest: made.setdefault(name, argparse.Namespace(name=name, options=rest[0]))
    )
    ModelRun(shape, options, Engines(empty(), soon()), tmp_path).start_engines()
    layers = {name: Path(engine.options["model"]).name for name, engine in made.items()}
    full, few = "layers_28", f"layers_{model_run.FEW_LAYERS}"
    assert layers == {OFF: full, BEST: full, PLUGIN: full, PIXELS: full, "attention": few, "attention-best": few}


def test_the_log_has_no_more_than_its_end(tmp_path):
    engine = object.__new__(Engine)
    engine.log = tmp_path / "log"
    assert engine.log_lines() == []
    engine.log.write_text("\n".join(map(str, range(1000))))
    assert engine.log_lines() == [str(number) for number in range(1000 - engines.LOG_LINES, 1000)]
