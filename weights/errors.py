"""Errors of the Hugging Face Hub, reworded into one line that says what to do."""

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
def explain_hub_errors(repo_id: str, revision: str) -> Iterator[None]:
    """Replace errors of the Hub and the network by one line that names the repository and what to do.

    Raises FileNotFoundError (no such repository, revision or file), PermissionError (gated), or ConnectionError.
    """
    try:
        yield
    except TransferError as error:
        raise ConnectionError(
            f"{repo_id}: the download broke off; the downloaded part is kept, and the next call resumes it ({error})"
        ) from error
    except _HUB_ERRORS as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise  # an error of the disk, not of the network
        raise _explained(error, repo_id, revision) from error


def _explained(error: BaseException, repo_id: str, revision: str) -> OSError:
    where, page = f"{repo_id} ({revision})", f"{constants.ENDPOINT}/{repo_id}"
    # LocalEntryNotFoundError: neither the Hub nor the cache has the file. Its cause is the server's own answer.
    cause = error.__cause__ if isinstance(error, LocalEntryNotFoundError) and error.__cause__ else error
    response = getattr(cause, "response", None)
    status = None if response is None else response.status_code
    if isinstance(cause, RevisionNotFoundError):
        return FileNotFoundError(f"{where}: the repository exists, but this revision does not")
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
        return FileNotFoundError(f"{where}: the repository has no file {response.url}")
    return ConnectionError(f"{where}: no answer from {constants.ENDPOINT}: {cause}")
