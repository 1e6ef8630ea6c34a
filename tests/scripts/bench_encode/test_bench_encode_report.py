"""`scripts/bench_encode.py`: bars, tables, the page and the chart, from figures that are made up."""

import json
import sys
from pathlib import Path

import bench_encode
import pytest

from encode_bench import chart, model_run, report
from encode_bench.folders import FULL_HD, MIX, PHOTOS
from encode_bench.verdicts import (
    CPU_RIVAL,
    ENCODE,
    FEATURES,
    GPU_RIVAL,
    HF_RIVAL,
    LAST_MAP,
    PIPELINE,
    TOKENS,
    TOWER,
    VECTORS,
    verdicts,
)


def row_of(name=FULL_HD, **more):
    times = {ENCODE: 0.0315, TOWER: 0.03, GPU_RIVAL: 0.06, CPU_RIVAL: 0.1, HF_RIVAL: 0.09}
    row = {"name": name, "images": 64, "patches": 10626.0, "times": times, "cold": 0.036}
    return row | {"stages": {"decode": 0.012, "copy": 0.00012, "preprocess": 0.00008}} | more


def result_of(*rows, **more):
    empty = model_run.empty_result("Qwen3-VL-8B") | {"machine": "a GPU, driver 1", "threads": 4, "pictures": "drawings"}
    return empty | {"ceilings": "Ceilings: 4.20 TB/s", "rows": list(rows)} | more


EXTRAS = {
    "one": {ENCODE: 0.045, "decode": 0.0135, TOWER: 0.030},
    "preprocessing": {"seconds": 0.00015, "bytes": 18_900_000, "floor": 4.5e-6},
    "video": {ENCODE: 1.2, TOWER: 1.0, "frames": 64, "patches": 340_032},
    "features": [
        {"side": 448, "layers": 4, TOWER: 0.0025, LAST_MAP: 0.0024, FEATURES: 0.0027},
        {"side": 896, "layers": 4, TOWER: 0.0081, LAST_MAP: 0.008, FEATURES: 0.0083},
    ],
    "data set": {"images": 2000, "bytes": 5_600_000_000, PIPELINE: 7.6, VECTORS: 7.8, TOKENS: 9.5, "disk": 8.0},
    "memory": {"images": 5000, "first": 500, "before": 2_000_000_000, "most": 2_150_000_000},
}


def test_verdicts():
    slow = row_of(MIX, times=row_of()["times"] | {ENCODE: 0.0348})
    found = verdicts(result_of(row_of(), row_of("4000×3000"), slow, **EXTRAS))
    assert [str(verdict) for verdict in found] == [
        "1920×1080: 1.05× (≤ 1.08) ✓",
        "mix of sizes: 1.16× (≤ 1.15) ✗",
        "mix of sizes, cold: 1.20× (≤ 1.4) ✓",
        "one file: 1.50 ms (≤ 2) ✓",
        "preprocessing: 0.15 ms (≤ 0.2) ✓",
        "video: 1.20× (≤ 1.1) ✗",
        "features, 896²: 1.04× (≤ 1.05) ✓",
        "data set, vectors: 1.03× (≤ 1.053) ✓",
        "data set, tokens: 1.19× (≤ 1.176) ✗",
        "host memory: 150.00 MB (≤ 200) ✓",
    ]
    assert verdicts(result_of()) == []


def test_a_section():
    text = report.section(result_of(row_of(), **EXTRAS), for_readers=False)
    rivals = "60.00 (1.9×) | 100 (3.2×) | 90.00 (2.9×) |"
    assert f"| 1920×1080 | 64 | 10626 | 30.00 | **31.50** | 31.7 | 1.05× | 1.20× | {rivals}" in text
    assert "| 1920×1080 | 12.00 / 4 = 3.00 | 0.120 | 0.080 | 30.000 | 1.500 |" in text
    assert "- 6 of 8 bars met: " in text
    vectors, tokens = "256 images/s with vectors alone, 0.97 of the pipeline's 263", "211 with tokens (5.6 GB), 0.84 of"
    assert f"A data-set job over 2000 files of 640×480: {vectors}; {tokens} the disk's speed (the disk" in text
    assert "45.00 ms, of which decoding 13.50 and the tower 30.00: 1.50 ms beyond." in text
    assert "on the GPU: 0.150 ms; moving its 18.9 MB takes 4.5 µs." in text
    assert "64 frames of 1920×1080 (340032 patches): `encode_video` 1200 ms, tower alone 1000 ms, 1.20×." in text
    maps = "448² 2.70 ms, 1.13× the last layer's alone (whole tower 2.50 ms); 896² 8.30 ms, 1.04× the last layer's"
    assert f"Maps of four layers of one image from its pixel values: {maps}" in text
    assert "2000 MB after 500, +150 MB at the most after that." in text
    for table in (report.folders_table(result_of(row_of())), report.stages_table(result_of(row_of()))):
        assert len({line.count("|") for line in table.splitlines()}) == 1
    for_readers = report.block([result_of(row_of(), **EXTRAS)], for_readers=True)
    assert "bars met" not in for_readers
    assert for_readers.startswith("![")
    assert "\n\na GPU, driver 1\n\nCeilings: 4.20 TB/s. The files were made of drawings." in for_readers
    assert "do not add up" in for_readers


def test_the_page_is_rewritten_in_place(monkeypatch, tmp_path, capsys):
    file, page = tmp_path / "a.json", tmp_path / "BENCHMARKS.md"
    page.write_text(f"before\n{''.join(report.ENCODE_MARKERS)}\nafter\n")
    monkeypatch.setattr(sys, "argv", ["bench_encode.py", "--read", str(file), "--page", str(page)])
    for results in ([result_of(row_of())], [result_of(row_of(PHOTOS), **EXTRAS)]):
        file.write_text(json.dumps(results))
        bench_encode.main()
        block, (begin, end) = report.block(results, for_readers=True), report.ENCODE_MARKERS
        assert page.read_text() == f"before\n{begin}\n\n{block}\n\n{end}\nafter\n"
        assert "bars met" in capsys.readouterr().out
    file.write_text(json.dumps([result_of(failed=[("small", "ParityError: x")])]))
    with pytest.raises(SystemExit, match="1"):
        bench_encode.main()


def test_the_page_of_this_repository_has_the_markers():
    text = (Path(bench_encode.__file__).parent.parent / "BENCHMARKS.md").read_text()
    assert [text.count(marker) for marker in report.ENCODE_MARKERS] == [1, 1]


def test_chart(tmp_path):
    bars = chart.parts_by_bar(row_of(), threads=4)
    assert [sum(parts.values()) for parts in bars.values()] == pytest.approx([31.5, 3.2, 60, 100, 90])
    assert [len(parts) for parts in bars.values()] == [2, 3, 1, 1, 1]
    pytest.importorskip("matplotlib")
    for results in ([result_of(row_of(), row_of(MIX)), result_of(row_of())], [result_of()]):
        chart.draw(results, tmp_path / "chart.png")
        assert (tmp_path / "chart.png").read_bytes().startswith(b"\x89PNG")
