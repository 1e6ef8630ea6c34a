"""Keeping two jobs out of one folder."""

import os
import socket
import time
import warnings
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]


SECONDS_TO_WAIT = 5
"""The processes of a job that was killed may take a moment to end."""


class FolderLock:
    """A lock that the system gives back when the last process that has it is gone, however it died.

    A lock file that a dead job left behind keeps nobody out. The file names the job that has the lock. Where the file
    system has no locks, nothing keeps two jobs apart, and a warning says so. On Windows, which has no `fcntl`, nothing
    keeps them apart either, without a warning.

    Attributes:
        descriptor: the open lock file; a worker process that inherits it has the lock too.

    Raises:
        BlockingIOError: another job has the lock.
        OSError: the file cannot be written.
    """

    def __init__(self, path: Path) -> None:
        self.descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            give_up = time.monotonic() + SECONDS_TO_WAIT
            while fcntl is not None and not _try_lock(self.descriptor):
                if time.monotonic() < give_up:
                    time.sleep(0.05)
                    continue
                owner = os.pread(self.descriptor, 200, 0).decode(errors="replace").strip()
                raise BlockingIOError(f"{path.parent}: another job writes there ({owner or 'starting'})")
            os.ftruncate(self.descriptor, 0)
            os.write(self.descriptor, f"process {os.getpid()} on {socket.gethostname()}\n".encode())
            os.fsync(self.descriptor)  # a full disk is found here, before a model is loaded
        except BaseException:
            os.close(self.descriptor)
            raise

    def release(self) -> None:
        """Give the lock back; the file stays, because removing it could let two jobs lock two files."""
        os.close(self.descriptor)


def _try_lock(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:  # a file system without locks
        warnings.warn(
            f"the file system has no locks ({error.strerror}): start no second job in this folder", stacklevel=3
        )
    return True
