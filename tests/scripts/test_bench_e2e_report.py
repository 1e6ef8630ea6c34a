"""`scripts/bench_e2e.py`: what it prints and writes, and what a failure leaves out. Nothing here is timed."""

import argparse
import json
import sys
from pathlib import Path

import bench_e2e
import pytest
import torch

from common.machine import Ceilings
from common.pages import rewrite
from common.tower_inputs import Case
from e2e import chart as e2e_chart
from e2e import model_run
from e2e import report as e2e_report
from e2e import verdicts as e2e_verdicts
from e2e.report import SPEED_MARKERS, TOWERS_MARKERS
from peers.rivals import HOW_RIVALS_RUN
from qwenvit import parity
from qwenvit.config.published import published_config

TIMES = {"qwenvit": 2.0, "transformers sdpa": 12.0, "transformers FA2": 9.0, "transformers FA3": 8.0,
         "vLLM compile + graph": 3.0, "timm": 1.0, "qwenvit without DeepStack": 1.0}  # fmt: skip
COLD = {"imports": 6.0, "read": 0.5, "load": 2.0, "first": 9.0, "second": 0.004, "bytes": 2**30, "kernels": 23}
GRAPHS = {"capture": {"448²": 50.0, "1344²": 80.0}, "memory": {"448²": 2**20, "1344²": 2**28}, "graphs": 61,
          "host": {"us": 700.0, "launch": 40.0, "cold_launch": 90.0, "waited": 0},
          "seconds": 4.0, "held": 2**29, "driver": 2**27}  # fmt: skip


def row_of(name="448²", **more):
    """Return figures of a case as `ModelBench.measure` does."""
    times = {key: {"median": ms / 1e3, "p10": 0.9e-3 * ms, "p90": 1.1e-3 * ms} for key, ms in TIMES.items()}
    row = {"name": name, "patches": 784, "frames": 0, "times": times, "passed": True, "failure": "", "flops": 7e11}
    return row | {"missing": {"other": "takes no such input"}, "peak": dict.fromkeys(TIMES, 2**25)} | more


def result_of(*rows, **more):
    return (
        model_run.empty_result("Qwen3-VL-8B") | {"machine": "a GPU, driver 1", "gemm": 7e14, "rows": list(rows)} | more
    )


def test_the_headline_is_over_the_best_rival():
    row = row_of(frames=16)
    assert e2e_verdicts.best_rival(row) == "vLLM compile + graph"
    assert e2e_verdicts.value_of("over best rival", row) == pytest.approx(1.5)
    assert e2e_verdicts.value_of("over sdpa", row) == pytest.approx(6)
    assert e2e_verdicts.value_of("frames/s", row) == pytest.approx(8000)
    row["times"] = {"qwenvit": {"median": 1.0}}
    assert e2e_verdicts.best_rival(row) is None
    verdict = e2e_verdicts.row_verdicts("Qwen3-VL-8B", row)[1]
    assert (verdict.text, verdict.met) == ("no figure (≥ 5)", False)


@pytest.mark.parametrize("why", ["not asked for (--rivals)", "no figures were given (--vllm)"])
def test_no_best_rival_where_an_option_left_one_out(why):
    row = row_of(missing={"transformers compiled": why})
    assert e2e_verdicts.best_rival(row) is None
    assert [(v.kind, v.met) for v in e2e_verdicts.row_verdicts("Qwen3-VL-8B", row)] == [
        ("ms", True), ("over sdpa", True), ("over best rival", False),
    ]  # fmt: skip
    assert "| **2.00** (1.80–2.20) | – | – | 12.00 (10.80–13.20) | 6.00× |" in e2e_report.short_table(result_of(row))
    row["times"]["qwenvit"]["in_a_row"] = True
    assert "| **2.00** (1.80–2.20, in a row) | – |" in e2e_report.short_table(result_of(row))
    assert e2e_verdicts.best_rival(row_of(missing={"timm": why})) is not None  # timm is no rival for the whole tower


@pytest.mark.parametrize(
    ("model", "given", "why"),
    [
        ("Qwen2-VL-7B", False, "vLLM's benchmark does not include this model"),
        ("Qwen3-VL-8B", True, "vLLM's benchmark does not include this case"),
        ("Qwen3-VL-8B", False, "no figures were given (--vllm)"),
    ],
)
def test_why_there_is_no_figure_of_vllm(model, given, why):
    assert model_run.why_no_vllm_figure(model, given) == why


def test_a_section():
    result = result_of(row_of(), row_of("672²"), cold=COLD, graphs=GRAPHS, gate="34 of 34 pass")
    text = e2e_report.section(result, for_readers=False)
    rivals = "3.00 (2.70–3.30), vLLM compile + graph | 1.50× | 12.00 (10.80–13.20) | 6.00×"
    assert f"| 448² | 784 | **2.00** (1.80–2.20) | {rivals} |" in text
    assert "- 7 of 7 bars met.\n- Parity: 34 of 34 pass.\n" in text
    assert "| 448² | 2.00 | 350 | 50% | 32 (32) | 12.00 | 9.00 | 8.00 | 3.00 | 1.00 | 1.00 | 2.000 ms (≤ 2.6) " in text
    assert "- Cold process, nothing compiled: 11.0 s from load to first embedding (≤ 30) ✓: loading 2.0 s" in text
    assert "Nothing is subtracted: the file's 1.00 GiB were in the system's cache" in text
    assert "a capture takes 80 ms at 1344², then 50 ms at 448²; the first takes 256 MiB, the second adds 1 MiB" in text
    assert "61 graphs in 4.0 s, 512 MiB, and 128 MiB of the driver's own" in text
    assert "launches its graph after 40 µs (90 on a cold host) and returns after 700 µs, without waiting" in text
    assert "- Not measured: other: takes no such input (all)." in text
    one_row = result_of(row_of())
    for table in (e2e_report.short_table(one_row), *(e2e_report.full_table(one_row, which) for which in (True, False))):
        assert len({line.count("|") for line in table.splitlines()}) == 1


def test_bars_that_are_missed_are_named():
    slow = row_of("672²", times=row_of()["times"] | {"qwenvit": {"median": 0.005, "p10": 0.005, "p90": 0.005}})
    lines = e2e_report.notes(result_of(row_of(), slow, cold=COLD | {"load": 22.0}), for_readers=False)
    assert lines[0] == "3 of 7 bars met"
    assert lines[1] == (
        "Not met: 672²: 5.000 ms (≤ 4.7), 2.40× transformers sdpa (≥ 2.8), 0.60× the best rival (≥ 1.25); "
        "cold process: 31.0 s from load to first embedding (≤ 30)"
    )


def test_no_speedup_where_parity_fails():
    result = result_of(row_of(passed=False, failure="output 0: error"))
    for for_readers in (False, True):
        text = e2e_report.section(result, for_readers)
        assert "×" not in text
        assert "parity failed: output 0: error" in text or "Parity failed: 448²: output 0: error" in text
    assert not any(verdict.met for verdict in e2e_verdicts.all_verdicts(result))
    assert not e2e_report.speedups_over_timm(result)
    assert e2e_report.speedups_over_timm(result_of(row_of())) == ["1.00× (448²)"]


def test_random_sizes_are_judged_by_the_worst():
    sizes = [{"name": name, "ours": ours, "exact": 1.0} for name, ours in (("a", 1.05), ("b", 1.2), ("c", 1.06))]
    assert e2e_verdicts.sizes_text(sizes, with_bar=True) == (
        "3 random sizes over graphs of their exact shapes: median 1.06, 1.05 to 1.20 (worst b patches; each ≤ 1.12) ✗"
    )
    assert not e2e_verdicts.sizes_verdict(sizes).met
    assert e2e_verdicts.sizes_verdict(sizes[:1]).met


def test_failures_are_grouped_by_reason():
    failed = [("672²", "CUDA error"), ("random sizes", "no memory"), ("896²", "CUDA error")]
    text = e2e_report.section(result_of(failed=failed), for_readers=False)
    assert text.endswith("- Failed: 672², 896²: CUDA error.\n- Failed: random sizes: no memory.")


class FakeBench:
    """Figures without a GPU; 672² and the cold process fail."""

    in_a_row_ms = 2.1

    def __init__(self, *_):
        self.config = published_config("qwen3_vl-8b")
        self.parity_checks = [parity.Check("tokens: relative L2 in fp32", 1e-6, 1e-5)]

    def measure(self, case):
        if case.name == "672²":
            raise RuntimeError("out of memory\nat length")
        return row_of(case.name, patches=case.patches, missing={})

    def in_a_row(self, case):
        assert case.name == "336²"  # the only one with figures of vLLM
        return {"median": self.in_a_row_ms / 1e3, "p10": 0.001, "p90": 0.003}

    def cold_start(self):
        raise RuntimeError("no such process")

    def measure_random_sizes(self):
        return [{"name": "a", "ours": 1.05, "exact": 1.0}]

    def profile(self, _):
        return {"span": 1.0, "replay": 1.0, "kernels": []}

    def graph_costs(self):
        return GRAPHS


def run_fake(monkeypatch, tmp_path, save=lambda _: None):
    monkeypatch.setattr(model_run, "ModelBench", FakeBench)
    monkeypatch.setattr(model_run, "describe_machine", lambda _, commit: f"a GPU, {commit}\n\nCeilings: high")
    monkeypatch.setattr(model_run, "read_vllm", lambda _: {("Qwen3-VL-8B", 36, False): {"vLLM eager": 0.0015}})
    monkeypatch.setattr(model_run, "all_cases", lambda _: [Case(f"{n}²", ((1, 6, n // 56),)) for n in (336, 448, 672)])
    options = argparse.Namespace(vllm=tmp_path, cases=["336²", "448²", "672²", *model_run.EXTRAS], commit="abc")
    return model_run.run_model("Qwen3-VL-8B", options, Ceilings(4e12, 7e14), save)


def test_calls_in_a_row_that_are_faster_than_among_rivals_do_not_count(monkeypatch, tmp_path):
    monkeypatch.setattr(FakeBench, "in_a_row_ms", 1.9)
    assert run_fake(monkeypatch, tmp_path)["rows"][0]["times"]["qwenvit"]["median"] == 0.002


def test_a_failure_leaves_the_rest(monkeypatch, tmp_path):
    saved = []
    result = run_fake(monkeypatch, tmp_path, lambda result: saved.append(json.dumps(result)))
    assert result["failed"] == [
        ("cold process", "RuntimeError: no such process"),
        ("672²", "RuntimeError: out of memory"),
    ]
    assert [row["name"] for row in result["rows"]] == ["336²", "448²"]
    assert list(result["profiles"]) == ["448²"]
    assert (result["machine"], result["ceilings"]) == ("a GPU, abc", "Ceilings: high")
    assert result["complete"]
    first, second = result["rows"]
    assert first["times"]["vLLM eager"] == {"median": 0.0015}
    assert [row["times"]["qwenvit"]["median"] for row in (first, second)] == pytest.approx([0.0021, 0.002])
    assert second["missing"]["vLLM"] == "vLLM's benchmark does not include this case"
    assert "nearest its bound: tokens: relative L2 in fp32 1e-06 (≤ 1e-05)" in e2e_report.block(
        [result], for_readers=False
    )
    assert [len(json.loads(text)["rows"]) for text in saved] == [0, 0, 1, 2, 2, 2, 2, 2, 2]
    assert list(result["seconds"]) == [
        "weights and parity", "cold process", "336²", "448²", "profile of 448²", "672²", "random sizes", "graphs",
    ]  # fmt: skip


def test_a_model_that_does_not_load(monkeypatch, tmp_path):
    monkeypatch.setattr(FakeBench, "__init__", lambda *_: 1 / 0)
    result = run_fake(monkeypatch, tmp_path)
    assert result["failed"] == [("weights and parity", "ZeroDivisionError: division by zero")]
    assert e2e_report.section(result, for_readers=False) == (
        "### Qwen3-VL-8B\n\n- Failed: weights and parity: ZeroDivisionError: division by zero."
    )


def test_a_process_that_dies_costs_one_model(tmp_path):
    script = tmp_path / "script.py"
    options = argparse.Namespace(models=["a", "b"], cases=["448²"], rivals=[], fa3=Path("fa3.so"), timm=None, json=None)
    for write, end, failed in (
        ("", 9, [["its process", "ended with 9"]]),
        (
            "file.write_text(json.dumps([{'rows': [1], 'failed': [['a', 'b']], 'complete': False}]))",
            6,
            [["a", "b"], ["its process", "ended with 6"]],
        ),
        ("file.write_text(json.dumps([{'rows': [sys.argv[1:]], 'failed': [], 'complete': True}]))", 1, []),
    ):
        script.write_text(
            "import json, os, pathlib, sys\nfile = pathlib.Path(sys.argv[sys.argv.index('--json') + 1])\n"
            f"{write}\nos._exit({end})\n"
        )
        result = model_run.run_in_new_process("b", options, script)
        assert [list(entry) for entry in result["failed"]] == failed
        assert len(result["rows"]) == (1 if write else 0)
    given = result["rows"][0]
    assert given[:3] == ["--models", "b", "--json"]
    assert given[4:] == ["--cases", "448²", "--rivals", "--fa3", "fa3.so"]


def test_several_models_run_in_processes_of_their_own(monkeypatch, tmp_path):
    monkeypatch.setattr(bench_e2e, "run_in_new_process", lambda model, *_: model_run.empty_result(model))
    options = argparse.Namespace(models=["a", "b"], json=tmp_path / "all.json")
    assert [result["model"] for result in bench_e2e.measure(options)] == ["a", "b"]
    assert [result["model"] for result in json.loads(options.json.read_text())] == ["a", "b"]
    assert [file.name for file in tmp_path.iterdir()] == ["all.json"]


@pytest.mark.parametrize("markers", [TOWERS_MARKERS, SPEED_MARKERS])
def test_a_page_is_rewritten_between_its_markers(tmp_path, markers):
    page, (begin, end) = tmp_path / "page.md", markers
    page.write_text(f"before\n{begin}\nold\n{end}\nafter\n")
    for text in ("first", "| a | b |"):
        rewrite(page, markers, text)
        assert page.read_text() == f"before\n{begin}\n\n{text}\n\n{end}\nafter\n"
    for broken in ("nothing", end + begin, 2 * (begin + end)):
        page.write_text(broken)
        with pytest.raises(ValueError, match="expected one"):
            rewrite(page, markers, "text")
        assert page.read_text() == broken


def test_readers_are_shown_no_bars():
    slow = row_of("672²", times=row_of()["times"] | {"qwenvit": {"median": 0.005, "p10": 0.005, "p90": 0.005}})
    sizes = [{"name": "16×18", "ours": 1.05, "exact": 1.0}]
    result = result_of(row_of(), slow, cold=COLD, graphs=GRAPHS, sizes=sizes, gate="34 of 34 pass")
    terminal, page = (e2e_report.block([result], for_readers) for for_readers in (False, True))
    bars = ("✓", "✗", "(≤ 30)", "≤ 1.12")
    for text in ("bars met", "Bars are", "| bars |", "moonshot", "Not met", "Not measured", *bars):
        assert text in terminal
    for text in ("bar", "moonshot", "not met", "not measured", *bars):
        assert text not in page.lower()
    for text in (
        e2e_report.short_table(result),
        "Parity: 34 of 34 pass.",
        "1.05 to 1.05 (worst 16×18 patches).",
        "11.0 s from load to first embedding: loading 2.0 s",
        "61 graphs in 4.0 s",
        "| 448² | 2.00 | 350 | 50% | 32 (32) | 12.00 |",
        model_run.METHOD,
        HOW_RIVALS_RUN,
    ):
        assert text in page


def test_each_result_keeps_how_it_was_measured():
    older = [result_of(row_of()) | {"model": model, "method": "In a fixed order."} for model in ("older", "old")]
    page = e2e_report.block([*older, result_of(row_of())], for_readers=True)
    parts = [line for line in page.splitlines() if line.startswith(("### ", "In a fixed order.", "Times are"))]
    assert parts == ["### older", "### old", "In a fixed order.", "### Qwen3-VL-8B", model_run.METHOD]


def test_speed_table():
    rows = [row_of(case) for case in ("448²", "672²", "896²", "1344²")]
    without_best = row_of("1344²", missing={"transformers compiled": "not asked for (--rivals)"})
    others = [result_of(*rows) | {"model": model} for model in ("Qwen2-VL-7B", "Qwen2.5-VL-7B")]
    results = [result_of(*rows[:3], without_best), *others]
    lines = e2e_report.speed_table(results).splitlines()
    assert lines[0] == (
        "| model, input | qwenvit, ms | best rival, ms | times faster | transformers sdpa, ms | times faster |"
    )
    figures = "**2.00** | 3.00 (vLLM compile + graph) | 1.50× | 12.00 | 6.00× |"
    assert lines[2:] == [
        f"| Qwen2.5-VL-7B, 448² | {figures}",
        f"| Qwen2.5-VL-7B, 896² | {figures}",
        f"| Qwen2.5-VL-7B, 1344² | {figures}",
        f"| Qwen3-VL-8B, 448² | {figures}",
        f"| Qwen3-VL-8B, 896² | {figures}",
        "| Qwen3-VL-8B, 1344² | **2.00** | – | – | 12.00 | 6.00× |",
    ]
    with pytest.raises(ValueError, match=r"expected figures of 6 inputs, got none of Qwen2\.5-VL-7B at 448²"):
        e2e_report.speed_table(results[:2])


def test_page_and_readme_are_written(monkeypatch, tmp_path):
    rows = [row_of(case) for case in ("448²", "896²", "1344²")]
    results = [result_of(*rows) | {"model": model} for model in ("Qwen2.5-VL-7B", "Qwen3-VL-8B")]
    file, page, readme = (tmp_path / name for name in ("a.json", "BENCHMARKS.md", "README.md"))
    file.write_text(json.dumps(results))
    page.write_text("".join(TOWERS_MARKERS))
    readme.write_text("".join(SPEED_MARKERS))
    options = ["--read", str(file), "--page", str(page), "--readme", str(readme)]
    monkeypatch.setattr(sys, "argv", ["bench_e2e.py", *options])
    bench_e2e.main()
    assert e2e_report.block(results, for_readers=True) in page.read_text()
    assert e2e_report.speed_table(results) in readme.read_text()


def test_earlier_figures_are_read(monkeypatch, tmp_path, capsys):
    profile = {"span": 100.0, "replay": 70.0, "kernels": [{"name": "a_kernel", "calls": 2, "us": 60.0}]}
    result = result_of(row_of(), profiles={"448²": profile}, sizes=[{"name": "16×18", "ours": 1.05, "exact": 1.0}])
    file, page = tmp_path / "a.json", tmp_path / "BENCHMARKS.md"
    page.write_text("".join(TOWERS_MARKERS))
    monkeypatch.setattr(sys, "argv", ["bench_e2e.py", "--read", str(file), "--page", str(page)])
    file.write_text(json.dumps([result]))
    bench_e2e.main()
    out = capsys.readouterr().out
    assert "Qwen3-VL-8B, 448²: kernels and copies of 60 µs in a span of 100 µs under the profiler" in out
    assert "without the profiler, takes 70 µs" in out
    assert "| `a_kernel` | 2 | 60 | 100% |" in out
    assert "4 of 4 bars met." in out
    assert e2e_report.block([result], for_readers=True) in page.read_text()
    file.write_text(json.dumps([result | {"failed": [("672²", "out of memory")]}]))
    with pytest.raises(SystemExit, match="1"):
        bench_e2e.main()
    assert "- Failed: 672²: out of memory." in capsys.readouterr().out


def test_chart(tmp_path):
    assert e2e_chart.milliseconds_by_label(row_of()) == pytest.approx(
        {"qwenvit": 2, "vLLM, best mode": 3, "transformers FlashAttention, best": 8, "transformers sdpa": 12}
    )
    pytest.importorskip("matplotlib")
    one, few = result_of(row_of(), row_of("1344²")), result_of(row_of("448²", times={"qwenvit": {"median": 0.01}}))
    for results in ([one, few | {"model": "Qwen2.5-VL-7B"}, one | {"model": "Qwen2-VL-7B"}], [result_of()]):
        e2e_chart.draw(results, tmp_path / "chart.png")
        assert (tmp_path / "chart.png").read_bytes().startswith(b"\x89PNG")


def test_arguments(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["bench_e2e.py", "--help"])
    with pytest.raises(SystemExit) as exit_:
        bench_e2e.main()
    assert exit_.value.code == 0
    assert "random sizes, profile, graphs, cold process" in " ".join(capsys.readouterr().out.split())
    for wrong in (["--models", "Qwen9"], ["--cases", "449²"], ["--rivals", "fa9"]):
        monkeypatch.setattr(sys, "argv", ["bench_e2e.py", *wrong])
        with pytest.raises(SystemExit):
            bench_e2e.main()
        assert f"invalid choice: '{wrong[1]}'" in capsys.readouterr().err
    if not torch.cuda.is_available():
        monkeypatch.setattr(sys, "argv", ["bench_e2e.py"])
        with pytest.raises(SystemExit, match="needs a GPU"):
            bench_e2e.main()
