"""Tests of `scripts/bench_kernels.py`: its cases, their counts of bytes and FLOPs, and its report. Nothing is timed."""

import dataclasses
import json
import sys
from collections import Counter
from types import SimpleNamespace

import bench_kernels
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from common.machine import Ceilings
from kernel_bench import cases as kernel_cases
from kernel_bench import compile_time
from kernel_bench import page as kernel_page
from kernel_bench import report as kernel_report
from kernel_bench import timing as kernel_timing
from kernel_bench.attention_cases import attention_case
from kernel_bench.cases import Case, Implementation, Measurement, Target
from kernel_bench.length_cases import length_case
from kernel_bench.pass_cases import MERGERS, activation_case, merger_case, norm_case, spatial_merge_case
from kernel_bench.patch_cases import patch_embed_case, positions_case
from kernel_bench.projection_cases import mlp_case, qkv_case
from kernel_bench.timing import kernel_label
from peers import attention as peer_attention
from qwenvit import ops
from qwenvit.kernels.attention import pad_values
from support.cuda_events import events_at

CPU = torch.device("cpu")


def reference_attention(q, k, v, cu_seqlens, max_seqlen):
    return ops.rope_attention(q, k, v, None, None, cu_seqlens, max_seqlen, impl="reference")


LIBRARY = {"plain": reference_attention}
TINY_CASES = [
    attention_case(96, 10, 64, True, LIBRARY, heads=1),
    attention_case(96, 6, 72, False, LIBRARY, heads=2),
    attention_case(96, 6, 80, True, LIBRARY, interleaved=False, heads=1),
    length_case((33,), LIBRARY, heads=1),
    length_case((5, 40, 5), LIBRARY, 72, heads=1, section="segments", title="three segments"),
    qkv_case("Qwen3-VL small", 20, 64, 2, 64),
    qkv_case("Qwen3-VL", 20, 72, 2, 72),
    *(mlp_case("Qwen2.5-VL", act, 20, 64, 128) for act in ("swiglu", "quick_gelu", "gelu_tanh")),
    *(norm_case(kind, 64, residual, 12) for kind in ("rms", "layer") for residual in (True, False)),
    *(activation_case(act, 32, 8) for act in ("swiglu", "gelu_tanh", "quick_gelu")),
    *(merger_case(kind, 16, norm_merged, restore_order, 64) for kind, _, norm_merged, restore_order in MERGERS),
    *(spatial_merge_case(mode, 16, 64) for mode in ("concat", "average")),
    *(positions_case(32, add, 64) for add in (True, False)),
    *(patch_embed_case(model, 64, dtype) for model in ("Qwen2.5-VL", "Qwen3-VL") for dtype in (None, torch.float32)),
]


def without_compile(case: Case) -> Case:
    rivals = {name: rival for name, rival in case.rivals.items() if name != "torch.compile"}
    return dataclasses.replace(case, rivals=rivals)


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs Triton's interpreter, for kernels on CPU tensors")
@pytest.mark.parametrize("case", TINY_CASES, ids=lambda case: f"{case.section} {case.title}")
def test_every_implementation_does_the_same_work(case, monkeypatch):
    # In fp32 all errors are a few roundings, about 1e-7, and their ratio is not bounded by 1.05.
    monkeypatch.setattr(bench_kernels, "MAX_ERROR_RATIO", 2.0)
    errors = bench_kernels.check_errors(without_compile(case), CPU, torch.float32)
    assert all(error < 1e-6 for error in errors.values())
    assert set(errors) == {"plain torch", *case.implementations, *case.rivals} - {"torch.compile"}
    for name, bound in case.lower_bounds.items():
        out = bound.call(case.make_inputs(CPU, torch.float32))
        if name == kernel_cases.COPY_BOUND:
            assert 0 <= case.minimum_bytes - 2 * out.nbytes < 32
        else:
            assert out.shape[0] == case.tokens


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs Triton's interpreter, for kernels on CPU tensors")
def test_no_rival_copies_values_for_our_attention(monkeypatch):
    copies = []
    monkeypatch.setattr(pad_values, "pad_with_ones", copies.append)
    case = qkv_case("Qwen3-VL", 20, 72, 1, 72)
    inputs = case.make_inputs(CPU, torch.float32)
    for implementation in (*case.rivals.values(), *case.lower_bounds.values(), case.implementations["dispatch"]):
        implementation.call(inputs)
    assert not copies
    for name in ("fused", "V copied"):
        case.implementations[name].call(inputs)
    assert [tuple(values.shape) for values in copies] == [(20, 1, 8)] * 2


class RecordingInputs(dict):
    """Inputs that record which of them are read."""

    def __init__(self, inputs):
        super().__init__(inputs)
        self.read = set()

    def __getitem__(self, name):
        self.read.add(name)
        return super().__getitem__(name)

    def get(self, name, default=None):
        self.read.update({name} & self.keys())
        return super().get(name, default)


@pytest.mark.parametrize("case", TINY_CASES, ids=lambda case: f"{case.section} {case.title}")
def test_minimum_bytes_are_those_of_inputs_and_outputs(case):
    inputs = RecordingInputs(case.make_inputs(CPU, torch.bfloat16))
    padded = case.section in ("qkv", "segments") and case.head_dim == 72  # ours has ones, which no result needs
    out = (case.baseline if padded else list(case.implementations.values())[-1]).call(inputs)
    size = {name: inputs[name].numel() * inputs[name].element_size() for name in inputs.read}
    angles = size.pop("cos", 0) + size.pop("sin", 0)  # the second half of each row repeats the first
    written = sum(part.nbytes for part in (out if isinstance(out, tuple) else (out,)))
    assert case.minimum_bytes == sum(size.values()) + angles // 2 + written


@pytest.mark.parametrize(
    "case", [case for case in TINY_CASES if case.section not in ("passes",)], ids=lambda case: case.title
)
def test_flops_are_those_that_torch_counts(case):
    with FlopCounterMode(display=False) as counter:
        case.truth(case.make_inputs(CPU, torch.float32))
    # RoPE is elementwise, which torch does not count.
    rope_flops = 6 * case.tokens * 2 * case.head_dim if case.section == "qkv" else 0
    assert case.flops - rope_flops == counter.get_total_flops()


def test_cases_cover_the_published_shapes():
    cases = bench_kernels.all_cases(list(kernel_report.SECTIONS), peer_attention.load_libraries())
    found = Counter((case.section, case.head_dim, case.tokens) for case in cases)
    sizes = (1024, 2304, 4096, 9216, 784, 1764, 3136, 7056)
    for section in ("windows", "full"):
        assert all(found[section, head_dim, tokens] for head_dim in (64, 72, 80) for tokens in sizes)
    assert all(found["lengths", 64, tokens] for tokens in (256, 512, 1024, 2048, 4096, 8192, 16384))
    assert all(found["qkv", 80, tokens] and found["patch", None, tokens] for tokens in (1024, 2304, 4096, 9216))
    assert all(found["qkv", 72, tokens] and found["patch", None, tokens] for tokens in (784, 1764, 3136, 7056))
    names = {case.title.split(",")[0] for case in cases if case.section == "passes"}
    assert {"norm", "add_norm", "swiglu pass", "gelu_tanh pass", "spatial_merge", "add_positions"} <= names
    windows = next(case for case in cases if case.section == "windows" and case.head_dim == 80 and case.tokens == 9216)
    assert {"torch RoPE + cuDNN", "torch RoPE + FA2", "Triton RoPE + cuDNN", "Triton RoPE + FA2"} == set(windows.rivals)
    assert [target.limit for target in windows.targets["qwenvit"]] == [1.7, 2.2]


def test_partial_windows_are_in_the_cases():
    case = attention_case(448, 28, 72, True, {"cuDNN": reference_attention, "FA2": reference_attention})
    lengths = case.make_inputs(CPU, torch.float32)["cu_seqlens"].diff().unique().tolist()
    assert lengths == [16, 32, 64]
    assert not any("cuDNN" in name for name in case.rivals)  # it runs segments of one length only


def test_torch_rope_is_transformers_own():
    from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import apply_rotary_pos_emb_vision

    qkv, angles = torch.randn(12, 3 * 2 * 80).bfloat16(), torch.rand(12, 40).repeat(1, 2)
    q, k, _ = peer_attention.torch_rope(qkv, angles.cos(), angles.sin(), 2)
    unrotated_q, unrotated_k, _ = peer_attention.split_qkv(qkv, 2)
    expected = apply_rotary_pos_emb_vision(unrotated_q, unrotated_k, angles.cos(), angles.sin())
    assert torch.equal(q, expected[0])
    assert torch.equal(k, expected[1])


def with_implementation(case: Case, call) -> Case:
    return dataclasses.replace(case, implementations={"qwenvit": Implementation(call)})


def test_graphs_take_turns_in_changing_order(monkeypatch):
    now, order = [0.0], []

    class Graph:
        def __init__(self, call, _):
            self.milliseconds = call()

        def replay(self):
            order.append(self.milliseconds)
            now[0] += self.milliseconds

    monkeypatch.setattr(kernel_timing, "capture_graph", Graph)
    monkeypatch.setattr(torch, "cuda", SimpleNamespace(Event=events_at(now), synchronize=lambda: None))
    calls = {"ours": lambda: 2.0, "rival": lambda: 4.0, "slow": lambda: 6.0}
    seconds = kernel_timing.median_seconds(calls, [{}, {}])
    assert seconds == pytest.approx({"ours": 0.001, "rival": 0.002, "slow": 0.003})
    rounds = [order[i : i + 3] for i in range(0, len(order), 3)]
    assert len(rounds) == 22
    assert all(sorted(turns) == [2.0, 4.0, 6.0] for turns in rounds)
    assert {turns[0] for turns in rounds} == {2.0, 4.0, 6.0}


def test_a_wrong_kernel_is_not_timed():
    case = without_compile(norm_case("rms", 64, False, 12))
    wrong = with_implementation(case, lambda x: case.baseline.call(x) * 1.02)
    with pytest.raises(ValueError, match=r"qwenvit: relative L2 [12]"):
        bench_kernels.check_errors(wrong, CPU)
    unwritten = with_implementation(case, lambda x: torch.empty_like(x["x"]))
    with pytest.raises(ValueError, match="qwenvit: relative L2 nan"):
        bench_kernels.check_errors(unwritten, CPU)
    poisoned = with_implementation(case, lambda x: case.baseline.call(x) * torch.nan)
    with pytest.raises(ValueError, match="qwenvit: relative L2 nan"):
        bench_kernels.check_errors(poisoned, CPU)


def test_a_library_kernel_never_meets_a_target_of_our_kernels():
    measurement = Measurement({"fused": 1.0, "rival": 2.0}, Ceilings(4e12, 7e14), 4 * 10**12)
    target = Target("over rival", lambda m: m.speedup("fused", "rival"), 1.08)
    assert target.evaluate(measurement, ["_project_and_rotate"]) == (2.0, True)
    assert target.evaluate(measurement, ["cuBLAS", "_rotate_in_place"]) == (2.0, False)
    assert target.evaluate(measurement, []) == (2.0, False)
    assert dataclasses.replace(target, any_kernel=True).evaluate(measurement, ["cuBLAS"]) == (2.0, True)
    of_one_pass = Target("of one pass", lambda m: m.seconds["rival"] / m.copy_seconds, 1.7, at_most=True)
    assert of_one_pass.evaluate(measurement, ["_window_attention"]) == (2.0, False)


def test_kernel_labels_and_names_of_passes():
    assert kernel_label("nvjet_tst_128x256_64x4_2x1_v_bz_coopA_bias_TNN") == "cuBLAS"
    assert kernel_label("cudnn_generated_fort_native_sdpa_sm90_flash_fprop_wgmma_f16") == "cuDNN"
    assert kernel_label("_window_attention") == "_window_attention"
    cases = TINY_CASES + bench_kernels.all_cases(list(kernel_report.SECTIONS), peer_attention.load_libraries())
    passes = {name for case in cases for name in case.pass_bytes}
    assert passes
    assert passes <= kernel_cases.own_kernels()


def row_of(case: Case, name: str) -> kernel_report.Row:
    return {
        "section": case.section, "series": case.series, "title": case.title, "ours": name, "tokens": case.tokens,
        "head_dim": case.head_dim, "kernels": ["_rotate_in_place", "cuBLAS"], "microseconds": 12.34, "tflops": 3.21,
        "gigabytes": 2345.6, "roofline": 0.512, "moved_bytes": 2e6, "fewest_bytes": 1e6, "peak_bytes": 0,
        "torch_peak_bytes": 2**20, "rivals": dict.fromkeys(case.rivals, 20.0),
        "floors": dict.fromkeys(case.lower_bounds, 9.0), "over_best": 1.62,
        "bars": [{"text": "over cuDNN", "unit": "×", "limit": 2.2, "at_most": False, "value": 1.62, "met": False}],
    }  # fmt: skip


def test_rows_have_the_columns_of_their_header():
    for case in TINY_CASES:
        compared = ["a rival of other cases", *case.rivals, *case.lower_bounds]
        header, line = kernel_report.table_header(compared).splitlines()
        row = kernel_report.table_row(row_of(case, next(iter(case.implementations))), compared)
        assert header.count("|") == line.count("|") == row.count("|")
    assert row.endswith("| 1.62× | 1.620× over cuDNN (≥ 2.2) ✗ |")
    assert "| `_rotate_in_place` + cuBLAS | **12.3** | 3.2 | 2346 | 51% | 2.0 / 1.0 MB | 0.0 (1.0) | – | 20.0 |" in row


def test_compile_times():
    lines = kernel_report.compile_table([{"model": "A", "kernels": 3, "seconds": 61.0}]).splitlines()
    assert lines[-1] == "| A | 3 | 61.0 | ✗ |"
    for model in compile_time.MODELS:
        sections = {case.section for case in compile_time.model_cases(model)}
        assert sections == {"full", "qkv", "mlp", "passes", "patch"} | ({"windows"} if model == "Qwen2.5-VL" else set())


def test_chart(tmp_path):
    pytest.importorskip("matplotlib")
    rows = [row_of(case, name) for case in TINY_CASES for name in case.implementations]
    kernel_report.draw_chart(rows, "a GPU", tmp_path / "chart.png")
    assert (tmp_path / "chart.png").read_bytes().startswith(b"\x89PNG")


def run_of(cases, **over):
    rows = [row_of(case, name) for case in cases for name in case.implementations]
    run = {"header": "a GPU, driver 1\n\nCeilings: 4\n\nTimes are µs.", "compile": [], "rows": rows}
    return run | {"means": [], "failed": []} | over


def cells(line):
    return [cell.strip(" *") for cell in line.strip("|").split("|")]


class TestPage:
    def test_every_case_has_a_line_whose_columns_fit_the_header(self):
        for section in {case.section for case in TINY_CASES}:
            cases = [case for case in TINY_CASES if case.section == section]
            header, _, *lines = kernel_page.section_table(run_of(cases)["rows"]).splitlines()
            assert [cells(line)[0] for line in lines] == [case.title for case in cases]
            for case, line in zip(cases, lines, strict=True):
                values = dict(zip(cells(header), cells(line), strict=True))
                assert (values["patches"], values["qwenvit"]) == (str(case.tokens), "12.3")
                assert values["over the best rival"] == "1.62×"
                shown = {name.removeprefix("Triton RoPE + ") for name in case.rivals if "torch RoPE + " not in name}
                assert all(values[name] == "20.0" for name in shown)
                assert all(values[name] == "9.0" for name in case.lower_bounds)
                assert not any("torch RoPE + " in name for name in values)

    def test_flash_attention_4_is_the_fastest_of_its_forms(self):
        row = row_of(TINY_CASES[4], "qwenvit")
        row["rivals"] = {"FA4": 4.0, "FA4 contiguous": 3.0, "FA4 dense": 5.0, "FA3": 7.0}
        assert kernel_page.contenders(row) == {"FA4": 3.0, "FA3": 7.0}

    def test_summary_is_of_what_users_get(self):
        case = TINY_CASES[5]
        rows = [row_of(case, "dispatch") | {"over_best": 2.0}, row_of(case, "fused") | {"over_best": 9.0}]
        rows += [row_of(case, "dispatch") | {"over_best": 0.5}]
        *_, line = kernel_page.summary_table(run_of([], rows=rows)).splitlines()
        assert cells(line)[1:] == ["2", "1.00×", "0.50 to 2.00×"]

    def test_notes(self):
        case = TINY_CASES[1]
        row = row_of(case, "qwenvit")
        row["rivals"] = {"torch RoPE + FA2": 70.0, "Triton RoPE + FA2": 20.0, "torch RoPE + FA3": 35.0,
                         "Triton RoPE + FA3": 30.0}  # fmt: skip
        row["bars"] = [{"text": "over FA4", "value": value} for value in (2.0, 0.5)]
        compiled = [{"model": "Qwen3-VL", "kernels": 10, "seconds": 11.5}]
        over_fa4, torch_rope, compile_time, failed = kernel_page.notes(
            run_of([], rows=[row], compile=compiled, failed=["qkv: not timed"])
        )
        assert "is 1.00 times as fast" in over_fa4
        assert "0.50 to 2.00 times, and as fast or faster in 1 of the 2 cases" in over_fa4
        assert "they take 5 to 50 µs longer" in torch_rope
        assert compile_time.endswith("10 of Qwen3-VL in 12 s")
        assert failed == "Failed: qkv: not timed"

    def test_runs_are_merged_in_the_order_of_sections(self):
        later, earlier = run_of([TINY_CASES[5]]), run_of([TINY_CASES[0]])
        later["header"] = later["header"].replace("Ceilings: 4", "Ceilings: 5")
        merged = kernel_page.merge([later, earlier])
        assert [row["section"] for row in merged["rows"]] == ["windows", *["qkv"] * len(TINY_CASES[5].implementations)]
        assert merged["header"] == "a GPU, driver 1\n\nCeilings: 5\n\nCeilings: 4\n\nTimes are µs."
        with pytest.raises(ValueError, match="--read: expected different sections in each file, got qkv twice"):
            kernel_page.merge([earlier, later, later])

    def test_the_command_rewrites_the_page(self, tmp_path, monkeypatch):
        begin, end = kernel_page.KERNELS_MARKERS
        page, files = tmp_path / "PAGE.md", [tmp_path / "a.json", tmp_path / "b.json"]
        page.write_text(f"before\n{begin}\nold\n{end}\nafter\n")
        for file, cases in zip(files, (TINY_CASES[:5], TINY_CASES[5:]), strict=True):
            file.write_text(json.dumps(run_of(cases)))
        monkeypatch.setattr(sys, "argv", ["bench_kernels.py", "--read", *map(str, files), "--page", str(page)])
        bench_kernels.main()
        text = page.read_text()
        assert text.startswith(f"before\n{begin}\n\na GPU, driver 1")
        assert text.endswith(f"{end}\nafter\n")
        sections = {case.section for case in TINY_CASES}
        assert text.count("<details>") == text.count("</details>") == len(sections)
        assert all(f"<summary>{kernel_report.SECTIONS[section]}, µs</summary>" in text for section in sections)

    def test_failed_cases_are_an_error(self, tmp_path, monkeypatch):
        file = tmp_path / "a.json"
        file.write_text(json.dumps(run_of(TINY_CASES[:1], failed=["windows: not timed"])))
        monkeypatch.setattr(sys, "argv", ["bench_kernels.py", "--read", str(file)])
        with pytest.raises(SystemExit):
            bench_kernels.main()


def test_arguments(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["bench_kernels.py", "--help"])
    with pytest.raises(SystemExit) as exit_:
        bench_kernels.main()
    assert exit_.value.code == 0
    assert "compile, windows, full, lengths, segments, qkv" in " ".join(capsys.readouterr().out.split())
    monkeypatch.setattr(sys, "argv", ["bench_kernels.py", "--only", "nothing"])
    with pytest.raises(SystemExit):
        bench_kernels.main()
    assert "invalid choice: 'nothing'" in capsys.readouterr().err
    if not torch.cuda.is_available():
        monkeypatch.setattr(sys, "argv", ["bench_kernels.py"])
        with pytest.raises(SystemExit, match="needs a GPU"):
            bench_kernels.main()
