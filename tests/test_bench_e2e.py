"""`scripts/bench_e2e.py`: what it measures, what it refuses, and what it writes. Nothing here is timed."""

import argparse
import json
import sys
from dataclasses import replace

import bench_e2e
import e2e_report
import e2e_rivals
import e2e_towers
import pytest
import torch
import torch.nn.functional as F
from e2e_cases import BARS, MODELS, Case, all_cases, gate_case, picture_of, pixel_values, random_sizes, read_vllm
from hf_towers import build_tower
from kernel_timing import Ceilings
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from towers import SMALL, ours_from

from qwenvit import parity
from qwenvit.grid import GridPlan
from qwenvit.registry import published_config

CPU = torch.device("cpu")
NARROW = {
    "qwen2_vl": replace(SMALL["qwen2_vl"], depth=2),
    "qwen2_5_vl": replace(SMALL["qwen2_5_vl"], depth=2, fullatt_block_indexes=(1,)),
    "qwen3_vl": replace(SMALL["qwen3_vl"], depth=2, deepstack_visual_indexes=(0,)),
}


def dense_attention(q, k, v, cu_seqlens, longest):
    """What a varlen kernel computes, by a mask."""
    segment = (torch.arange(len(q))[:, None] >= cu_seqlens[1:]).sum(1)
    q, k, v = (x.transpose(0, 1) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=segment[:, None] == segment).transpose(0, 1)


def test_cases_are_those_of_the_issue():
    assert list(MODELS) == ["Qwen2-VL-7B", "Qwen2.5-VL-7B", "Qwen3-VL-4B", "Qwen3-VL-8B"]
    for name in MODELS.values():
        config = published_config(name)
        cases = {case.name: case for case in all_cases(config)}
        side = {14: (32, 48, 64, 96), 16: (28, 42, 56, 84)}[config.patch_size]
        assert [cases[f"{pixels}²"].grid for pixels in (448, 672, 896, 1344)] == [((1, n, n),) for n in side]
        assert all(cases[f"{patches} patches"].patches == patches for patches in (8836, 15376, 24336))
        assert [len(cases[f"batch of {count}"].grid) for count in (1, 8, 32)] == [1, 8, 32]
        assert len(set(cases["batch of 8"].grid)) == 8
        video = cases["16 frames, 448²"]
        assert (video.frames, video.grid) == (16, ((8, side[0], side[0]),))
        assert len(cases) == 11
        assert all(h % 2 == w % 2 == 0 for case in (*cases.values(), gate_case(config)) for _, h, w in case.grid)
        sizes = random_sizes(config)
        assert len(sizes) == 20
        assert sizes == random_sizes(config)
    assert {model for model, _ in BARS} == {"Qwen2.5-VL-7B", "Qwen3-VL-8B"}
    assert all(case in cases for _, case in BARS)


def test_pixel_values_are_those_of_a_still():
    config = published_config("qwen3_vl-8b")
    case = Case("x", ((1, 4, 6),))
    pixels = pixel_values(case, config, CPU, torch.float32)
    assert pixels.shape == (24, config.patch_dim)
    picture = picture_of(pixels, case, config)
    assert picture.shape == (1, 3, 64, 96)
    second = pixels[1].view(3, 2, 16, 16)  # to the right of the first, in the same merge block
    assert torch.equal(picture[0, :, :16, 16:32], second[:, 0])
    assert torch.equal(second[:, 0], second[:, 1])
    assert torch.equal(picture[0, :, 16:32, :16], pixels[2].view(3, 2, 16, 16)[:, 0])
    assert torch.equal(picture[0, :, :16, 32:48], pixels[4].view(3, 2, 16, 16)[:, 0])


@pytest.mark.parametrize("family", NARROW)
def test_rivals_do_the_same_work(family):
    config = NARROW[family]
    tower = build_tower(config)
    name = e2e_rivals.register("flash_dense", dense_attention)
    whole = e2e_rivals.compile_whole(tower, name, backend="eager")  # fullgraph: raises where it breaks
    for case in (gate_case(config), Case("image", ((1, 8, 12),))):
        pixels = pixel_values(case, config, CPU, torch.float32)
        expected = e2e_rivals.eager(tower, "sdpa")(case, pixels)()
        for prepare in (e2e_rivals.eager(tower, name), e2e_rivals.compiled(whole, config, graph=False)):
            found = prepare(case, pixels)()
            assert len(found) == len(expected) == 1 + len(config.deepstack_visual_indexes)
            assert max(e2e_towers.errors(found, expected)) < 1e-5


def test_rivals_asked_for():
    tower = build_tower(NARROW["qwen3_vl"])
    config = NARROW["qwen3_vl"]
    names = list(e2e_rivals.transformers_rivals(tower, config, e2e_rivals.NAMES, with_fa3=True))
    assert names == [
        "transformers sdpa",
        "transformers FA2",
        "transformers FA3",
        "transformers compiled",
        "transformers compiled + graph",
    ]
    assert "transformers FA3" not in e2e_rivals.transformers_rivals(tower, config, e2e_rivals.NAMES, with_fa3=False)


def test_timm_without_a_tower_says_so(tmp_path):
    with pytest.raises(ValueError, match="timm has no such tower"):
        e2e_rivals.timm_tower(tmp_path, torch.nn.Identity(), NARROW["qwen2_5_vl"])


def a_bench(monkeypatch, factor=1.0):
    """On a CPU, with transformers' tower in bf16 for ours, its results times a factor; and a rival that fails."""
    config = NARROW["qwen3_vl"]
    monkeypatch.setattr(e2e_towers, "CUDA", CPU)

    def set_up(prepare, case, pixels):
        call = prepare(case, pixels)
        return call, 2**20, 0.5, call()

    def fail(case, pixels):
        raise ValueError("takes no such input")

    monkeypatch.setattr(e2e_towers, "set_up", set_up)
    monkeypatch.setattr(e2e_towers, "take_turns", lambda calls, *_: {name: [0.002, 0.004, 0.003] for name in calls})
    bench = object.__new__(e2e_towers.Bench)
    bench.config, bench.padding, bench.gate, bench.absent = config, 0, [], {"transformers FA3": "no library"}
    bench.hf, bench.truth = build_tower(config, dtype=torch.bfloat16), build_tower(config)
    bench.truth.load_state_dict(bench.hf.state_dict())
    own = e2e_rivals.eager(bench.hf, "sdpa")
    bench.ours = lambda case, pixels: lambda: [factor * x for x in own(case, pixels)()]
    bench.rivals = {"transformers sdpa": own, "other": fail, "wrong": lambda c, p: lambda: [-x for x in own(c, p)()]}
    return bench


def result_of(row, **more):
    gate = parity.Check("block 0: error / transformers' error", 1.0, 1.05)
    return {"model": "Qwen3-VL-8B", "machine": "a GPU", "gemm": 7e14, "gate": gate.name, "load": 1.0,
            "rows": [row], "sizes": [], "profiles": {}, "failed": []} | more  # fmt: skip


def test_a_row(monkeypatch):
    row = a_bench(monkeypatch).measure(Case("448²", ((1, 8, 8),)))
    assert row["passed"]
    assert row["times"]["qwenvit"] == pytest.approx({"median": 0.003, "p10": 0.0022, "p90": 0.0038, "rounds": 3})
    assert set(row["times"]) == {"qwenvit", "transformers sdpa"}
    assert row["missing"]["other"] == "ValueError: takes no such input"
    assert row["missing"]["wrong"].startswith("ValueError: other work: output 0")
    text = e2e_report.section(result_of(json.loads(json.dumps(row))))
    assert "| 448² | 64 | **3.00** (2.20–3.80) |" in text
    assert "| 3.00 | 1.00× | 1.00× | 3.00 ms (≤ 2.6; moonshot 2.2) ✗, 1.00× sdpa (≥ 5) ✗, 1.00× the best" in text
    assert "- Not measured: other: ValueError: takes no such input (448²)." in text
    head, rule, line = e2e_report.table(result_of(row)).splitlines()
    assert head.count("|") == rule.count("|") == line.count("|")


def test_no_speedup_where_parity_fails(monkeypatch):
    case = Case("448²", ((1, 8, 8),))
    row = a_bench(monkeypatch, factor=1.05).measure(case)
    assert not row["passed"]
    text = e2e_report.section(result_of(row))
    assert "×" not in text
    assert "parity failed: output 0: error" in text
    assert not any(e2e_report.judged(result_of(row)))
    row = a_bench(monkeypatch, factor=float("nan")).measure(case)
    assert not row["passed"]
    bench = a_bench(monkeypatch)
    row["times"] |= {name: {"median": 0.002} for name in (e2e_report.TIMM, e2e_report.NO_DEEPSTACK)}
    assert not e2e_report.over_timm(result_of(row))
    assert e2e_report.over_timm(result_of(row | {"passed": True})) == ["1.00× (448²)"]
    bench.gate = [parity.Check("tokens: relative L2 in fp32", 2e-5, 1e-5)]
    assert bench.measure(case)["failure"] == "tokens: relative L2 in fp32"


def test_a_failure_leaves_the_rest(monkeypatch, tmp_path):
    bench = a_bench(monkeypatch)
    measured, bench.load = bench.measure, 1.0
    bench.gate = [parity.Check("tokens: relative L2 in fp32", 1e-6, 1e-5)]

    def measure(case):
        if case.name == "672²":
            raise RuntimeError("out of memory\nat length")
        return measured(case)

    bench.measure, bench.sizes, bench.profile = measure, list, lambda _: {"span": 1.0, "kernels": []}
    monkeypatch.setattr(bench_e2e, "Bench", lambda *_: bench)
    monkeypatch.setattr(bench_e2e, "machine", lambda _, commit: f"a GPU, {commit}")
    figures = {("Qwen3-VL-8B", 36, False): {"vLLM eager": 0.0015}}
    monkeypatch.setattr(bench_e2e, "read_vllm", lambda _: figures)
    monkeypatch.setattr(bench_e2e, "all_cases", lambda _: [Case(f"{n}²", ((1, 6, n // 56),)) for n in (336, 448, 672)])
    options = argparse.Namespace(vllm=tmp_path, cases=["336²", "448²", "672²", "profile", "random sizes"], commit="abc")
    result = bench_e2e.run_model("Qwen3-VL-8B", options, Ceilings(4e12, 7e14))
    assert result["failed"] == ["672²: RuntimeError: out of memory"]
    assert [row["name"] for row in result["rows"]] == ["336²", "448²"]
    assert list(result["profiles"]) == ["448²"]
    first, second = result["rows"]
    assert first["times"]["vLLM eager"] == {"median": 0.0015}
    assert second["missing"]["vLLM"] == "its own bench has not this case"
    assert "nearest its bound: tokens: relative L2 in fp32 1e-06 (≤ 1e-05)" in e2e_report.block([result])


def test_the_headline_is_over_the_best_rival():
    times = {
        "qwenvit": 2,
        "transformers sdpa": 12,
        "vLLM compile + graph": 3,
        "timm": 1,
        "qwenvit without DeepStack": 1,
    }
    row = {"times": {name: {"median": ms / 1e3} for name, ms in times.items()}, "passed": True, "frames": 16}
    assert e2e_report.value_of("over the best", row) == pytest.approx(1.5)
    assert e2e_report.value_of("over sdpa", row) == pytest.approx(6)
    assert e2e_report.value_of("frames/s", row) == pytest.approx(8000)


def test_random_sizes_are_judged_by_the_worst():
    sizes = [{"name": "16×18", "ours": 1.05, "exact": 1.0}, {"name": "20×18", "ours": 1.2, "exact": 1.0}]
    assert e2e_report.sizes_verdict(sizes) == (
        "2 random sizes over graphs of their exact shapes: 1.05 to 1.20 (worst 20×18 patches; each ≤ 1.12) ✗",
        False,
    )
    assert e2e_report.sizes_verdict(sizes[:1])[1]


def test_flops_are_those_that_torch_counts(monkeypatch):
    bench = a_bench(monkeypatch)
    case = Case("images and a video", ((1, 8, 12), (2, 4, 6), (1, 2, 2)))
    ours = ours_from(bench.truth, bench.config)
    pixels = pixel_values(case, bench.config, CPU, torch.float32)
    plan = GridPlan.build(case.grid_thw(), bench.config)
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        ours(pixels, plan)
    assert bench.measure(case)["flops"] == counter.get_total_flops()


def test_figures_of_vllm(tmp_path):
    rows = [{"case": "448px", "patches": 1024, "eager": [15.0, 15.4], "graph": [5.3, 5.4], "mgr_exact": [5.2, 5.6]},
            {"case": "16f x 448px", "patches": 8192, "eager_meta": [1, 2], "mgr_auto": [1, 2]}]  # fmt: skip
    for row in rows:
        row |= {"model": "qwen25", "mode": "eager"}
    (tmp_path / "qwen25_eager.json").write_text(json.dumps({"model": "qwen25", "mode": "eager", "rows": rows}))
    found = read_vllm(tmp_path)
    assert found["Qwen2.5-VL-7B", 1024, False] == {"vLLM eager": 0.0154, "vLLM eager + graph": 0.0054}
    assert found["Qwen2.5-VL-7B", 8192, True] == {}
    (tmp_path / "qwen25_eager.json").write_text("{}")
    with pytest.raises(ValueError, match="no figures"):
        read_vllm(tmp_path)


def test_readme_block(tmp_path):
    readme = tmp_path / "README.md"
    readme.write_text(f"before\n{e2e_report.BEGIN}\nold\n{e2e_report.END}\nafter\n")
    for text in ("first", "| a | b |"):
        e2e_report.rewrite(readme, text)
        assert readme.read_text() == f"before\n{e2e_report.BEGIN}\n\n{text}\n\n{e2e_report.END}\nafter\n"
    for broken in ("nothing", e2e_report.END + e2e_report.BEGIN, 2 * (e2e_report.BEGIN + e2e_report.END)):
        readme.write_text(broken)
        with pytest.raises(ValueError, match="expected one"):
            e2e_report.rewrite(readme, "text")
        assert readme.read_text() == broken


def test_earlier_figures_are_read(monkeypatch, tmp_path, capsys):
    row = a_bench(monkeypatch).measure(Case("448²", ((1, 8, 8),)))
    profile = {"span": 100.0, "kernels": [{"name": "a_kernel", "calls": 2, "us": 60.0}]}
    result = result_of(row, profiles={"448²": profile}, sizes=[{"name": "16×18", "ours": 1.05, "exact": 1.0}])
    (tmp_path / "a.json").write_text(json.dumps([result]))
    (tmp_path / "README.md").write_text(e2e_report.BEGIN + e2e_report.END)
    arguments = ["--read", str(tmp_path / "a.json"), "--readme", str(tmp_path / "README.md")]
    monkeypatch.setattr(sys, "argv", ["bench_e2e.py", *arguments])
    bench_e2e.main()
    out = capsys.readouterr().out
    assert "Qwen3-VL-8B, 448²: 100 µs on the GPU, of which 40 between kernels" in out
    assert "| `a_kernel` | 2 | 60 | 60% |" in out
    assert "1 of 4 bars met." in out
    (tmp_path / "a.json").write_text(json.dumps([result | {"failed": ["672²: out of memory"]}]))
    with pytest.raises(SystemExit, match="1"):
        bench_e2e.main()
    assert "- Failed: 672²: out of memory." in capsys.readouterr().out
    (tmp_path / "a.json").write_text(json.dumps([result]))
    bench_e2e.main()
    assert e2e_report.block([result]) in (tmp_path / "README.md").read_text()
    pytest.importorskip("matplotlib")
    e2e_report.draw([result], tmp_path / "chart.png")
    assert (tmp_path / "chart.png").read_bytes().startswith(b"\x89PNG")


def test_arguments(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["bench_e2e.py", "--help"])
    with pytest.raises(SystemExit) as exit_:
        bench_e2e.main()
    assert exit_.value.code == 0
    assert "random sizes, profile" in " ".join(capsys.readouterr().out.split())
    for wrong in (["--models", "Qwen9"], ["--cases", "449²"], ["--rivals", "fa4"]):
        monkeypatch.setattr(sys, "argv", ["bench_e2e.py", *wrong])
        with pytest.raises(SystemExit):
            bench_e2e.main()
        assert f"invalid choice: '{wrong[1]}'" in capsys.readouterr().err
    if not torch.cuda.is_available():
        monkeypatch.setattr(sys, "argv", ["bench_e2e.py"])
        with pytest.raises(SystemExit, match="needs a GPU"):
            bench_e2e.main()
