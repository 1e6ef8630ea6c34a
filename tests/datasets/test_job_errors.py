"""A batch that is too much for the device, and an error of the tower: what is lost, and what is not."""

import json
import weakref

import pytest
import torch

from qwenvit.encoder import Encoder
from qwenvit.outputs import Embeddings
from support.jobs import rows_of, run_job


def test_an_image_that_is_too_much_for_the_device_fails_alone(encoder, pictures, tmp_path, monkeypatch):
    """The first batch with the third image needs too much memory, and so does the image alone."""
    run = Encoder._run
    calls = []

    def limited(self, pixel_values, grid):
        calls.append(grid.patches)
        if len(calls) in (3, 4):
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")
        return run(self, pixel_values, grid)

    monkeypatch.setattr(Encoder, "_run", limited)
    manifest = run_job(pictures, tmp_path / "out", model=encoder, devices=None)
    assert (manifest.counts["images"], manifest.counts["failed"]) == (6, 1)
    (error,) = map(json.loads, (tmp_path / "out" / "errors.jsonl").open())
    assert error == {"id": "0002.png", "reason": "CUDA out of memory. Tried to allocate 2 GiB"}
    monkeypatch.setattr(Encoder, "_run", run)
    run_job(pictures, tmp_path / "out", model=encoder, devices=None)
    run_job(pictures, tmp_path / "expected", model=encoder, devices=None)
    assert rows_of(tmp_path / "out") == rows_of(tmp_path / "expected")


def test_a_batch_that_is_too_much_to_pool_is_pooled_one_by_one(encoder, pictures, tmp_path, monkeypatch):
    """On a CPU a batch is one image, so that the third fails once and is encoded by the second try."""
    pooled, calls = Embeddings.pooled, []

    def limited(self, *arguments, **options):
        calls.append(self)
        if len(calls) == 3:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return pooled(self, *arguments, **options)

    monkeypatch.setattr(Embeddings, "pooled", limited)
    manifest = run_job(pictures, tmp_path / "out", model=encoder, devices=None)
    assert (manifest.counts["images"], manifest.counts["failed"]) == (7, 0)
    assert len(calls) == 8
    monkeypatch.undo()
    run_job(pictures, tmp_path / "expected", model=encoder, devices=None)
    assert rows_of(tmp_path / "out") == rows_of(tmp_path / "expected")


def test_a_failed_batch_is_released_before_its_images_are_tried_alone(encoder, pictures, tmp_path, monkeypatch):
    run, alive = Encoder._run, []

    def limited(self, pixel_values, grid):
        if len(alive) == 0:
            output = run(self, pixel_values, grid)
            alive.append(weakref.ref(output.pooler_output))
            raise torch.OutOfMemoryError("CUDA out of memory")
        assert alive[0]() is None, "the tensors of the failed batch are still there"
        return run(self, pixel_values, grid)

    monkeypatch.setattr(Encoder, "_run", limited)
    assert run_job(pictures, tmp_path / "out", model=encoder, devices=None).counts["images"] == 7


def test_an_error_of_the_tower_keeps_what_is_encoded(encoder, pictures, tmp_path, monkeypatch):
    run, calls = Encoder._run, []

    def breaks(self, pixel_values, grid):
        calls.append(grid)
        if len(calls) == 5:
            raise RuntimeError("the device is gone")
        return run(self, pixel_values, grid)

    monkeypatch.setattr(Encoder, "_run", breaks)
    with pytest.raises(RuntimeError, match="the device is gone"):
        run_job(pictures, tmp_path / "out", model=encoder, devices=None)
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert (manifest["counts"]["images"], manifest["complete"]) == (4, False)
    assert len(rows_of(tmp_path / "out")) == 4
