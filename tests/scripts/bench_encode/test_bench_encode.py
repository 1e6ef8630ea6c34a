"""`scripts/bench_encode.py`: what its steps run, and of what their figures are. Nothing here is timed."""

import itertools
import json
import os

import numpy as np
import pytest
import torch

from common.steps import ParityError
from encode_bench import data_set, measure, parity, stages
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
)
from qwenvit import Encoder, item_stream
from qwenvit import encoder as encoder_module
from support.small_encode_bench import SMALL


def test_batches_of_the_tower_alone(bench, paths, monkeypatch):
    single = [bench.encoder.image_processor(path) for path in paths]
    first_two = sum(len(pixels) for pixels, _ in single[:2])
    for limit in (10**6, first_two, first_two - 1, 1):
        monkeypatch.setattr(stages, "PATCHES_PER_BATCH", limit)
        inputs = stages.tower_batches(bench.encoder, paths)
        assert torch.equal(torch.cat([pixels for pixels, _ in inputs]), torch.cat([pixels for pixels, _ in single]))
        assert torch.equal(torch.cat([grid for _, grid in inputs]), torch.cat([grid for _, grid in single]))
        sizes = [len(pixels) for pixels, _ in inputs]
        firsts = [int(grid[0].prod()) for _, grid in inputs]
        assert all(size <= limit or len(grid) == 1 for size, (_, grid) in zip(sizes, inputs, strict=True))
        assert all(size + first > limit for size, first in zip(sizes, firsts[1:], strict=False))
        assert len(inputs[0][1]) == {10**6: len(paths), first_two: 2}.get(limit, 1)


def test_times_are_those_of_an_image(bench, paths, monkeypatch):
    monkeypatch.setattr(measure, "wall_seconds", lambda call: 2.0 if call() is None else 6.0)
    row = bench.folder(SMALL, paths)
    expected = {ENCODE: 1.5, TOWER: 0.5, GPU_RIVAL: 1.0, CPU_RIVAL: 1.0, HF_RIVAL: 1.0}  # of 4 images, of a sample of 2
    assert row["times"] == expected
    assert row["cold"] == 1.5


def test_a_folder_is_measured(bench, paths):
    row = json.loads(json.dumps(bench.folder(SMALL, paths)))
    assert set(row["times"]) == {ENCODE, TOWER, GPU_RIVAL, CPU_RIVAL, HF_RIVAL}
    assert row["images"] == 4
    assert row["patches"] == sum(len(bench.encoder.image_processor(path)[0]) for path in paths) / 4
    assert min([row["cold"], *row["times"].values(), *row["stages"].values()]) > 0
    assert set(row["stages"]) == {"decode", "copy", "preprocess"}


def test_what_the_rivals_run(bench, paths, monkeypatch):
    events, ours, theirs, process = [], Encoder.__call__, measure.forward, measure.process

    def median_seconds(calls, **_):
        found = {}
        for name, call in calls.items():
            events.clear()
            call()
            found[name] = list(events)
        assert list(found) == [GPU_RIVAL, CPU_RIVAL, HF_RIVAL]
        for name, tower in ((GPU_RIVAL, "ours"), (CPU_RIVAL, "ours"), (HF_RIVAL, "theirs")):
            where = "cpu" if name == CPU_RIVAL else bench.encoder.device
            assert found[name] == [(paths[1], where), tower, (paths[2], where), tower]
        return dict.fromkeys(calls, 1.0)

    monkeypatch.setattr(measure, "median_seconds", median_seconds)
    monkeypatch.setattr(measure, "process", lambda *args: events.append(args[1:]) or process(*args))
    monkeypatch.setattr(measure, "forward", lambda *args: events.append("theirs") or theirs(*args))
    monkeypatch.setattr(Encoder, "__call__", lambda *args: events.append("ours") or ours(*args))
    assert bench.rivals(bench.encoder, paths[1:3]) == dict.fromkeys((GPU_RIVAL, CPU_RIVAL, HF_RIVAL), 0.5)


def test_one_file_and_preprocessing(bench, paths):
    one = bench.one_image(paths[0])
    assert set(one) == {ENCODE, TOWER, "decode"}
    step = stages.preprocessing_figures(bench.encoder, paths[0], bandwidth=1e12)
    pixels, _ = bench.encoder.image_processor(paths[0])
    assert step["bytes"] == 3 * 64 * 48 + pixels.nbytes
    assert step["floor"] == step["bytes"] / 1e12


def test_the_video_repeats_what_is_there(bench, paths):
    video = bench.video(paths[::2], frames=6)
    assert video["frames"] == 6
    pixels, _ = bench.encoder.video_processor(np.zeros((6, 48, 64, 3), np.uint8), channels="last")
    assert video["patches"] == len(pixels)


def test_batches_of_a_video(bench, monkeypatch):
    pixels, grid = torch.randn(5 * 24, 3 * 2 * 16 * 16), torch.tensor([[5, 4, 6]])
    for limit, sizes in ((1000, [5]), (71, [2, 2, 1]), (48, [2, 2, 1]), (10, [1] * 5)):
        monkeypatch.setattr(stages, "PATCHES_PER_BATCH", limit)
        inputs = stages.video_batches(pixels, grid)
        assert [grid.tolist() for _, grid in inputs] == [[[size, 4, 6]] for size in sizes]
        assert torch.equal(torch.cat([part for part, _ in inputs]), pixels)
        together = bench.encoder(pixels, grid).pooler_output
        assert torch.allclose(parity.tower_layers(bench.encoder, inputs)[0], together, atol=1e-5)


def test_features(bench, monkeypatch):
    """No time is given where the maps are not the tower's own states."""
    rows = bench.features(sides=(64, 96))
    assert [(row["side"], row["layers"]) for row in rows] == [(64, 4), (96, 4)]
    assert all(row[TOWER] > 0 and row[LAST_MAP] > 0 and row[FEATURES] > 0 for row in rows)
    maps = Encoder.features_of_pixels
    monkeypatch.setattr(
        Encoder, "features_of_pixels", lambda self, pixels, grid, layers: maps(self, pixels, grid, (*layers[:3], 1))
    )
    with pytest.raises(ParityError, match="64²: the map of the last layer differs"):
        bench.features(sides=(64,))


def test_a_data_set_job(bench, paths, monkeypatch):
    """Both outputs are written, and removed; no time is given where a shard's tokens are not those of `encode`."""
    for module in (encoder_module, item_stream):  # one image a batch: on a CPU bits may depend on it
        monkeypatch.setattr(module, "PATCHES_PER_BATCH", 1)
    outputs = []
    run = data_set.encode_dataset

    def recorded(inputs, output, **options):
        manifest = run(inputs, output, **options)
        outputs.append((output, options.get("format"), manifest.counts["images"]))
        return manifest

    monkeypatch.setattr(data_set, "encode_dataset", recorded)
    row = json.loads(json.dumps(data_set.data_set(bench.encoder, paths, images=10)))
    assert row["images"] == 10
    sizes = bench.encoder.image_processor([path for path, _ in zip(itertools.cycle(paths), range(10), strict=False)])[1]
    layers = 1 + len(bench.encoder.config.deepstack_visual_indexes)
    token_bytes = int(sizes.prod(1).sum()) // 4 * bench.encoder.config.out_hidden_size * 4 * layers
    assert token_bytes < row["bytes"] < token_bytes + 10_000
    assert all(row[name] > 0 for name in (PIPELINE, VECTORS, TOKENS, "disk"))
    assert [images for _, _, images in outputs] == [8] + [10] * (len(outputs) - 1)
    assert {kind for _, kind, _ in outputs} == {None, "npy"}
    assert not any(output.exists() for output, *_ in outputs)
    encode = Encoder.encode
    monkeypatch.setattr(Encoder, "encode", lambda self, images: encode(self, images[::-1]))
    with pytest.raises(ParityError, match="tokens in a shard differ"):
        data_set.data_set(bench.encoder, paths, images=10)


def test_seconds_of_the_disk(tmp_path, monkeypatch):
    sizes, fsync = [], os.fsync
    monkeypatch.setattr(os, "fsync", lambda file: sizes.append(os.fstat(file).st_size) or fsync(file))
    assert data_set._disk_seconds(tmp_path / "raw", 5 * 2**20, shard_bytes=2 * 2**20) > 0
    assert sizes == [2 * 2**20, 2 * 2**20, 2**20]
    assert not (tmp_path / "raw").exists()


def test_host_memory(monkeypatch):
    drawn = []
    monkeypatch.setattr(measure, "resident_bytes", lambda: 100 * len(drawn) if len(drawn) >= 4 else 9999)
    found = measure.memory_while((drawn.append(i) for i in range(10)), first=4)
    assert found == {"images": 10, "first": 4, "before": 400, "most": 1000}
    with pytest.raises(ValueError, match="expected more than 10, got 10"):
        measure.memory_while(iter(range(10)), first=10)
    monkeypatch.undo()
    before = measure.resident_bytes()
    kept = bytearray(b"x" * 50_000_000)
    assert 40e6 < measure.resident_bytes() - before < 90e6
    assert kept


def test_memory_is_that_of_a_generator(bench, paths, monkeypatch):
    def iter_encode(self, images):
        assert not isinstance(images, list | tuple)
        yield from images

    monkeypatch.setattr(Encoder, "iter_encode", iter_encode, raising=False)
    assert bench.memory(paths, images=9, first=2)["images"] == 9
