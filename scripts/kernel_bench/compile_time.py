"""Time the compilation of a model's kernels for four image sizes, from an empty cache.

The calls run one after another in one process, as a user's first calls do. They cover the blocks, the merger and the
patch embedding, but not the grid plan, the merger's GELU and the bias in the residual sum. Prints one line of JSON a
model: seconds of the first calls, and how many kernels Triton compiled.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from common.progress import progress
from kernel_bench.attention_cases import attention_case
from kernel_bench.cases import FOR_USERS, IMAGE_SIDES, Case
from kernel_bench.pass_cases import merger_case, norm_case
from kernel_bench.patch_cases import patch_embed_case
from kernel_bench.projection_cases import MLP_SHAPES, QKV_SHAPES, mlp_case, qkv_case

MODELS = ("Qwen2.5-VL", "Qwen3-VL")
"""Qwen2.5-VL-7B has windows, RMSNorm and SwiGLU; Qwen3-VL-8B has LayerNorm, GELU and learned positions."""


def model_cases(model: str) -> list[Case]:
    """Return the cases that together call every kernel of the model's blocks, merger and patch embedding."""
    channels, heads, head_dim, _ = QKV_SHAPES[model]
    act, _, width, _ = MLP_SHAPES[model]
    windowed = model == "Qwen2.5-VL"
    kind, patch_size = ("rms", 14) if windowed else ("layer", 16)
    cases = []
    for side in IMAGE_SIDES:
        patches = side // patch_size
        tokens = patches**2
        cases += [attention_case(side, patches, head_dim, windows, {}) for windows in {False, windowed}]
        cases += [qkv_case(model, tokens, channels, heads, head_dim), mlp_case(model, act, tokens, channels, width)]
        cases += [norm_case(kind, channels, residual, tokens) for residual in (True, False)]
        cases += [merger_case(kind, channels, merged, windowed, tokens) for merged in {False, not windowed}]
        cases += [patch_embed_case(model, side, pixel_dtype) for pixel_dtype in (None, torch.float32)]
    return cases


def time_first_calls(model: str) -> float:
    """Return the seconds that the model's operations take when each is called for the first time."""
    seconds = 0.0
    for case in model_cases(model):
        inputs = case.make_inputs(torch.device("cuda"), torch.bfloat16)
        operation = next(case.implementations[name] for name in FOR_USERS if name in case.implementations)
        torch.cuda.synchronize()
        start = time.perf_counter()
        operation.call(inputs)
        torch.cuda.synchronize()
        seconds += time.perf_counter() - start
    return seconds


def measure_compile_times(models: Iterable[str]) -> list[dict[str, Any]]:
    """Run this module once for each model, all at the same time, and return what each prints.

    Call it before other work keeps the machine busy. A model whose process fails is missing from the result.
    """
    progress("compiling with an empty cache")
    command = [sys.executable, "-m", "kernel_bench.compile_time"]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    jobs = [subprocess.Popen([*command, model], stdout=subprocess.PIPE, text=True, env=environment) for model in models]
    lines = [job.communicate()[0] for job in jobs]
    progress("")
    return [json.loads(line) for line in lines if line]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "models", nargs="*", default=MODELS, metavar="MODEL", help=f"of {', '.join(MODELS)}; default: all"
    )
    options = parser.parse_args()
    if unknown := sorted(set(options.models) - set(MODELS)):
        parser.error(f"models: expected some of {', '.join(MODELS)}, got {', '.join(unknown)}")
    if not torch.cuda.is_available():
        raise SystemExit("compile_time.py: needs a GPU, and torch sees none")
    torch.zeros(1, device="cuda") @ torch.zeros(1, device="cuda")  # start CUDA and cuBLAS before the clock
    for model in options.models:
        with tempfile.TemporaryDirectory() as folder:
            os.environ["TRITON_CACHE_DIR"] = folder
            seconds = time_first_calls(model)
            compiled = len(list(Path(folder).glob("*/*.cubin")))
        print(json.dumps({"model": model, "seconds": round(seconds, 1), "kernels": compiled}), flush=True)


if __name__ == "__main__":
    main()
