"""Memory and open files stay what they are, however many images there are."""

import os

import numpy as np
import pytest
from PIL import Image

from support.jobs import run_job


def resident_bytes() -> int:
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.long
@pytest.mark.skipif(not os.path.exists("/proc/self/statm"), reason="reads Linux's /proc")
def test_memory_and_open_files_are_flat_over_5000_images(tmp_path):
    """All tokens together would be 0.8 GB, and a shard a third of that."""
    folder = tmp_path / "pictures"
    folder.mkdir()
    pixels = np.random.default_rng(0).integers(0, 256, (7, 8, 3), dtype=np.uint8)
    Image.fromarray(pixels).resize((224, 192)).save(folder / "0000.jpg")
    for number in range(1, 5000):
        os.link(folder / "0000.jpg", folder / f"{number:04d}.jpg")
    seen = []

    def look(_):
        seen.append((resident_bytes(), len(os.listdir("/proc/self/fd"))))

    manifest = run_job(folder, tmp_path / "out", shard_bytes=256 * 2**20, on_item=look)
    assert manifest.counts["images"] == len(seen) == 5000
    assert manifest.counts["bytes"] > 800e6
    memory, files = zip(*seen, strict=True)
    assert max(memory[500:]) - min(memory[500:]) < 200e6
    assert max(files[10:]) - min(files[10:]) <= 4
