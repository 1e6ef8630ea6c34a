"""Setup shared by all tests."""

import gc
import os
import signal

# OpenMP's threads sleep while they wait. Spinning on busy cores makes some tests 20 to 40 times slower. OpenMP reads
# these when torch is imported, and subprocesses inherit them.
os.environ |= {"OMP_WAIT_POLICY": "PASSIVE", "KMP_BLOCKTIME": "0", "GOMP_SPINCOUNT": "0"}
# The order of a sum, and so its last bit, may depend on the number of threads: subprocesses and fixtures have it too.
os.environ["OMP_NUM_THREADS"] = "2"

# A shell without job control starts commands in the background with SIGINT ignored, and nohup ignores SIGHUP. Tests'
# subprocesses inherit it.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN:
    signal.signal(signal.SIGHUP, signal.SIG_DFL)

import pytest
import torch

from common.torchvision_cpu import define_torchvision_schemas

define_torchvision_schemas()  # before transformers imports torchvision

# Without a GPU, Triton kernels run in Triton's interpreter, on CPU tensors. Every `@triton.jit` reads this variable
# when Python executes it, also those inside Triton, so it must be set before the first import of Triton.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")


@pytest.fixture(autouse=True)
def _two_threads() -> None:
    """Undo what the test before set."""
    torch.set_num_threads(2)


def pytest_collection_finish() -> None:
    """Exclude what was imported from garbage collection, which many tests ask for: it takes a second otherwise."""
    gc.collect()
    gc.freeze()
