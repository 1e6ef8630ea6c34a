"""Compile kernels and keep ptxas' reports; try again where the machine may have been short of memory for a moment."""

import contextlib
import io
import re
import shutil
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from triton import knobs
from triton.runtime.errors import PTXASError

T = TypeVar("T")


def describe(failure: PTXASError) -> str:
    """Return a failure's text with ptxas' return code, which Triton leaves out for 255."""
    triton_text = "Internal Triton PTX codegen error"
    return str(failure).replace(triton_text, f"{triton_text}: ptxas ended with 255")


def ended_without_a_reason(failure: PTXASError) -> bool:
    """Return whether ptxas ended with 255 and named no error in the PTX."""
    text = describe(failure)
    return "ptxas ended with 255" in text and not re.search(
        r"; (?:error|fatal)\s*:|ptxas\S* error\s*:|Ptx assembly aborted", text
    )


def compile_with_report(compile_kernel: Callable[[], T]) -> tuple[T, str]:
    """Return the result of `compile_kernel`, and what ptxas reported, with the options that Triton gave it.

    ptxas ends with 255 for errors in the PTX, which it names, and also, without a message, when a busy machine denies
    it memory or disk. Only the latter can succeed on a second try, so it is tried once more.

    Raises:
        RuntimeError: ptxas failed; the message has its output and the free disk and memory.
    """
    knobs.compilation.always_compile = True  # a kernel from the cache has no report
    knobs.nvidia.dump_ptxas_log = True
    for is_last in (False, True):
        printed = io.StringIO()
        try:
            with contextlib.redirect_stdout(printed):
                return compile_kernel(), printed.getvalue()
        except PTXASError as failure:
            if is_last or not ended_without_a_reason(failure):
                raise RuntimeError(f"{describe(failure)}\n{free_disk_and_memory()}") from failure
            print(f"{describe(failure)}\n{free_disk_and_memory()}\nTrying once more.", file=sys.stderr)
    raise AssertionError


def free_disk_and_memory() -> str:
    folder = tempfile.gettempdir()
    memory = re.findall(r"(?:MemAvailable|SwapFree):.*", Path("/proc/meminfo").read_text())
    return f"free in {folder}: {shutil.disk_usage(folder).free / 2**20:.0f} MiB; {'; '.join(memory)}"
