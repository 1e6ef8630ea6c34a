"""Run ptxas: report why it failed, and try again where the machine may have been short of memory for a moment."""

import contextlib
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from triton.runtime.errors import PTXASError

T = TypeVar("T")


def ptxas_report(program: Path, ptx: str, arch: str) -> str:
    """Compile PTX and return ptxas' report; raise PTXASError with its command, return code and stderr if it fails."""
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "kernel.ptx"
        source.write_text(ptx)
        command = [str(program), "-v", f"-arch={arch}", str(source), "-o", f"{folder}/kernel.cubin"]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        text = f"ptxas ended with {done.returncode}\nstderr: {done.stderr or '(empty)'}\ncommand: {' '.join(command)}"
        raise PTXASError(text)
    return done.stderr


def describe(failure: PTXASError) -> str:
    """Return a failure's text with ptxas' return code, which Triton leaves out for 255."""
    triton_text = "Internal Triton PTX codegen error"
    return str(failure).replace(triton_text, f"{triton_text}: ptxas ended with 255")


def ended_without_a_reason(failure: PTXASError) -> bool:
    """Return whether ptxas ended with 255 and named no error in the PTX."""
    text = describe(failure)
    return "ptxas ended with 255" in text and not re.search(
        r"; (?:error|fatal)\s*:|ptxas error\s*:|Ptx assembly aborted", text
    )


def retry_once(call: Callable[[], T]) -> T:
    """Return the result of `call`, which runs ptxas.

    ptxas ends with 255 for errors in the PTX, which it names, and also, without a message, when a busy machine denies
    it memory or disk. Only the latter can succeed on a second try, so it is tried once more.

    Raises:
        RuntimeError: ptxas failed; the message has its output and the free disk and memory.
    """
    for is_last in (False, True):
        try:
            with contextlib.redirect_stdout(sys.stderr):  # Triton prints the PTX of a failure
                return call()
        except PTXASError as failure:
            if is_last or not ended_without_a_reason(failure):
                raise RuntimeError(f"{describe(failure)}\n{free_disk_and_memory()}") from failure
            print(f"{describe(failure)}\n{free_disk_and_memory()}\nTrying once more.", file=sys.stderr)
    raise AssertionError


def free_disk_and_memory() -> str:
    folder = tempfile.gettempdir()
    memory = re.findall(r"(?:MemAvailable|SwapFree):.*", Path("/proc/meminfo").read_text())
    return f"free in {folder}: {shutil.disk_usage(folder).free / 2**20:.0f} MiB; {'; '.join(memory)}"
