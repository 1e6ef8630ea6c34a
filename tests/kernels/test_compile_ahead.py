"""Every kernel compiles for its GPU architectures, without a GPU: shared memory fits, and ptxas spills little."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import triton

KERNELS = {
    "_activate", "_add_position_rows", "_clone_rows", "_convert_rows", "_count_tokens", "_merge_average",
    "_merge_concat", "_pad_with_ones", "_plan_patches", "_plan_segments", "_place_tokens", "_project_and_activate",
    "_project_and_rotate", "_resize_rows", "_resize_to_patches", "_rotate_by_head", "_rotate_in_place", "_swiglu",
    "_varlen_attention", "_window_attention", "norm_rows",
}  # fmt: skip
SHARED_MEMORY = {"sm_80": 163 * 1024, "sm_90": 227 * 1024, "sm_100": 227 * 1024}
"""Bytes of shared memory that a block may use."""
TRITON = tuple(int(part) for part in triton.__version__.split(".")[:2])
MAX_SPILLED = {"sm_80": 388 if TRITON < (3, 7) else 380 if TRITON < (3, 9) else 436, "sm_90": 0, "sm_100": 0}
"""Most bytes that ptxas may spill in bf16. Attention in windows spills on sm_80: its tiles were tuned on sm_90."""
MAX_SPILLED_BY_INTEGERS = {"_plan_patches": 40, "_count_tokens": 4}
"""Most bytes that ptxas may spill in kernels of 64-bit integers, which run once a call. Triton 3.6 spills none."""


def compile_ahead(arch, dtypes, folder, fp_fusion="0"):
    """Return a row of `support/compile_ahead.py` for each kernel; `fp_fusion` is Triton's default for contraction."""
    # In its own process: this one may have imported Triton in interpreter mode.
    script = Path(__file__).parents[1] / "support/compile_ahead.py"
    paths = os.pathsep.join([str(script.parents[2]), str(script.parents[1]), os.environ.get("PYTHONPATH", "")])
    environment = os.environ | {"TRITON_INTERPRET": "0", "TRITON_DEFAULT_FP_FUSION": fp_fusion, "PYTHONPATH": paths}
    environment |= {"TRITON_CACHE_DIR": str(folder), "TMPDIR": str(folder)}
    done = subprocess.run([sys.executable, script, arch, *dtypes], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.mark.parametrize(
    ("arch", "dtypes"),
    [
        pytest.param("sm_90", ["bfloat16"], id="sm_90 in bf16"),
        *(pytest.param(arch, ["bfloat16", "float32"], id=arch, marks=pytest.mark.long) for arch in SHARED_MEMORY),
    ],
)
def test_every_kernel_compiles(arch, dtypes, tmp_path):
    rows = compile_ahead(arch, dtypes, tmp_path)
    assert {row["kernel"] for row in rows} == KERNELS
    assert all(row["shared"] <= SHARED_MEMORY[arch] for row in rows)
    assert [row["kernel"] for row in rows if not row["fp_fusion"]] == []
    # Towers run in 16 bits. In fp32, attention needs twice the registers and spills.
    in_bf16 = [row for row in rows if row["dtype"] == "bfloat16"]
    most = {row["kernel"]: max(MAX_SPILLED[arch], MAX_SPILLED_BY_INTEGERS.get(row["kernel"], 0)) for row in in_bf16}
    assert [row for row in in_bf16 if row["spilled"] > most[row["kernel"]]] == []


@pytest.mark.long
def test_kernels_do_not_depend_on_the_default_of_fp_fusion(tmp_path):
    contracted, default_off = (compile_ahead("sm_90", ["bfloat16"], tmp_path, value) for value in ("1", "0"))
    assert [row["ptx"] for row in contracted] == [row["ptx"] for row in default_off]
