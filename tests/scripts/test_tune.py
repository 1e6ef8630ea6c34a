"""`scripts/tune.py`: how candidates take a config's place, and how a constant's line is rewritten."""

import importlib
import sys

import pytest
import torch
import tune

from kernel_bench import tune_cases
from kernel_bench.attention_cases import attention_case
from kernel_bench.launch_configs import Knob, Shape, configured, full, rewritten, spelled
from qwenvit import ops
from qwenvit.kernels.attention import window as rope_attention
from qwenvit.kernels.gemm import qkv_rope
from qwenvit.kernels.gemm import tiles as gemm


def knob(title: str) -> Knob:
    return next(knob for knob in tune_cases.knobs() if knob.title == title)


@pytest.mark.parametrize("tma", [True, False])
def test_every_constant_has_one_line_that_can_be_rewritten(tma, tmp_path):
    for each in tune_cases.knobs(tma):
        if each.is_function:
            continue
        source, path = tune.source_of(each), tmp_path / "copy.py"
        path.write_text(source.read_text())
        assert rewritten(path.read_text(), each.name, each.current) == path.read_text()
        other = next(value for c in each.candidates if (value := full(each.current, c)) != each.current)
        path.write_text(rewritten(path.read_text(), each.name, other))
        lines = zip(source.read_text().splitlines(), path.read_text().splitlines(), strict=True)
        assert [new for old, new in lines if new != old] == [f"{each.name} = {spelled(other)}"]
        assert eval(spelled(other), vars(importlib.import_module(f"qwenvit.kernels.{each.module}"))) == other


def test_a_line_that_is_not_there_or_twice_is_refused():
    with pytest.raises(ValueError, match="PASS: expected one line"):
        rewritten("WORD = 1\n", "PASS", 2)
    with pytest.raises(ValueError, match="PASS: expected one line"):
        rewritten("PASS = 1\nPASS = 2\n", "PASS", 3)


def test_candidates_take_the_place_of_constants_wherever_they_were_imported():
    tile = knob("gemm.tiles.TMA_TILE")
    before = gemm.TMA_TILE
    with configured(tile, {"block_m": 64, "num_stages": 5}) as seen:
        assert gemm.TMA_TILE is qkv_rope.TMA_TILE is seen[-1]
        assert (gemm.TMA_TILE.block_m, gemm.TMA_TILE.num_stages, gemm.TMA_TILE.block_n) == (64, 5, before.block_n)
    assert gemm.TMA_TILE is qkv_rope.TMA_TILE is before


def test_candidates_change_what_functions_choose():
    windows = knob("attention.window.window_config")
    arguments = (torch.bfloat16, 9, 16, 144)
    before = rope_attention.window_config(*arguments)
    with configured(windows, {"heads": 1}) as seen:
        assert rope_attention.window_config(*arguments).heads == 1
    assert [config.num_warps for config in seen] == [before.num_warps]
    with configured(windows, None) as seen:
        assert rope_attention.window_config(*arguments) == before
    assert seen == [before]
    assert rope_attention.window_config is windows.current


def test_a_candidate_is_used_by_the_kernel_and_gives_the_same():
    passes = knob("gemm.qkv_rope.ROTATE_PASS")
    case = attention_case(56, 4, 64, False, {}, heads=2)
    shape = Shape("tiny", case.inputs, lambda x: ops.rotate_qk_(x["turned"], x["cos"], x["sin"], 2, impl="triton"))
    inputs = shape.inputs(torch.device("cpu"), torch.float32)
    now = tune.result_of(shape, inputs)
    assert not torch.equal(now, inputs["turned"].double().flatten())
    with configured(passes, {"rows": 1, "pairs": 16}):
        assert torch.equal(tune.result_of(shape, inputs), now)
    with configured(passes, {"rows": 3}), pytest.raises(Exception, match="power of 2"):
        tune.result_of(shape, inputs)


def test_the_best_constant_over_all_shapes_is_proposed(monkeypatch, capsys):
    passes = knob("gemm.qkv_rope.ROTATE_PASS")
    third = full(qkv_rope.ROTATE_PASS, passes.candidates[3])
    places = dict.fromkeys(range(-1, len(passes.candidates)), 2.0)
    seconds = iter([places | {3: 1.0}, places | {5: 1.9}] * len(passes.shapes))
    monkeypatch.setattr(tune, "measure", lambda *_: ([qkv_rope.ROTATE_PASS], next(seconds)))
    none_failed = [[""] * len(passes.shapes) for _ in passes.candidates]
    assert tune.tune(passes, none_failed) == third
    assert capsys.readouterr().out.splitlines()[0].endswith(f"| {spelled(third)} | 1000000.0 | 2.00× |")
    monkeypatch.setattr(tune, "measure", lambda *_: ([qkv_rope.ROTATE_PASS], places))
    assert tune.tune(passes, none_failed) is None
    assert capsys.readouterr().out.splitlines()[0].endswith("| 2000000.0 | same | same | same |")
    monkeypatch.setattr(tune, "measure", lambda *_: ([], places))
    assert tune.tune(passes, none_failed) is None
    assert "not used" in capsys.readouterr().out


def test_shapes_and_candidates_are_few_and_different():
    for each in tune_cases.knobs():
        values = [str(candidate) for candidate in each.candidates]
        assert 2 <= len(set(values)) == len(values) <= 12
        titles = [shape.title for shape in each.shapes]
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
