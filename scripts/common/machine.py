"""The machine a benchmark runs on: GPU, driver, software versions and measured ceilings."""

import platform
import subprocess
from dataclasses import dataclass
from datetime import date
from importlib import metadata
from pathlib import Path

import torch
import triton


@dataclass(frozen=True)
class Ceilings:
    """The machine's measured limits."""

    copy_bandwidth: float
    """Bytes a second of a device copy, read and written bytes counted."""
    gemm_throughput: float
    """FLOPs a second of an 8192 × 8192 × 8192 product in bf16."""


def measure_ceilings() -> Ceilings:
    source = torch.randn(2**30, device="cuda").bfloat16()
    target = torch.empty_like(source)
    copy_ms = triton.testing.do_bench(lambda: target.copy_(source), return_mode="median")
    a, b = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    # The minimum: long products run into the power limit, and a ceiling must not.
    gemm_ms = triton.testing.do_bench(lambda: a @ b, return_mode="min")
    return Ceilings(2 * source.nbytes / copy_ms * 1e3, 2 * 8192**3 / gemm_ms * 1e3)


def describe_machine(measured: Ceilings, commit: str | None) -> str:
    """Return two paragraphs: GPU, driver, versions, commit, date and dtype; then the ceilings."""
    driver = _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader").splitlines()[0]
    checkout = Path(__file__).parent
    commit = commit or _output("git", "-C", str(checkout), "describe", "--always", "--dirty") or "unknown"
    versions = (
        f"torch {torch.__version__}, CUDA {torch.version.cuda}, cuDNN {torch.backends.cudnn.version()}, "
        f"triton {triton.__version__}{_version_of('transformers')}{_version_of('flash-attn-4')}, "
        f"Python {platform.python_version()}"
    )
    return (
        f"{torch.cuda.get_device_name()}, driver {driver}; {versions}; commit {commit}; "
        f"{date.today()}; bf16\n\n"
        f"Ceilings: device copy {measured.copy_bandwidth / 1e12:.2f} TB/s (read + written), "
        f"8192³ product {measured.gemm_throughput / 1e12:.0f} TFLOP/s"
    )


def _version_of(package: str) -> str:
    """Return a package's name and version after a comma; "" where it is not installed."""
    try:
        return f", {package} {metadata.version(package)}"
    except metadata.PackageNotFoundError:
        return ""


def _output(*command: str) -> str:
    """Return what a command prints; "unknown" for the driver and "" for the commit where it fails."""
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown" if command[0] == "nvidia-smi" else ""
