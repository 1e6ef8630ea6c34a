"""FlashAttention 4 as a rival in `bench_kernels.py` and `bench_e2e.py`, with a stub in place of its package."""

import functools
import json
import sys

import bench_kernels
import pytest
import torch

from common.hf_towers import build_tower
from common.machine import Ceilings
from common.tower_inputs import Case, pixel_values
from e2e import model_bench
from e2e.cases import parity_case
from kernel_bench.cases import Measurement, own_kernels
from kernel_bench.length_cases import OVER_FA4, length_case
from kernel_bench.report import mean_over_fa4
from peers import transformers_towers
from peers.attention import fa4, load_libraries
from support.towers import narrow

CPU = torch.device("cpu")
STUB = """
import stub_dependency
import torch
import torch.nn.functional as F

def flash_attn_func(q, k, v, *, softmax_scale):
    assert type(q) is torch.Tensor, "not to be traced"
    assert q.ndim == 4
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    out = F.scaled_dot_product_attention(q, k, v, scale=softmax_scale).transpose(1, 2).contiguous()
    return (out, None) if stub_dependency.RETURNS_TUPLE else out

def flash_attn_varlen_func(q, k, v, *, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, softmax_scale):
    assert q.ndim == 3
    assert cu_seqlens_q.dtype == cu_seqlens_k.dtype == torch.int32
    lengths = cu_seqlens_q.diff().tolist()
    assert lengths == cu_seqlens_k.diff().tolist()
    assert max_seqlen_q == max_seqlen_k == max(lengths)
    segments = zip(*(x[None].split(lengths, 1) for x in (q, k, v)))
    outs = [flash_attn_func(*segment, softmax_scale=softmax_scale) for segment in segments]
    if stub_dependency.RETURNS_TUPLE:
        return torch.cat([out for out, _ in outs], 1)[0], None
    return torch.cat(outs, 1)[0]
"""


@pytest.fixture(params=[True, False], ids=["tuple", "tensor"])
def folder(tmp_path, monkeypatch, request):
    """Return a folder with a stub of flash-attn-4. It needs a module that only the folder's .pth file makes known.

    Another flash-attn-4, which does not import, is installed already.
    """
    (tmp_path / "installed/flash_attn/cute").mkdir(parents=True)
    (tmp_path / "installed/flash_attn/cute/__init__.py").write_text("raise ImportError")
    (tmp_path / "flash_attn/cute").mkdir(parents=True)
    (tmp_path / "flash_attn/cute/__init__.py").write_text(STUB)
    (tmp_path / "needed").mkdir()
    (tmp_path / "needed/stub_dependency.py").write_text(f"RETURNS_TUPLE = {request.param}\n")
    (tmp_path / "stub.pth").write_text("needed\n")
    monkeypatch.setattr(sys, "path", [str(tmp_path / "installed"), *sys.path])
    names = ("flash_attn", "flash_attn.cute", "stub_dependency")
    for name in names:
        monkeypatch.delitem(sys.modules, name, raising=False)
    yield tmp_path
    for name in names:
        sys.modules.pop(name, None)


@pytest.mark.parametrize("lengths", [(33,), (8, 8, 8), (5, 40, 1)])
@pytest.mark.parametrize("head_dim", [64, 72])
def test_each_form_does_the_same_work(folder, monkeypatch, lengths, head_dim):
    libraries = load_libraries(fa4_folder=folder)
    assert list(libraries) == ["cuDNN", "FA2", "FA4"]
    case = length_case(lengths, {"FA4": libraries["FA4"]}, head_dim, heads=2, section="segments", title="x")
    dense = ["FA4 dense"] if len(set(lengths)) == 1 else []
    assert list(case.rivals) == ["FA4", "FA4 contiguous", *dense]
    monkeypatch.setattr(bench_kernels, "MAX_ERROR_RATIO", 2.0)  # in fp32 all errors are a few roundings
    errors = bench_kernels.check_errors(case, CPU, torch.float32)
    assert all(errors[name] < 1e-6 for name in case.rivals)


def test_what_each_form_reads(folder):
    libraries = load_libraries(fa4_folder=folder)
    case = length_case((6,), {"FA4": libraries["FA4"]}, heads=2, section="segments", title="x")
    inputs = case.make_inputs(CPU, torch.float32)
    expected = case.rivals["FA4"].call(inputs)
    only_contiguous = inputs | {"qkv": torch.full_like(inputs["qkv"], torch.nan)}
    assert case.rivals["FA4"].call(only_contiguous).isnan().all()
    assert all(part.is_contiguous() for part in inputs["contiguous"].unbind())
    for name in ("FA4 contiguous", "FA4 dense"):
        torch.testing.assert_close(case.rivals[name].call(only_contiguous), expected)


def test_a_folder_without_the_package(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "path", [tmp_path.as_posix()])
    monkeypatch.delitem(sys.modules, "flash_attn.cute", raising=False)
    monkeypatch.delitem(sys.modules, "flash_attn", raising=False)
    with pytest.raises(ModuleNotFoundError, match="flash_attn"):
        load_libraries(fa4_folder=tmp_path)


def rows_of(cases, speedup, slow=1.0, is_slow=lambda _: False):
    """Return rows as `bench_kernels.measure` does, with this speedup over FA4's fastest form, or `slow` for some."""
    rows = []
    for case in cases:
        times = {"FA4": 4.0, "FA4 contiguous": 3.0, "FA4 dense": 5.0}
        ours = 3.0 / (slow if is_slow(case) else speedup)
        measurement = Measurement({"qwenvit": ours} | times, Ceilings(1.0, 1.0), 1)
        results = [(target, *target.evaluate(measurement, [min(own_kernels())])) for target in case.targets["qwenvit"]]
        bars = [
            {"text": target.text, "unit": target.unit, "limit": target.limit, "at_most": target.at_most,
             "value": value, "met": met} for target, value, met in results
        ]  # fmt: skip
        rows.append({"section": case.section, "bars": bars})
    return rows


def fa4_cases():
    return bench_kernels.all_cases(["segments"], {"FA4": fa4})


def test_cases_with_a_target_over_fa4():
    lengths = (1024, 1764, 3136, 4096, 7056, 9216, 15376, 24336)
    found = [
        (case.head_dim, case.tokens, case.title)
        for case in fa4_cases()
        if any(target.text == OVER_FA4 for target in case.targets["qwenvit"])
    ]
    expected = [
        (head_dim, *shape)
        for head_dim in (64, 72, 80)
        for shape in (*((tokens, "one segment") for tokens in lengths), (16384, "16 segments of 1024"))
    ]
    assert sorted(found) == sorted(expected)
    assert not any(case.targets["portable"] for case in fa4_cases())


@pytest.mark.parametrize(("slowest", "met"), [(1.09, True), (1.0, True), (0.99, False)])
def test_each_case_has_to_be_as_fast_as_the_fastest_form_of_fa4(slowest, met):
    for case, row in zip(fa4_cases(), rows_of(fa4_cases(), slowest), strict=True):
        for bar in row["bars"]:
            assert (bar["text"], bar["value"], bar["met"]) == (OVER_FA4, pytest.approx(slowest), met), case.title


def test_the_mean_over_fa4():
    cases = fa4_cases()
    (bar,) = mean_over_fa4(rows_of(cases, 1.09), cases)
    assert (bar["value"], bar["met"]) == (pytest.approx(1.09), True)
    (bar,) = mean_over_fa4(rows_of(cases, 0.75, 2.0, lambda case: case.head_dim == 72), cases)
    assert bar["value"] == pytest.approx((2.0 * 0.75**2) ** (1 / 3))  # 1.04; the arithmetic mean would be 1.17
    assert not bar["met"]
    (bar,) = mean_over_fa4(rows_of(cases, 1.1, 0.5, lambda case: case.tokens == 24336), cases)
    assert not bar["met"]
    (bar,) = mean_over_fa4(rows_of(cases, 2.0)[1:], cases)
    assert bar["text"] == "over FA4 in geometric mean of 26 of 27 cases"
    assert not bar["met"]
    (bar,) = mean_over_fa4([], cases)
    assert not bar["met"]
    assert not mean_over_fa4([], bench_kernels.all_cases(["segments"], {}))


def test_the_mean_is_printed_and_written(folder, monkeypatch, tmp_path, capsys):
    def measure_all(cases, _, keep):
        keep(rows_of(cases[:1], 1.05), ["segments: not timed"])
        assert json.loads(file.read_text())["failed"] == ["segments: not timed"]  # kept, should it be killed now
        return rows_of(cases, 1.05), []

    for name in ("set_up_compile", "run_in_processes", "measure_ceilings"):
        monkeypatch.setattr(bench_kernels, name, lambda *_: None)
    monkeypatch.setattr(bench_kernels, "header", lambda *_: "a GPU")
    monkeypatch.setattr(bench_kernels, "measure_all", measure_all)
    monkeypatch.setattr(bench_kernels.torch.cuda, "is_available", lambda: True)
    # Without cuDNN, whose times `rows_of` does not make up.
    monkeypatch.setattr(bench_kernels, "load_libraries", lambda *given: {"FA4": load_libraries(*given)["FA4"]})
    file = tmp_path / "kernels.json"
    arguments = ["--only", "segments", "--fa4", str(folder), "--json", str(file)]
    monkeypatch.setattr(sys, "argv", ["bench_kernels.py", *arguments])
    bench_kernels.main()
    out = capsys.readouterr().out
    assert "FA3 is left out: it was not given (--fa3)." in out
    assert "FA4 is left out" not in out
    assert "1.050× over FA4 in geometric mean of 27 of 27 cases (≥ 1.08) ✗\n" in out
    assert "27 of 28 targets met; 33 of 33 cases measured" in out
    assert [mean["met"] for mean in json.loads(file.read_text())["means"]] == [False]


@pytest.fixture
def compiles():
    """Forget what torch.compile has compiled. All towers share decorators of transformers, whose graphs it limits."""
    yield
    torch._dynamo.reset()


@pytest.mark.usefixtures("compiles")
@pytest.mark.parametrize("family", ["qwen2_5_vl", "qwen3_vl"])
def test_transformers_with_fa4(folder, monkeypatch, family):
    load_libraries(fa4_folder=folder)
    config = narrow(family, depth=2, hidden_size=96, num_heads=4, intermediate_size=192)
    tower = build_tower(config)
    compile_eagerly = functools.partial(transformers_towers.compile_tower, backend="eager")
    monkeypatch.setattr(transformers_towers, "compile_tower", compile_eagerly)
    monkeypatch.setitem(transformers_towers.COMPILED, "fa3", lambda q, *_: torch.zeros_like(q))
    rivals = transformers_towers.transformers_rivals(tower, config, ["fa4", "compiled"], ["fa3", "fa4"])
    for case in (parity_case(config), Case("image", ((1, 8, 12),))):
        pixels = pixel_values(case, config, CPU, torch.float32)
        expected = transformers_towers.eager(tower, "sdpa")(case, pixels)()
        found = {
            name: rivals[f"transformers {name}"](case, pixels)() for name in ("compiled FA3", "compiled FA4", "FA4")
        }
        for name in ("compiled FA4", "FA4"):
            assert max(model_bench.relative_errors(found[name], expected)) < 1e-5, name
        assert max(model_bench.relative_errors(found["compiled FA3"], expected)) > 0.1  # each has its own attention
