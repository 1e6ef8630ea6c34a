"""How long it takes to compile the kernels of a model's blocks, merger and patch embedding for images of four sizes.

The cache is empty; the grid plan, the merger's GELU and the bias in the residual sum are not among them.

One after another in one process, as a user's first calls would. Prints a line of JSON for each model: seconds of the
first calls, and how many kernels Triton compiled.
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

from common.jobs import progress
from kernel_bench.attention_cases import attention_case
from kernel_bench.cases import SIDES, Case
from kernel_bench.pass_cases import merger_case, norm_case
from kernel_bench.patch_cases import patch_case
from kernel_bench.projection_cases import MLP, QKV, mlp_case, qkv_case

MODELS = ("Qwen2.5-VL", "Qwen3-VL")
"""The 7B and the 8B: windows, RMSNorm and SwiGLU; LayerNorm, GELU and learned positions."""


def cases_of(model: str) -> list[Case]:
    channels, heads, head_dim, _ = QKV[model]
    act, _, width, _ = MLP[model]
    windowed = model == "Qwen2.5-VL"
    kind, patch = ("rms", 14) if windowed else ("layer", 16)
    cases = []
    for side in SIDES:
        tokens = (side // patch) ** 2
        cases += [attention_case(side, side // patch, head_dim, windows, {}) for windows in {False, windowed}]
        cases += [qkv_case(model, tokens, channels, heads, head_dim), mlp_case(model, act, tokens, channels, width)]
        cases += [norm_case(kind, channels, residual, tokens) for residual in (True, False)]
        cases += [merger_case(kind, channels, merged, windowed, tokens) for merged in {False, not windowed}]
        cases += [patch_case(model, side, pixels) for pixels in (None, torch.float32)]
    return cases


def first_calls(model: str) -> float:
    """Seconds that the model's operations take when they are called for the first time."""
    seconds = 0.0
    for case in cases_of(model):
        inputs = case.inputs(torch.device("cuda"), torch.bfloat16)
        run = case.ours.get("dispatch") or case.ours["qwenvit"]
        torch.cuda.synchronize()
        start = time.perf_counter()
        run.call(inputs)
        torch.cuda.synchronize()
        seconds += time.perf_counter() - start
    return seconds


def compile_times(models: Iterable[str]) -> list[dict[str, Any]]:
    """What `compile_time.py` says of each, in processes of their own, before others keep the machine busy."""
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
    torch.zeros(1, device="cuda") @ torch.zeros(1, device="cuda")  # CUDA and cuBLAS start before the clock does
    for model in options.models:
        with tempfile.TemporaryDirectory() as folder:
            os.environ["TRITON_CACHE_DIR"] = folder
            seconds = first_calls(model)
            compiled = len(list(Path(folder).glob("*/*.cubin")))
        print(json.dumps({"model": model, "seconds": round(seconds, 1), "kernels": compiled}), flush=True)


if __name__ == "__main__":
    main()
