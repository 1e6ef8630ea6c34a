"""`scripts/bench_vllm.py`: bars, tables and exit codes, from figures that are made up."""

import argparse
import copy
import json
import math
import sys

import bench_vllm
import pytest

from vllm_bench import report, verdicts
from vllm_bench.cases import ATTENTION, BEST, CROWD_CASE, MODE_NAMES, MODELS, MODES, OFF, PIXELS, PLUGIN
from vllm_bench.engine_options import SCRIPTS
from vllm_bench.model_run import empty_result

QWEN2_5, QWEN3 = MODELS


def times(median):
    return {"median": median, "p10": median * 0.9, "p90": median * 1.2, "rounds": 12}


def result_of(model=QWEN2_5):
    tower = {OFF: 0.0380, BEST: 0.0140, PLUGIN: 0.0097, ATTENTION: 0.030, "attention-best": 0.0120}
    whole = {OFF: 0.105, BEST: 0.070, PLUGIN: 0.060, PIXELS: 0.050}
    video = {name: times(4 * seconds) for name, seconds in tower.items()} | {BEST: times(0.060)}
    rows = [
        {"name": "896²", "patches": 4096, "frames": 0, "times": {name: times(s) for name, s in tower.items()}},
        {"name": "16 frames, 448²", "patches": 8192, "frames": 16, "times": video},
    ]
    for row in rows:
        row |= {"errors": {name: [0.0123] for name in tower}, "failures": {name: [] for name in tower}}
    request_row = {"name": "896²", "tokens": 1024, "times": {name: times(s) for name, s in whole.items()}}
    request_row["stages"] = {name: {"processor": times(0.02), "tower": times(0.01)} for name in whole}
    modes = {name: {"errors": [0.0123], "rms": 0.1, "most": 0.4, "same": 16, "failures": []} for name in whole}
    engine = {"vllm": "0.24.0", "tower": "vllm.Tower", "load_seconds": 99.0, "log": ["] qwenvit: tower mode"]}
    engine["memory"] = 25 * 2**30
    engine["graphs"] = {"sizes": [256, 1024], "hits": 90, "misses": 1}
    options = argparse.Namespace(text_layers={model: 28}, tiny=False)
    return empty_result(model, options) | {
        "machine": "NVIDIA H200, driver 1",
        "engines": dict.fromkeys(whole, engine),
        "tower": rows,
        "requests": [request_row],
        "crowd": {"name": CROWD_CASE, "images": 64, "times": {OFF: times(3.2), BEST: times(3.0), PIXELS: times(1.6)}},
        "agreement": {"requests": 16, "modes": modes, "other": 1.8, "same_bits": True},
    }


def test_bars():
    found = {verdict.name: verdict for verdict in verdicts.verdicts(result_of())}
    measured = 0.97 * verdicts.measured_ratios()[QWEN2_5, "896²"]
    assert 1.3 < measured < 1.5
    tower = found["896², tower over vLLM's best"]
    assert (tower.value, tower.limit, tower.met) == (pytest.approx(14.0 / 9.7), pytest.approx(measured), True)
    assert found["896², attention mode over vLLM"].value == pytest.approx(38 / 30)
    assert found["896², attention mode, best settings over vLLM, best settings"].met
    assert not any("16 frames" in name and "attention" in name for name in found)
    first = found["896², first token, plugin with pixels to vLLM's best"]
    assert (first.value, first.limit, first.met) == (pytest.approx(50 / 70), 0.8, True)
    assert found["896², first token, plugin to vLLM's best"].limit == 1.0
    assert found[f"{CROWD_CASE}, images/s, plugin with pixels over vLLM's best"].value == pytest.approx(3.0 / 1.6)
    assert all(verdict.met for verdict in found.values())
    attention = [v for v in verdicts.verdicts(result_of(QWEN3)) if "attention" in v.name]
    assert attention == []


def test_bars_that_are_missed():
    result = result_of()
    result["requests"][0]["times"][PIXELS]["median"] = 0.0571
    result["requests"][0]["times"][PLUGIN]["median"] = 0.0701
    bar = 0.97 * verdicts.measured_ratios()[QWEN2_5, "896²"]
    result["tower"][0]["times"][PLUGIN]["median"] = 1.001 * 0.0140 / bar
    result["tower"][0]["times"][ATTENTION]["median"] = 0.0381
    result["crowd"]["times"][PIXELS]["median"] = 3.1
    missed = {verdict.name for verdict in verdicts.verdicts(result) if not verdict.met}
    assert missed == {
        "896², tower over vLLM's best",
        "896², attention mode over vLLM",
        "896², first token, plugin to vLLM's best",
        "896², first token, plugin with pixels to vLLM's best",
        f"{CROWD_CASE}, images/s, plugin with pixels over vLLM's best",
    }


def test_never_slower_also_than_vllm_without_its_best_settings():
    result = result_of()
    result["requests"][0]["times"][OFF]["median"] = 0.055
    missed = {verdict.name for verdict in verdicts.verdicts(result) if not verdict.met}
    assert missed == {"896², first token, plugin to vLLM"}


def test_no_ratio_without_parity():
    result = result_of()
    result["tower"][0]["failures"][PLUGIN] = ["output 0: error 2.0e-02, vLLM's 1.2e-02"]
    result["agreement"]["modes"][PIXELS]["failures"] = ["log-probabilities: error 2, vLLM's 1"]
    assert not verdicts.passed(result)
    for verdict in verdicts.verdicts(result):
        broken = verdict.name.startswith("896², tower") or "pixels" in verdict.name
        assert math.isnan(verdict.value) == broken
        assert verdict.met != broken
    text = report.block([result], for_readers=True)
    assert "Parity failed: 896², plugin: output 0: error 2.0e-02" in text
    assert "Parity failed: requests, plugin with pixels: log-probabilities" in text
    row = next(line for line in text.splitlines() if line.startswith("| 896² | 4096"))
    assert row.split(" | ")[-3] == "–"
    result = result_of()
    result["agreement"] = None
    assert not verdicts.passed(result)
    assert math.isnan(verdicts.speedup(result, result["requests"][0], PIXELS, BEST))


def test_report():
    for_us, for_readers = (report.block([result_of(), result_of(QWEN3)], each) for each in (False, True))
    for text in (for_us, for_readers):
        assert "NVIDIA H200, driver 1\n\n### In vLLM, Qwen2.5-VL-7B" in text
        assert text.count("NVIDIA H200") == 1
        assert "| 896² | 4096 | 38.00 (34.20–45.60) | 14.00 (12.60–16.80) | **9.70** (8.73–11.64) |" in text
        assert "1.44× | 1.27× | 1.17× |" in text
        assert "**38.80** (34.92–46.56), 412 frames/s" in text
        assert "| 896² | 1024 | 105.0 (94.5–126.0) |" in text
        assert "0.86× | 0.71× |" in text
        assert "40.0 (33.3–44.4) | – | 1.88× |" in text or "40.0 (33.3–44.4) | 1.88× |" in text
        assert "| 896² | plugin | 20.00 (18.00–24.00) | – | 10.00 (9.00–12.00) | – | – | – |" in text
        assert "vLLM 0.24.0; 28 of 28 text layers" in text
        assert "Embeddings with pixels and without: the same bits" in text
    assert "bars met" in for_us
    assert "vllm.Tower, 99 s to start, 25.0 GiB" in for_us
    assert "CUDA graphs of 256, 1024 tokens, 90 images and videos in them, 1 without" in for_us
    assert "✗" not in for_us.split("### In vLLM, Qwen3")[0]
    assert "bars met" not in for_readers
    assert "tower mode" not in for_readers


def run_main(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["bench_vllm.py", *map(str, arguments)])
    bench_vllm.main()


def test_reading_figures(monkeypatch, capsys, tmp_path):
    figures, page = tmp_path / "vllm.json", tmp_path / "page.md"
    figures.write_text(json.dumps([result_of()]))
    page.write_text("above\n{}\nold\n{}\nbelow\n".format(*report.VLLM_MARKERS))
    run_main(monkeypatch, "--read", figures, "--page", page)
    assert "bars met" in capsys.readouterr().out
    begin, end = report.VLLM_MARKERS
    text = page.read_text()
    assert text.startswith(f"above\n{begin}\n\nNVIDIA H200")
    assert text.endswith(f"{end}\nbelow\n")
    assert "old" not in text
    failed = copy.deepcopy(result_of())
    failed["failed"] = [["best, start", "no answer in time"]]
    figures.write_text(json.dumps([failed]))
    with pytest.raises(SystemExit) as error:
        run_main(monkeypatch, "--read", figures)
    assert error.value.code == 1
    assert "Failed: best, start: no answer in time" in capsys.readouterr().out


def test_text_layers_that_a_model_cannot_have(monkeypatch, capsys):
    with pytest.raises(SystemExit):
        run_main(monkeypatch, "--models", QWEN3, "--text-layers", 2)
    assert f"--text-layers: expected 3 to 36 for {QWEN3}, got 2" in capsys.readouterr().err


def test_the_page_has_the_markers():
    text = (SCRIPTS.parent / "BENCHMARKS.md").read_text()
    begin, end = report.VLLM_MARKERS
    assert text.count(begin) == text.count(end) == 1
    assert text.index(begin) < text.index(end)


def test_every_mode_has_a_name():
    assert tuple(MODES) == MODE_NAMES
    assert len({mode.name for mode in MODES.values()}) == len(MODES)
