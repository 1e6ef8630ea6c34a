"""`scripts/bench_generate.py`: what it compares, what it refuses to time, what it prints. Nothing here is timed."""

import argparse
import itertools
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import bench_generate
import pytest
import torch
from torch import nn
from transformers import AutoModelForImageTextToText
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from common.machine import Ceilings
from common.steps import ParityError
from common.tower_inputs import Case
from generate_bench import measure, models, report
from generate_bench.measure import ENCODER, INSIDE, USE_QWENVIT, USE_TOWER, GenerateBench
from peers.rivals import SDPA
from qwenvit.config.published import published_config
from support.tiny_models import IMAGE, TEXT, VIDEO, VISION_END, VISION_START, visual
from support.towers import narrow

EAGER = "transformers eager"
CASE = Case("2 images", ((1, 8, 12), (1, 4, 6)))
TOKEN_IDS = {"image_token_id": IMAGE, "video_token_id": VIDEO} | {
    "vision_start_token_id": VISION_START,
    "vision_end_token_id": VISION_END,
}
LIMITS = Ceilings(4e12, 7e14)


def build_bench(family="qwen3_vl", dtype=torch.bfloat16):
    text = TEXT | ({"head_dim": 16} if family == "qwen3_vl" else {})
    config = models.hf_config(narrow(family, depth=2, out_hidden_size=64), text, TOKEN_IDS)
    return GenerateBench(models.build_model(config, "cpu", dtype), "reference", {EAGER: "eager"})


@pytest.fixture(params=["qwen2_5_vl", "qwen3_vl"])
def bench(request, monkeypatch):
    monkeypatch.setattr(measure, "time_interleaved", lambda calls, *_: {name: [1.0, 1.0] for name in calls})
    return build_bench(request.param)


def prompt_of(bench):
    return models.prompt(bench.models[SDPA], bench.encoder.config, CASE)


@pytest.mark.parametrize(
    ("model", "layers", "parameters"),
    [("Qwen2.5-VL-7B", 28, 8_292_166_656), ("Qwen3-VL-8B", 36, 8_767_123_696)],
)
def test_official_shapes(model, layers, parameters):
    with torch.device("meta"):
        built = AutoModelForImageTextToText.from_config(models.official_config(model, layers))
        smaller = AutoModelForImageTextToText.from_config(models.official_config(model, 4))
    assert sum(parameter.numel() for parameter in built.parameters()) == parameters  # the checkpoint's own count
    assert len(smaller.model.language_model.layers) == 4
    assert {name: getattr(built.config, name) for name in models.TOKEN_IDS} == models.TOKEN_IDS


@pytest.mark.parametrize(("model", "layers"), [("Qwen2.5-VL-7B", 0), ("Qwen2.5-VL-7B", 29), ("Qwen3-VL-8B", 2)])
def test_text_layers_that_a_model_cannot_have(model, layers, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["bench_generate.py", "--models", model, "--text-layers", str(layers)])
    with pytest.raises(SystemExit):
        bench_generate.main()
    least, most = {"Qwen2.5-VL-7B": (1, 28), "Qwen3-VL-8B": (3, 36)}[model]
    assert f"--text-layers: expected {least} to {most} for {model}, got {layers}" in capsys.readouterr().err


def test_cases():
    for name, tokens in (("qwen2_5_vl-7b", (256, 576, 1024, 2304)), ("qwen3_vl-8b", (196, 441, 784, 1764))):
        cases = models.cases_for(published_config(name))
        assert [case.name for case in cases] == list(models.CASES)
        assert [case.patches // 4 for case in cases] == [*tokens, *(8 * count for count in tokens)]
    assert models.CASES[0::4] == ("448²", "8 × 448²")


def test_a_prompt(bench):
    inputs = prompt_of(bench)
    ids = inputs["input_ids"][0].tolist()
    images = ids[models.TOKENS_AROUND : -models.TOKENS_AROUND]
    assert images == [
        *(VISION_START, *[IMAGE] * 24, VISION_END),
        *(VISION_START, *[IMAGE] * 6, VISION_END),
    ]
    text = ids[: models.TOKENS_AROUND] + ids[-models.TOKENS_AROUND :]
    assert set(text).isdisjoint(TOKEN_IDS.values())
    assert len(set(text)) > 40
    assert inputs["image_grid_thw"].tolist() == [list(grid) for grid in CASE.grid]
    assert inputs["mm_token_type_ids"][0].tolist() == [int(token == IMAGE) for token in ids]
    assert bool(inputs["attention_mask"].all())


def test_models_share_parameters_and_differ_in_the_tower(bench):
    model = bench.models[SDPA]
    for other in bench.models.values():
        pairs = zip(model.parameters(), other.parameters(), strict=True)
        assert all(a is b for a, b in pairs)
    forwards = {name: "forward" in vars(visual(other)) for name, other in bench.models.items()}
    assert forwards == {SDPA: False, EAGER: False, USE_TOWER: True, USE_QWENVIT: True}
    positions = {name: "get_rope_index" in vars(other.model) for name, other in bench.models.items()}
    assert positions == {SDPA: False, EAGER: False, USE_TOWER: False, USE_QWENVIT: True}
    attention = {name: visual(other).config._attn_implementation for name, other in bench.models.items()}
    assert attention == dict.fromkeys(attention, "sdpa") | {EAGER: "eager"}
    assert {other.config.text_config._attn_implementation for other in bench.models.values()} == {"sdpa"}
    assert {parameter.dtype for parameter in bench.truth.parameters()} == {torch.float32}


def eager_tokens(bench):
    """Return how many tokens of eager attention are those of sdpa: some CPUs' rounding decides between near ties."""
    inputs = prompt_of(bench)
    pairs = zip(*(bench.generate(name, inputs, measure.NEW_TOKENS).tolist() for name in (SDPA, EAGER)), strict=True)
    return {EAGER: sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs))}


def test_a_case(bench):
    row = json.loads(json.dumps(bench.measure(CASE)))
    assert set(row["first"]) == {SDPA, EAGER, USE_TOWER, USE_QWENVIT}
    assert set(row["tower"]) == set(row["first"])
    assert set(row["close"]) == {USE_TOWER, INSIDE, ENCODER}
    assert (row["images"], row["patches"], row["prompt"]) == (2, 120, 2 * models.TOKENS_AROUND + 24 + 6 + 4)
    found = row["parity"]
    assert found["tokens"] == {USE_TOWER: measure.NEW_TOKENS, USE_QWENVIT: measure.NEW_TOKENS} | eager_tokens(bench)
    for kind in ("whole", "tower"):  # the reference tower is transformers', to the last bit
        assert found[kind][USE_TOWER] == found[kind][USE_QWENVIT] == found[kind][SDPA] > 0
        assert found[kind][EAGER] != found[kind][SDPA]
    assert found["tower"][SDPA] < found["whole"][SDPA] < found["noise"]


def test_what_is_timed(bench, monkeypatch):
    runs, forward = [], nn.Module.__call__

    def record(module, *args, **kwargs):
        runs.append(module)
        return forward(module, *args, **kwargs)

    together = []

    def time_interleaved(calls, *_):
        together.append(set(calls))
        for kind_and_name, call in calls.items():
            kind, _, name = kind_and_name.partition(" ")
            runs.clear()
            with monkeypatch.context() as patch:
                patch.setattr(nn.Module, "__call__", record)
                result = call()
            if name == ENCODER:
                assert runs[0] is bench.encoder.tower
                assert result.pooler_output.shape == (30, 64)
                continue
            if name == INSIDE:
                assert runs[0] is visual(bench.models[USE_TOWER])
                assert bench.models[USE_TOWER] not in runs
                assert result.pooler_output.shape == (30, 64)
                continue
            assert visual(bench.models[name]) in runs
            whole = bench.models[name] in runs
            assert whole == (kind == "first")
            assert len(result) == 1 if whole else len(torch.cat(result.pooler_output)) == 30
        return {name: [1.0, 1.0] for name in calls}

    monkeypatch.setattr(measure, "time_interleaved", time_interleaved)
    bench.measure(CASE)
    contenders = (SDPA, EAGER, USE_TOWER, USE_QWENVIT)
    both_kinds = {f"{kind} {name}" for kind in ("first", "tower") for name in contenders}
    assert together == [both_kinds, {f"close {name}" for name in (USE_TOWER, INSIDE, ENCODER)}]


def spoil(bench, name, change):
    """Change the tokens that a contender's tower returns."""
    tower = visual(bench.models[name])
    forward = tower.forward

    def spoiled(*args, **kwargs):
        output = forward(*args, **kwargs)
        output.pooler_output = change(output.pooler_output)
        return output

    tower.forward = spoiled


MISTAKES = {
    "a scale that is 5 % off": lambda tokens: tokens * 1.05,
    "two tokens swapped": lambda tokens: torch.cat([tokens[[1, 0]], tokens[2:]]),
    "the first image lost": lambda tokens: torch.cat([torch.zeros_like(tokens[:24]), tokens[24:]]),
    "not a number": lambda tokens: tokens.index_fill(0, torch.tensor([5]), float("nan")),
}


@pytest.mark.parametrize("contender", [USE_TOWER, USE_QWENVIT])
@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_wrong_tower_is_not_timed(bench, contender, mistake, monkeypatch):
    monkeypatch.setattr(measure, "time_interleaved", lambda *_: pytest.fail("timed"))
    spoil(bench, contender, MISTAKES[mistake])
    with pytest.raises(
        ParityError, match=f"^{contender}, log-probabilities by its tower alone: .*{contender}, output 0"
    ):
        bench.measure(CASE)


def test_wrong_positions_are_not_timed(monkeypatch):
    bench = build_bench()
    model = bench.models[USE_QWENVIT].model
    get_rope_index = model.get_rope_index

    def without_images(*args, **kwargs):
        positions, deltas = get_rope_index(*args, **kwargs)
        return torch.arange(positions.shape[-1]).expand_as(positions), deltas * 0

    model.get_rope_index = without_images
    monkeypatch.setattr(measure, "time_interleaved", lambda *_: pytest.fail("timed"))
    with pytest.raises(ParityError, match=f"^{USE_QWENVIT}, log-probabilities: "):
        bench.measure(CASE)


def test_tokens_that_differ(bench, monkeypatch):
    inputs = prompt_of(bench)
    theirs = bench.generate(SDPA, inputs, measure.NEW_TOKENS)
    other = (int(theirs[3]) + 7) % IMAGE
    generate = GenerateBench.generate

    def another_token(self, name, inputs, count):
        tokens = generate(self, name, inputs, count).clone()
        if name == USE_TOWER:
            tokens[3:] = other
        return tokens

    monkeypatch.setattr(GenerateBench, "generate", another_token)
    found = bench.compare_tokens(inputs)
    assert found["tokens"] == {USE_TOWER: 3, USE_QWENVIT: 16} | eager_tokens(bench)
    # The gap is that of the fp32 model after the same tokens, without a cache.
    ids = torch.cat([inputs["input_ids"], theirs[None, :3]], 1)
    types = (ids == IMAGE).int()
    with torch.no_grad():
        more = {"input_ids": ids, "mm_token_type_ids": types, "attention_mask": torch.ones_like(ids)}
        truth = bench.truth(**inputs | more).logits[0, -1].log_softmax(-1)
    assert found["gap"][USE_TOWER] == pytest.approx(float(truth[theirs[3]] - truth[other]), abs=1e-5)
    with pytest.raises(ParityError, match=f"^{USE_TOWER}, token 3: .* from transformers', whose largest error is"):
        bench.parity(inputs)


def test_the_noise_of_a_tie():
    row = {"features": {SDPA: [0.01], USE_TOWER: [0.0104]}, "noise": 0.05}
    row |= {kind: {SDPA: 0.02, USE_TOWER: 0.0249} for kind in ("whole", "tower")}
    row |= {"tokens": {USE_TOWER: 5}, "gap": {USE_TOWER: 0.05}}
    assert measure.failures(row) == []
    assert measure.failures(row | {"gap": {USE_TOWER: 0.051}}) == [
        f"{USE_TOWER}, token 5: 5.10e-02 from transformers', whose largest error is 5.00e-02"
    ]
    assert len(measure.failures(row | {"features": {SDPA: [0.01], USE_TOWER: [0.0106]}})) == 1
    for kind, what in (("whole", "log-probabilities"), ("tower", "log-probabilities by its tower alone")):
        [failure] = measure.failures(row | {kind: {SDPA: 0.02, USE_TOWER: 0.0251}})
        assert failure == f"{USE_TOWER}, {what}: error 2.51e-02, transformers' 2.00e-02"


def row_of(name="448²", images=1, **more):
    first = {SDPA: 40.0, "transformers FA2": 30.0, USE_TOWER: 13.0, USE_QWENVIT: 12.0}
    tower = {SDPA: 30.0, "transformers FA2": 20.0, USE_TOWER: 3.2, USE_QWENVIT: 3.1}
    close = {USE_TOWER: 3.2, INSIDE: 3.1, ENCODER: 3.0}
    figures = dict.fromkeys(first, 0.01)
    found = {"features": {name: [0.01, 0.02] for name in first}, "whole": figures, "tower": figures, "noise": 0.05}
    found |= {"tokens": dict.fromkeys(first, 16) | {USE_TOWER: 4}, "gap": dict.fromkeys(first, 0.0) | {USE_TOWER: 0.03}}
    times = {"first": first, "tower": tower, "close": close}
    times |= {key: more.pop(key) for key in times if key in more}
    times = {kind: {key: {"median": ms / 1e3} for key, ms in of.items()} for kind, of in times.items()}
    return {"name": name, "images": images, "patches": 1024, "prompt": 322, "parity": found} | times | more


def result_of(*rows, **more):
    empty = report.empty_result("Qwen3-VL-8B", 4) | {"machine": "a GPU, driver 1", "ceilings": "Ceilings: 4.20 TB/s"}
    return empty | {"rows": list(rows), "extra_bytes": 300 * 2**20} | more


def test_bars():
    assert report.verdicts(row_of()) == {
        "448²: the tower saves 26.80 ms, the first token comes 27.00 ms sooner (≥ 0.95 of that)": True,
        "448²: the tower inside get_image_features +0.100 ms beyond the encoder alone (≤ 0.15)": True,
    }
    slow = {SDPA: 40.0, USE_TOWER: 15.0}
    late = row_of(first=slow, tower={SDPA: 30.0, USE_TOWER: 3.1}, close={INSIDE: 3.2, ENCODER: 3.0})
    assert list(report.verdicts(late).values()) == [False, False]
    assert len(report.verdicts(row_of("8 × 448²", 8))) == 1
    saves_nothing = row_of(first=slow, tower={SDPA: 3.0, USE_TOWER: 3.0}, close={INSIDE: 3.0, ENCODER: 3.0})
    assert list(report.verdicts(saves_nothing).values()) == [False, True]


def test_a_section():
    text = report.section(result_of(row_of(), row_of("8 × 448²", 8)), for_readers=False)
    contenders = "transformers sdpa, ms | transformers FA2, ms | use_tower, ms | use_qwenvit, ms"
    saved = "first token sooner by, ms | tower saves, ms"
    beyond = "encoder alone, ms | tower inside beyond it, ms | get_image_features beyond it, ms"
    assert f"|  | prompt tokens | {contenders} | {saved} | {beyond} |" in text
    assert (
        "| 448² | 322 | 40.0 (30.00, 75%) | 30.0 (20.00, 67%) | **13.0** (3.20, 25%) | **12.0** (3.10, 26%) | "
        "27.00 (3.08×) | 26.80 | 3.00 | +0.100 | +0.200 |"
    ) in text
    errors = "1.00e-02, 2.00e-02 | 1.00e-02 | 1.00e-02"
    assert f"| 448² | use_tower | {errors} | – | 4 of 16, then two tokens 3.00e-02 apart in fp32 |" in text
    assert f"| 448² | transformers sdpa | {errors} | 5.00e-02 | – |" in text
    assert "- 4 of 36 text layers. `use_tower` holds 300 MiB of packed weights." in text
    assert "- 3 of 3 bars met." in text
    assert "sooner (≥ 0.95 of that) ✓." in text
    for table in (report.times_table(result_of(row_of())), report.parity_table(result_of(row_of()))):
        assert len({line.count("|") for line in table.splitlines()}) == 1
    for_readers = report.block([result_of(row_of())], for_readers=True)
    assert for_readers.startswith("a GPU, driver 1\n\nCeilings: 4.20 TB/s.\n\n### Until the first token, Qwen3-VL-8B")
    assert "bars met" not in for_readers
    assert "✓" not in for_readers


def test_a_model(bench, monkeypatch):
    monkeypatch.setattr(bench_generate, "describe_machine", lambda _, commit: f"a GPU, {commit}\n\nCeilings: x")
    monkeypatch.setattr(bench_generate, "load_bench", lambda *_: bench)
    monkeypatch.setattr(bench_generate, "cases_for", lambda _: [CASE, Case("other", ((1, 4, 4),))])
    options, saved = argparse.Namespace(cases=[CASE.name], commit="abc", text_layers=4), []
    result = bench_generate.run_model("Qwen3-VL-8B", options, LIMITS, saved.append)
    assert saved == [result, result]
    assert (result["machine"], result["ceilings"], result["failed"]) == ("a GPU, abc", "Ceilings: x", [])
    assert [row["name"] for row in result["rows"]] == [CASE.name]
    spoil(bench, USE_TOWER, MISTAKES["two tokens swapped"])
    result = bench_generate.run_model("Qwen3-VL-8B", options, LIMITS, saved.append)
    assert result["rows"] == []
    [(step, why)] = result["failed"]
    assert step == CASE.name
    assert why.startswith(f"ParityError: {USE_TOWER}, ")
    text = report.section(result, for_readers=True)
    assert f"- Failed: {CASE.name}: ParityError: " in text
    assert "| ---" not in text


@pytest.mark.parametrize(("fa3", "attentions"), [(None, ["FA2"]), (Path("fa3.so"), ["FA2", "FA3"])])
def test_contenders_on_a_gpu(fa3, attentions, monkeypatch):
    built = SimpleNamespace()
    monkeypatch.setattr(bench_generate, "build_model", lambda config: setattr(built, "config", config) or "a model")
    monkeypatch.setattr(bench_generate, "GenerateBench", lambda *arguments: arguments)
    options = argparse.Namespace(text_layers=5, fa3=fa3)
    model, impl, names = bench_generate.load_bench("Qwen3-VL-8B", options)
    assert (model, impl) == ("a model", "triton")
    assert list(names) == [f"transformers {name}" for name in attentions]
    assert set(names.values()) <= set(ALL_ATTENTION_FUNCTIONS.valid_keys())
    assert built.config.text_config.num_hidden_layers == 5


def test_the_page_is_rewritten_in_place(monkeypatch, tmp_path, capsys):
    file, page = tmp_path / "a.json", tmp_path / "BENCHMARKS.md"
    begin, end = report.GENERATE_MARKERS
    page.write_text(f"before\n{begin}{end}\nafter\n")
    monkeypatch.setattr(sys, "argv", ["bench_generate.py", "--read", str(file), "--page", str(page)])
    file.write_text(json.dumps([result_of(row_of())]))
    bench_generate.main()
    block = report.block([result_of(row_of())], for_readers=True)
    assert page.read_text() == f"before\n{begin}\n\n{block}\n\n{end}\nafter\n"
    assert "bars met" in capsys.readouterr().out
    file.write_text(json.dumps([result_of(failed=[("448²", "ParityError: x")])]))
    with pytest.raises(SystemExit, match="1"):
        bench_generate.main()


def test_the_page_of_this_repository_has_the_markers():
    text = (Path(bench_generate.__file__).parent.parent / "BENCHMARKS.md").read_text()
    assert [text.count(marker) for marker in report.GENERATE_MARKERS] == [1, 1]


def test_measured_results_are_written(monkeypatch, tmp_path):
    def run_model(model, options, limits, save):
        result = report.empty_result(model, options.text_layers)
        save(result)
        return result

    monkeypatch.setattr(bench_generate, "measure_ceilings", lambda: LIMITS)
    monkeypatch.setattr(bench_generate, "run_model", run_model)
    options = argparse.Namespace(models=list(models.MODELS), text_layers=4, fa3=None, json=tmp_path / "a.json")
    results = bench_generate.measure(options)
    assert json.loads(options.json.read_text()) == results
    assert [result["model"] for result in results] == options.models


def test_arguments(monkeypatch, capsys):
    for wrong in (["--models", "Qwen9"], ["--cases", "449²"]):
        monkeypatch.setattr(sys, "argv", ["bench_generate.py", *wrong])
        with pytest.raises(SystemExit):
            bench_generate.main()
        assert f"invalid choice: '{wrong[1]}'" in capsys.readouterr().err
    if not torch.cuda.is_available():
        monkeypatch.setattr(sys, "argv", ["bench_generate.py"])
        with pytest.raises(SystemExit, match="needs a GPU"):
            bench_generate.main()
