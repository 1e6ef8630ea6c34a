"""Tests of `scripts/tune.py`: how a candidate overrides a launch setting, and how a constant's line is rewritten."""

import importlib
import sys

import pytest
import torch
import tune

from kernel_bench import tune_cases
from kernel_bench.attention_cases import attention_case
from kernel_bench.cases import relative_error
from kernel_bench.launch_configs import Tunable, Workload, apply_changes, format_config, override, replace_constant
from qwenvit import ops
from qwenvit.kernels.attention import window as rope_attention
from qwenvit.kernels.gemm import qkv_rope
from qwenvit.kernels.gemm import tiles as gemm


def tunable(title: str) -> Tunable:
    return next(each for each in tune_cases.tunables() if each.title == title)


@pytest.mark.parametrize("tma", [True, False])
def test_every_constant_has_one_line_that_can_be_rewritten(tma, tmp_path):
    for each in tune_cases.tunables(tma):
        if each.is_function:
            continue
        source, path = tune.source_path(each), tmp_path / "copy.py"
        path.write_text(source.read_text())
        assert replace_constant(path.read_text(), each.name, each.current) == path.read_text()
        other = next(value for c in each.candidates if (value := apply_changes(each.current, c)) != each.current)
        path.write_text(replace_constant(path.read_text(), each.name, other))
        lines = zip(source.read_text().splitlines(), path.read_text().splitlines(), strict=True)
        assert [new for old, new in lines if new != old] == [f"{each.name} = {format_config(other)}"]
        assert eval(format_config(other), vars(importlib.import_module(f"qwenvit.kernels.{each.module}"))) == other


def test_a_constant_set_by_no_line_or_by_two_is_refused():
    with pytest.raises(ValueError, match="PASS: expected one line"):
        replace_constant("WORD = 1\n", "PASS", 2)
    with pytest.raises(ValueError, match="PASS: expected one line"):
        replace_constant("PASS = 1\nPASS = 2\n", "PASS", 3)


def test_candidates_override_constants_wherever_they_were_imported():
    tile = tunable("gemm.tiles.TMA_TILE")
    before = gemm.TMA_TILE
    with override(tile, {"block_m": 64, "num_stages": 5}) as used:
        assert gemm.TMA_TILE is qkv_rope.TMA_TILE is used[-1]
        assert (gemm.TMA_TILE.block_m, gemm.TMA_TILE.num_stages, gemm.TMA_TILE.block_n) == (64, 5, before.block_n)
    assert gemm.TMA_TILE is qkv_rope.TMA_TILE is before


def test_candidates_change_what_functions_choose():
    windows = tunable("attention.window.window_config")
    arguments = (torch.bfloat16, 9, 16, 144)
    before = rope_attention.window_config(*arguments)
    with override(windows, {"heads": 1}) as used:
        assert rope_attention.window_config(*arguments).heads == 1
    assert [config.num_warps for config in used] == [before.num_warps]
    with override(windows, None) as used:
        assert rope_attention.window_config(*arguments) == before
    assert used == [before]
    assert rope_attention.window_config is windows.current


def test_the_kernel_uses_a_candidate_and_gives_the_same_result():
    passes = tunable("gemm.qkv_rope.ROTATE_PASS")
    case = attention_case(56, 4, 64, False, {}, heads=2)
    workload = Workload(
        "tiny", case.make_inputs, lambda x: ops.rotate_qk_(x["permuted_qkv"], x["cos"], x["sin"], 2, impl="triton")
    )
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    inputs = workload.make_inputs(device, torch.float32)
    expected = tune.run(workload, inputs)
    assert not torch.equal(expected, inputs["permuted_qkv"].double().flatten())
    with override(passes, {"rows": 1, "pairs": 16}):
        # Another block shape may be compiled to other fused multiply-adds.
        assert relative_error(tune.run(workload, inputs), expected) <= (1e-7 if device.type == "cuda" else 0)
    with override(passes, {"rows": 3}), pytest.raises(Exception, match="power of 2"):
        tune.run(workload, inputs)


def test_the_best_constant_over_all_shapes_is_proposed(monkeypatch, capsys):
    passes = tunable("gemm.qkv_rope.ROTATE_PASS")
    third = apply_changes(qkv_rope.ROTATE_PASS, passes.candidates[3])
    same = dict.fromkeys(range(tune.CURRENT, len(passes.candidates)), 2.0)
    seconds = iter([same | {3: 1.0}, same | {5: 1.9}] * len(passes.workloads))
    monkeypatch.setattr(tune, "measure", lambda *_: ([qkv_rope.ROTATE_PASS], next(seconds)))
    none_failed = [[""] * len(passes.workloads) for _ in passes.candidates]
    assert tune.tune(passes, none_failed) == third
    assert capsys.readouterr().out.splitlines()[0].endswith(f"| {format_config(third)} | 1000000.0 | 2.00× |")
    monkeypatch.setattr(tune, "measure", lambda *_: ([qkv_rope.ROTATE_PASS], same))
    assert tune.tune(passes, none_failed) is None
    assert capsys.readouterr().out.splitlines()[0].endswith("| 2000000.0 | same | same | same |")
    monkeypatch.setattr(tune, "measure", lambda *_: ([], same))
    assert tune.tune(passes, none_failed) is None
    assert "not used" in capsys.readouterr().out


def test_workloads_and_candidates_are_few_and_different():
    for each in tune_cases.tunables():
        values = [str(candidate) for candidate in each.candidates]
        assert 2 <= len(set(values)) == len(values) <= 12
        titles = [workload.title for workload in each.workloads]
        assert 1 <= len(set(titles)) == len(titles)


def test_arguments(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["tune.py", "--help"])
    with pytest.raises(SystemExit) as exit_:
        tune.main()
    assert exit_.value.code == 0
    assert "--write" in capsys.readouterr().out
    monkeypatch.setattr(sys, "argv", ["tune.py", "--only", "norm", "nothing"])
    with pytest.raises(SystemExit):
        tune.main()
    assert "got nothing" in capsys.readouterr().err
    monkeypatch.setattr(sys, "argv", ["tune.py", "--only", "gemm.mlp", "gemm"])
    with pytest.raises(SystemExit):
        tune.main()
    assert "got gemm\n" in capsys.readouterr().err
