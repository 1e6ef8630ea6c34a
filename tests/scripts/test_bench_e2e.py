"""`scripts/bench_e2e.py`: the cases it runs, and the rivals whose work it does not accept. Nothing here is timed."""

import json

import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from common.hf_towers import build_tower
from common.tower_inputs import Case, picture_of, pixel_values
from e2e import model_bench
from e2e.cases import BARS, MODELS, all_cases, parity_case, random_sizes
from peers import timm_tower, transformers_towers
from peers.rivals import RIVAL_NAMES
from peers.vllm_figures import read_vllm
from qwenvit import parity
from qwenvit.config.published import published_config
from qwenvit.plan.grid_plan import GridPlan
from support.towers import narrow, ours_from

CPU = torch.device("cpu")
NARROW = {
    family: narrow(family, depth=2, hidden_size=96, num_heads=4, intermediate_size=192)
    for family in ("qwen2_vl", "qwen2_5_vl", "qwen3_vl")
}


def dense_attention(q, k, v, cu_seqlens, max_seqlen):
    """Compute what a varlen kernel computes, by a mask."""
    segment = (torch.arange(len(q))[:, None] >= cu_seqlens[1:]).sum(1)
    q, k, v = (x.transpose(0, 1) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=segment[:, None] == segment).transpose(0, 1)


def test_cases_of_each_model():
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
        assert all(h % 2 == w % 2 == 0 for case in (*cases.values(), parity_case(config)) for _, h, w in case.grid)
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
    second = pixels[1].view(3, 2, 16, 16)  # to the right of the first patch, in the same merge block
    assert torch.equal(picture[0, :, :16, 16:32], second[:, 0])
    assert torch.equal(second[:, 0], second[:, 1])
    assert torch.equal(picture[0, :, 16:32, :16], pixels[2].view(3, 2, 16, 16)[:, 0])
    assert torch.equal(picture[0, :, :16, 32:48], pixels[4].view(3, 2, 16, 16)[:, 0])


@pytest.mark.parametrize(
    "family", [pytest.param("qwen2_vl", marks=pytest.mark.long), *(family for family in NARROW if family != "qwen2_vl")]
)
def test_rivals_do_the_same_work(family):
    config = NARROW[family]
    tower = build_tower(config)
    name = transformers_towers.register_attention("flash_dense", dense_attention)
    compiled = transformers_towers.compile_tower(tower, name, backend="eager")  # raises if the graph breaks
    for case in (parity_case(config), Case("image", ((1, 8, 12),))):
        pixels = pixel_values(case, config, CPU, torch.float32)
        expected = transformers_towers.eager(tower, "sdpa")(case, pixels)()
        eager = transformers_towers.eager(tower, name)
        for prepare in (eager, transformers_towers.compiled(compiled, config, in_graph=False)):
            found = prepare(case, pixels)()
            assert len(found) == len(expected) == 1 + len(config.deepstack_visual_indexes)
            assert max(model_bench.relative_errors(found, expected)) < 1e-5


def test_rivals_asked_for():
    tower = build_tower(NARROW["qwen3_vl"])
    config = NARROW["qwen3_vl"]
    compiled = [f"compiled {library}{graph}" for library in ("FA2", "FA3", "FA4") for graph in ("", " + graph")]
    for loaded, expected in (
        (["fa3", "fa4"], ["sdpa", "FA2", "FA3", "FA4", *compiled[2:]]),
        (["fa3"], ["sdpa", "FA2", "FA3", *compiled[2:4]]),
        (["fa4"], ["sdpa", "FA2", "FA4", *compiled[4:]]),
        ([], ["sdpa", "FA2", *compiled[:2]]),
    ):
        names = list(transformers_towers.transformers_rivals(tower, config, RIVAL_NAMES, loaded))
        assert names == [f"transformers {name}" for name in expected]
    with pytest.raises(ValueError, match=r"kinds: expected some of .* got 'flashy'"):
        transformers_towers.transformers_rivals(tower, config, ["flashy"], ["fa3"])


def test_timm_without_a_tower_says_so(tmp_path):
    with pytest.raises(ValueError, match="timm has no such tower"):
        timm_tower.timm_tower(tmp_path, torch.nn.Identity(), NARROW["qwen2_5_vl"])


def bench_on_cpu(monkeypatch, factor=1.0):
    """Return a bench whose qwenvit is transformers' bf16 tower, its outputs times a factor; two rivals fail."""
    config = NARROW["qwen3_vl"]
    monkeypatch.setattr(model_bench, "CUDA", CPU)

    def fail(case, pixels):
        raise ValueError("takes no such input")

    def time_interleaved(calls, rounds, max_seconds, min_rounds, every_round):
        assert rounds >= 15
        assert every_round == {"qwenvit"}
        return {name: [0.002, 0.004, 0.003] for name in calls}

    monkeypatch.setattr(model_bench, "peak_memory", lambda prepare: (2**20, prepare()()))
    monkeypatch.setattr(model_bench, "time_interleaved", time_interleaved)
    bench = object.__new__(model_bench.ModelBench)
    bench.config, bench.padding_bytes, bench.parity_checks = config, 2**19, []
    bench.missing = {"transformers FA3": "no library"}
    bench.hf, bench.truth = build_tower(config, dtype=torch.bfloat16), build_tower(config)
    bench.truth.load_state_dict(bench.hf.state_dict())
    sdpa = transformers_towers.eager(bench.hf, "sdpa")
    bench.prepare_qwenvit = lambda case, pixels: lambda: [factor * x for x in sdpa(case, pixels)()]
    bench.rivals = {"transformers sdpa": sdpa, "other": fail, "wrong": lambda c, p: lambda: [-x for x in sdpa(c, p)()]}
    return bench


def test_a_row(monkeypatch):
    row = json.loads(json.dumps(bench_on_cpu(monkeypatch).measure(Case("448²", ((1, 8, 8),)))))
    assert row["passed"]
    assert row["times"]["qwenvit"] == pytest.approx({"median": 0.003, "p10": 0.0022, "p90": 0.0038, "rounds": 3})
    assert set(row["times"]) == {"qwenvit", "transformers sdpa"}
    assert row["missing"]["other"] == "ValueError: takes no such input"
    assert row["missing"]["wrong"].startswith("ValueError: other work: output 0")
    assert row["missing"]["transformers FA3"] == "no library"
    assert row["peak"] == {"qwenvit": 1.5 * 2**20, "transformers sdpa": 2**20}


def test_parity_is_checked(monkeypatch):
    case = Case("448²", ((1, 8, 8),))
    for factor in (1.05, float("nan")):
        row = bench_on_cpu(monkeypatch, factor).measure(case)
        assert not row["passed"]
        assert row["failure"].startswith("output 0: error")
    bench = bench_on_cpu(monkeypatch)
    bench.parity_checks = [parity.Check("tokens: relative L2 in fp32", 2e-5, 1e-5)]
    assert bench.measure(case)["failure"] == "tokens: relative L2 in fp32"


def test_flops_equal_those_that_torch_counts(monkeypatch):
    bench = bench_on_cpu(monkeypatch)
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
    with pytest.raises(ValueError, match="expected figures of vLLM's benchmark, got none"):
        read_vllm(tmp_path)
