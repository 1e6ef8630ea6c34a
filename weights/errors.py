"""What goes wrong on the way to the Hugging Face Hub, in one line that says what to do about it."""

from collections.abc import Iterator
from contextlib import contextmanager

from huggingface_hub import constants
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from qwenvit.weights.ranges import TRANSPORT_ERRORS, TransferError

_HUB_ERRORS: tuple[type[BaseException], ...] = (EntryNotFoundError, *TRANSPORT_ERRORS)


@contextmanager
def explained(repo_id: str, revision: str) -> Iterator[None]:
    """Turn what goes wrong on the way to the Hub into one line that names the repository and what to do."""
    try:
        yield
    except TransferError as error:
        raise ConnectionError(
            f"{repo_id}: the download broke off; what has come is kept, and the next call goes on from there ({error})"
        ) from error
    except _HUB_ERRORS as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise  # the disk's, not the network's
        raise _explanation(error, repo_id, revision) from error


def _explanation(error: BaseException, repo_id: str, revision: str) -> OSError:
    where, page = f"{repo_id} ({revision})", f"{constants.ENDPOINT}/{repo_id}"
    # Where huggingface_hub finds neither the Hub nor a cached file, the server's own answer is the cause.
    cause = error.__cause__ if isinstance(error, LocalEntryNotFoundError) and error.__cause__ else error
    response = getattr(cause, "response", None)
    status = None if response is None else response.status_code
    if isinstance(cause, RevisionNotFoundError):
        return FileNotFoundError(f"{where}: the repository is there, this revision is not")
    if isinstance(cause, GatedRepoError) or status == 403:
        return PermissionError(
            f"{where}: access is restricted: accept the licence at {page}, then pass token=... or run `hf auth login`"
        )
    if isinstance(cause, RepositoryNotFoundError) or status == 401:
        return FileNotFoundError(
            f"{where}: no such repository, or a private one: check the name at {page}; for a private one "
            "pass a valid token=... or run `hf auth login`"
        )
    if response is not None and status == 404:
        return FileNotFoundError(f"{where}: has no file {response.url}")
    return ConnectionError(f"{where}: no answer from {constants.ENDPOINT}: {cause}")
