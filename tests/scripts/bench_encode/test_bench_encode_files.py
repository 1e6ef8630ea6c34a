"""`scripts/bench_encode.py`: the folders of pictures that it makes, and the sample that it takes of one."""

import random
import sys
from dataclasses import replace

import numpy as np
from PIL import Image

from encode_bench import folders as encode_folders
from encode_bench import model_run, stages
from encode_bench.folders import FOLDERS, FULL_HD, MIX, PHOTOS, Folder, make_folder, photographs
from support.small_encode_bench import SMALL


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


def test_a_sample_is_spread_over_the_sizes(tmp_path):
    paths = make_folder(Folder("many", tuple((8 + i * 7 % 40, 8) for i in range(40)), 4), tmp_path, photographs()[1])

    def width(path):
        with Image.open(path) as image:
            return image.width

    found = [width(path) for path in stages.sample_by_area(paths, 8)]
    assert found == list(range(8, 48))[2::5]  # the middle of each eighth
    assert stages.sample_by_area(paths[:3], 8) == sorted(paths[:3], key=width)
