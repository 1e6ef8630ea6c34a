"""Every kernel compiles for the GPUs it is meant for, without one: what fits, and what ptxas has to spill."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

KERNELS = {
    "_activate", "_add_position_rows", "_bound_segments", "_convert_rows", "_count_tokens", "_merge_average",
    "_merge_concat", "_place_patches", "_place_tokens", "_project_and_activate", "_project_and_rotate",
    "_rotate_by_head", "_rotate_in_place", "_swiglu", "_varlen_attention", "_window_attention", "norm_rows",
}  # fmt: skip
WITH_TMA = {"_embed_patches"}
SHARED_MEMORY = {"sm_80": 163 * 1024, "sm_90": 227 * 1024, "sm_100": 227 * 1024}
"""Bytes a block may have."""
SPILLED = {"sm_80": 380, "sm_90": 0, "sm_100": 0}
"""Bytes that ptxas spills in 16 bits, at most. On sm_80 windows do, whose tiles were chosen on sm_90."""


@pytest.mark.parametrize("arch", SHARED_MEMORY)
def test_every_kernel_compiles(arch, tmp_path):
    # In a process of its own, since this one may have chosen the interpreter for good.
    script = Path(__file__).parents[1] / "support/compile_ahead.py"
    paths = os.pathsep.join([str(script.parents[2]), os.environ.get("PYTHONPATH", "")])
    environment = os.environ | {"TRITON_INTERPRET": "0", "PYTHONPATH": paths, "TRITON_CACHE_DIR": str(tmp_path)}
    done = subprocess.run([sys.executable, script, arch], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    print(done.stdout)
    assert {row["kernel"] for row in rows} == KERNELS | (WITH_TMA if arch != "sm_80" else set())
    assert all(row["shared"] <= SHARED_MEMORY[arch] for row in rows)
    # 16 bits is what towers run in; in fp32 attention holds twice as much and spills some of it.
    assert [row for row in rows if row["dtype"] == "torch.bfloat16" and row["spilled"] > SPILLED[arch]] == []
