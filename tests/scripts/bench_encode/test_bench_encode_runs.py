"""`scripts/bench_encode.py`: its arguments, the models and steps it runs, the results it writes. Nothing is timed."""

import argparse
import json
import sys

import bench_encode
import pytest
import torch

from common.hf_towers import forward
from common.steps import steps_of
from encode_bench import measure, model_run
from encode_bench.folders import FULL_HD, PHOTOS
from support.small_encode_bench import LIMITS, SMALL
from support.towers import narrow


def test_steps_that_are_asked_for_run(bench, paths, monkeypatch):
    monkeypatch.setattr(model_run, "FOLDERS", (SMALL,))
    result = model_run.empty_result("Qwen3-VL-8B")
    memory = {"images": 20, "first": 10, "before": 1, "most": 2}
    monkeypatch.setattr(measure.EncodeBench, "memory", lambda *_: memory)
    monkeypatch.setattr(measure.EncodeBench, "video", lambda _, files: {"frames": len(files)})
    files = {SMALL.name: paths, FULL_HD: paths[:1], PHOTOS: paths}
    cases = [SMALL.name, "one file", "preprocessing", "video", "host memory"]
    model_run.run_steps(bench, result, cases, LIMITS, files, steps_of(result, lambda _: None))
    assert result["failed"] == []
    assert result["memory"] == memory
    assert result["video"] == {"frames": 1}
    assert [row["name"] for row in result["rows"]] == ["small"]
    assert result["preprocessing"]["floor"] == result["preprocessing"]["bytes"] / 4e12
    assert set(result["seconds"]) == set(cases)


def test_both_towers_have_the_same_weights(monkeypatch):
    monkeypatch.setattr(model_run, "published_config", lambda _: narrow("qwen3_vl", depth=2))
    loaded = model_run.load_bench("Qwen3-VL-8B", "cpu", torch.float32)
    grid = torch.tensor([[1, 4, 6]])
    pixels = torch.randn(24, loaded.encoder.config.patch_dim, generator=torch.Generator().manual_seed(0))
    _, tokens, _ = forward(loaded.hf_tower, pixels, grid)
    assert torch.equal(loaded.encoder(pixels, grid).pooler_output, tokens)
    assert loaded.processor.patch_size == 16
    assert loaded.fresh().image_processor is loaded.encoder.image_processor


def test_a_model(bench, paths, monkeypatch):
    monkeypatch.setattr(model_run, "FOLDERS", (SMALL,))
    monkeypatch.setattr(model_run, "describe_machine", lambda limits, commit: f"a GPU, {commit}\n\nCeilings: x")  # noqa: ARG005
    monkeypatch.setattr(model_run, "load_bench", lambda _: bench)
    options, saved = argparse.Namespace(cases=["small"], commit="abc"), []
    arguments = options, LIMITS, {SMALL.name: paths}, "drawings", saved.append
    result = model_run.run_model("Qwen3-VL-8B", *arguments)
    assert saved == [result, result]
    assert (result["machine"], result["ceilings"], result["pictures"]) == ("a GPU, abc", "Ceilings: x", "drawings")
    assert [row["name"] for row in result["rows"]] == ["small"]
    monkeypatch.setattr(model_run, "load_bench", lambda _: 1 / 0)
    result = model_run.run_model("Qwen3-VL-8B", *arguments)
    assert result["rows"] == []
    assert result["failed"] == [("weights", "ZeroDivisionError: division by zero")]


def test_measured_results_are_written(monkeypatch, tmp_path):
    made, file = [], tmp_path / "a.json"

    def run_model(model, options, limits, files, pictures, save):
        assert list(files) == [SMALL.name]
        assert all(path.exists() for path in files[SMALL.name])
        made.append(files[SMALL.name][0])
        result = model_run.empty_result(model)
        save(result)
        return result

    monkeypatch.setattr(bench_encode, "folders_for", lambda _: [SMALL])
    monkeypatch.setattr(bench_encode, "measure_ceilings", lambda: LIMITS)
    monkeypatch.setattr(bench_encode, "run_model", run_model)
    options = argparse.Namespace(models=["Qwen2.5-VL-7B", "Qwen3-VL-8B"], cases=["small"], json=file)
    results = bench_encode.measure(options)
    assert json.loads(file.read_text()) == results
    assert [result["model"] for result in results] == options.models
    assert not made[0].exists()  # the temporary folder is gone
    assert made[0] == made[1]  # both models read the same files


def test_arguments(monkeypatch, capsys):
    for wrong in (["--models", "Qwen9"], ["--cases", "449²"]):
        monkeypatch.setattr(sys, "argv", ["bench_encode.py", *wrong])
        with pytest.raises(SystemExit):
            bench_encode.main()
        assert f"invalid choice: '{wrong[1]}'" in capsys.readouterr().err
    if not torch.cuda.is_available():
        monkeypatch.setattr(sys, "argv", ["bench_encode.py"])
        with pytest.raises(SystemExit, match="needs a GPU"):
            bench_encode.main()
