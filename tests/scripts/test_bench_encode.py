"""`scripts/bench_encode.py`: the files it makes, what it refuses to report, what it prints. Nothing here is timed."""

import argparse
import itertools
import json
import os
import random
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import bench_encode
import numpy as np
import pytest
import torch
from PIL import Image

from common import timing
from common.hf_towers import build_tower, forward
from common.machine import Ceilings
from common.steps import ParityError, steps_of
from common.timing import gpu_seconds
from encode_bench import chart, data_set, measure, model_run, parity, report, stages
from encode_bench import folders as encode_folders
from encode_bench.folders import FOLDERS, FULL_HD, MIX, PHOTOS, Folder, make_folder, photographs
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
from qwenvit import Encoder, item_stream
from qwenvit import encoder as encoder_module
from qwenvit.preprocess.image_processor import ImageProcessor
from support.cuda_events import events_at
from support.towers import narrow, ours_from

SMALL = Folder("small", ((64, 48), (90, 70), (64, 48), (70, 100)), 2)
LIMITS = Ceilings(4e12, 7e14)


@pytest.fixture(scope="module")
def paths(tmp_path_factory):
    return make_folder(SMALL, tmp_path_factory.mktemp("files"), photographs()[1])


@pytest.fixture(scope="module")
def bench():
    config = narrow("qwen3_vl", depth=2)
    hf_tower = build_tower(config)
    processor = replace(ImageProcessor.for_family(config.family), resize="torch", min_pixels=4096)
    return measure.EncodeBench(Encoder(ours_from(hf_tower, config), processor), hf_tower)


def bench_with(bench, **changes):
    """Return a bench whose encoder has another image processor, while transformers' processor stays."""
    other = object.__new__(measure.EncodeBench)
    processor = replace(bench.encoder.image_processor, **changes)
    other.encoder, other.hf_tower = Encoder(bench.encoder.tower, processor), bench.hf_tower
    other.processor = bench.processor
    return other


def test_folders_of_the_benchmark():
    counts = {folder.name: len(folder.sizes) for folder in FOLDERS}
    assert counts == {"1920×1080": 64, "640×480": 512, "4000×3000": 16, "mix of sizes": 500}
    for folder in FOLDERS[:3]:
        assert set(folder.sizes) == {tuple(map(int, folder.name.split("×")))}
    sides = [side for size in FOLDERS[3].sizes for side in size]
    assert len(set(FOLDERS[3].sizes)) > 490
    assert 200 <= min(sides) < 210
    assert 1900 < max(sides) <= 2000
    assert 580 < np.median(sides) < 690  # uniform in the logarithm: √(200 · 2000) = 632
    random.seed(1)
    assert encode_folders.mixed_sizes(500) == FOLDERS[3].sizes
    assert [folder.name for folder in model_run.folders_for(["video", "mix of sizes"])] == [FULL_HD, MIX]
    assert [folder.name for folder in model_run.folders_for(["host memory"])] == [PHOTOS]


def test_files_have_their_sizes_and_are_the_same_every_time(paths, tmp_path):
    assert len(paths) == len(SMALL.sizes)
    for path, size in zip(paths, SMALL.sizes, strict=True):
        with Image.open(path) as image:
            assert (image.format, image.mode, image.size) == ("JPEG", "RGB", size)
            assert np.asarray(image).std() > 5
    again = make_folder(SMALL, tmp_path, photographs()[1])
    assert [path.read_bytes() for path in again] == [path.read_bytes() for path in paths]
    same_picture = make_folder(replace(SMALL, name="same picture"), tmp_path, photographs()[1][:1])
    assert same_picture[0].read_bytes() != same_picture[2].read_bytes()  # equal sizes, other noise


def test_drawings_replace_photographs_that_are_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "skimage", None)
    source, pictures = photographs()
    assert source == "drawings"
    assert len(pictures) == 4
    assert {picture.mode for picture in pictures} == {"RGB"}


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


def test_a_sample_is_spread_over_the_sizes(tmp_path):
    paths = make_folder(Folder("many", tuple((8 + i * 7 % 40, 8) for i in range(40)), 4), tmp_path, photographs()[1])

    def width(path):
        with Image.open(path) as image:
            return image.width

    found = [width(path) for path in stages.sample_by_area(paths, 8)]
    assert found == list(range(8, 48))[2::5]  # the middle of each eighth
    assert stages.sample_by_area(paths[:3], 8) == sorted(paths[:3], key=width)


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


@pytest.mark.parametrize(
    "changes", [{"image_mean": (0.5, 0.5, 0.500001)}, {"resize": "pillow"}, {"min_pixels": 20_000}], ids=str
)
def test_a_wrong_processor_is_refused(bench, paths, changes):
    with pytest.raises(measure.ParityError, match=r"0000\.jpg: pixel values differ from transformers' on the CPU"):
        bench_with(bench, **changes).folder(SMALL, paths)


def test_pixel_values_of_the_gpu_that_differ_are_refused(bench, paths, monkeypatch):
    def preprocess(encoder, image):
        pixels, grid = stages.preprocess(encoder, image)
        pixels[3, 5] = torch.nextafter(pixels[3, 5], torch.tensor(9.0))
        return pixels, grid

    assert parity.pixel_failures(bench.encoder, bench.processor, paths[0]) == []
    monkeypatch.setattr(parity, "preprocess", preprocess)
    assert parity.pixel_failures(bench.encoder, bench.processor, paths[0]) == [
        "0000.jpg: pixel values on the cpu differ from those on the CPU"
    ]


def test_other_tokens_are_refused(bench, paths, monkeypatch):
    encode = Encoder.encode

    def encode_in_another_order(self, images, **options):
        return encode(self, list(images)[::-1] if isinstance(images, list) else images, **options)

    assert parity.token_failures(bench.encoder, paths) == []
    monkeypatch.setattr(Encoder, "encode", encode_in_another_order)
    with pytest.raises(measure.ParityError, match=r"0000\.jpg to 0002\.jpg: encode differs from the tower"):
        bench.folder(SMALL, paths)
    monkeypatch.setattr(Encoder, "encode_video", lambda self, _: encode(self, paths[0]))
    with pytest.raises(measure.ParityError, match="encode_video differs"):
        bench.video(paths[:1], frames=4)


def test_no_figure_without_parity(bench, paths, monkeypatch):
    monkeypatch.setattr(model_run, "FOLDERS", (SMALL,))
    result = model_run.empty_result("Qwen3-VL-8B")
    files = {SMALL.name: paths, FULL_HD: paths}
    wrong, saved = bench_with(bench, image_std=(0.5, 0.5, 0.6)), []
    model_run.run_steps(wrong, result, [SMALL.name, "preprocessing"], LIMITS, files, steps_of(result, saved.append))
    assert (result["rows"], result["preprocessing"]) == ([], None)
    assert [name for name, _ in result["failed"]] == ["small", "preprocessing"]
    assert len(saved) == 2
    text = report.block([result], for_readers=True)
    assert (
        "- Failed: small, preprocessing: ParityError: 0000.jpg: pixel values differ from transformers' on the CPU"
        in text
    )
    assert "×" not in text.replace("1920×1080", "").partition("Times are")[0]


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


def test_chart(tmp_path):
    bars = chart.parts_by_bar(row_of(), threads=4)
    assert [sum(parts.values()) for parts in bars.values()] == pytest.approx([31.5, 3.2, 60, 100, 90])
    assert [len(parts) for parts in bars.values()] == [2, 3, 1, 1, 1]
    pytest.importorskip("matplotlib")
    for results in ([result_of(row_of(), row_of(MIX)), result_of(row_of())], [result_of()]):
        chart.draw(results, tmp_path / "chart.png")
        assert (tmp_path / "chart.png").read_bytes().startswith(b"\x89PNG")


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


def test_work_on_the_gpu_is_timed_behind_other_work(monkeypatch):
    now, order = [0.0], []

    def call():
        order.append("call")
        now[0] += len(order)

    cuda = SimpleNamespace(
        is_available=lambda: True,
        Event=events_at(now, recorded=lambda: order.append("event")),
        synchronize=lambda: order.append("wait"),
        _sleep=lambda _: order.append("busy"),
    )
    monkeypatch.setattr(torch, "cuda", cuda)
    assert gpu_seconds(call, repeats=3) == pytest.approx(9e-3)  # 4, 9 and 14 ms
    assert order == ["wait", "busy", "event", "call", "event"] * 3 + ["wait"]


def test_contenders_take_turns(monkeypatch):
    order, now = [], [0.0]

    def contender(name, seconds):
        def call():
            order.append(name)
            now[0] += seconds[order.count(name) - 1]

        return call

    monkeypatch.setattr(timing.time, "perf_counter", lambda: now[0])
    calls = {"a": contender("a", [1, 5, 2]), "b": contender("b", [1, 1, 1])}
    assert measure.median_seconds(calls, rounds=3, max_seconds=100) == {"a": 2, "b": 1}
    assert order == ["a", "b", "b", "a", "a", "b"]
    order.clear()
    measure.median_seconds(calls, rounds=3, max_seconds=5)
    assert order == ["a", "b", "b", "a"]  # 2 s after the first round, 8 s after the second
