"""Peak anonymous memory of loading. Pages of the mapped file do not count, because the kernel can drop them."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

ROOT = Path(__file__).parents[2]

MEASURE = """
import re, sys, threading
from pathlib import Path
import torch
from qwenvit.weights.local import find_tensors, load_tensors
from qwenvit.weights.names import canonical_name

def anonymous():
    return int(re.search(r"RssAnon:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) << 10

entries = find_tensors(sys.argv[1])
expected = {
    canonical_name(name.removeprefix("visual."), "qwen2_vl"): torch.Size(entry.shape)
    for name, entry in entries.items()
}
torch.empty(1).to(torch.float32, copy=True)
before, peak, done = anonymous(), 0, threading.Event()
def watch():
    global peak
    while not done.is_set():
        peak = max(peak, anonymous())
watcher = threading.Thread(target=watch)
watcher.start()
tower = load_tensors(entries, expected, family="qwen2_vl", dtype=getattr(torch, sys.argv[2]))
done.set()
watcher.join()
print(max(peak, anonymous()) - before, sum(t.nbytes for t in tower.values()))
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="anonymous memory is read from Linux's /proc")
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_memory_is_the_tower_and_one_tensor(tmp_path, dtype):
    largest = 64 << 20
    tower = {
        f"visual.blocks.{i}.mlp.fc{j}.weight": torch.ones(largest // 2, dtype=torch.bfloat16)
        for i, j in ((0, 1), (0, 2))
    }
    rest = {f"model.layers.{i}.weight": torch.ones(largest // 2, dtype=torch.bfloat16) for i in range(4)}
    save_file(rest | tower, tmp_path / "model.safetensors")
    run = [sys.executable, "-c", MEASURE, str(tmp_path), dtype]
    peak, loaded = map(int, subprocess.run(run, cwd=ROOT, check=True, capture_output=True, text=True).stdout.split())
    assert loaded == 2 * largest * (1 if dtype == "bfloat16" else 2)
    # The lower bound shows that the sampling thread saw the peak.
    assert 0.95 * loaded <= peak <= loaded + largest + (100 << 20)
