"""A small folder of pictures, and the bench of `scripts/bench_encode.py` with a narrow tower for it."""

from dataclasses import replace

from common.hf_towers import build_tower
from common.machine import Ceilings
from encode_bench import measure
from encode_bench.folders import Folder, make_folder, photographs
from qwenvit import Encoder
from qwenvit.preprocess.image_processor import ImageProcessor
from support.towers import narrow, ours_from

SMALL = Folder("small", ((64, 48), (90, 70), (64, 48), (70, 100)), 2)
LIMITS = Ceilings(4e12, 7e14)


def small_files(folder):
    """Write the files of `SMALL` into an empty folder, and return their paths."""
    return make_folder(SMALL, folder, photographs()[1])


def small_bench():
    """Return a bench with a narrow tower of two blocks, and the same weights in transformers' tower."""
    config = narrow("qwen3_vl", depth=2)
    hf_tower = build_tower(config)
    processor = replace(ImageProcessor.for_family(config.family), resize="torch", min_pixels=4096)
    return measure.EncodeBench(Encoder(ours_from(hf_tower, config), processor), hf_tower)
