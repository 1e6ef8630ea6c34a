"""The machine a benchmark runs on: GPU, driver and versions, and what it can do at most."""

import platform
import subprocess
from dataclasses import dataclass
from datetime import date
from pathlib import Path

import torch
import triton


@dataclass(frozen=True)
class Ceilings:
    """What the machine can do, measured."""

    copy: float
    """Bytes a second of a device copy, read and written ones counted."""
    gemm: float
    """FLOPs a second of an 8192 × 8192 × 8192 product in bf16."""


def ceilings() -> Ceilings:
    source = torch.randn(2**30, device="cuda").bfloat16()
    target = torch.empty_like(source)
    copy = triton.testing.do_bench(lambda: target.copy_(source), return_mode="median")
    a, b = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    gemm = triton.testing.do_bench(
        lambda: a @ b, return_mode="min"
    )  # long ones meet the power limit; a ceiling does not
    return Ceilings(2 * source.nbytes / copy * 1e3, 2 * 8192**3 / gemm * 1e3)


def machine(measured: Ceilings, commit: str | None) -> str:
    """The machine and the versions."""
    driver = _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader").splitlines()[0]
    checkout = Path(__file__).parent
    commit = commit or _output("git", "-C", str(checkout), "describe", "--always", "--dirty") or "unknown"
    try:
        import transformers

        others = f", transformers {transformers.__version__}"
    except ImportError:
        others = ""
    versions = (
        f"torch {torch.__version__}, CUDA {torch.version.cuda}, cuDNN {torch.backends.cudnn.version()}, "
        f"triton {triton.__version__}{others}, Python {platform.python_version()}"
    )
    return (
        f"{torch.cuda.get_device_name()}, driver {driver}; {versions}; commit {commit}; "
        f"{date.today()}; bf16\n\n"
        f"Ceilings: device copy {measured.copy / 1e12:.2f} TB/s (read + written), "
        f"8192³ product {measured.gemm / 1e12:.0f} TFLOP/s"
    )


def _output(*command: str) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown" if command[0] == "nvidia-smi" else ""
