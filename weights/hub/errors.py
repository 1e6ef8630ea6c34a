"""Errors of the Hugging Face Hub, reworded into one line that says what to do."""

from collections.abc import Iterator
from contextlib import contextmanager

from huggingface_hub import constants

from qwenvit.weights.hub.reader import StatusError, TransferError


@contextmanager
def explain_hub_errors(repo_id: str, revision: str, *, resumable: bool = False) -> Iterator[None]:
    """Replace errors of the Hub and the network by one line that names the repository and what to do.

    `resumable` says that the next call resumes what breaks off here. Raises FileNotFoundError (no such repository,
    revision or file), PermissionError (gated), ConnectionError, or ValueError (an empty or shortened file).
    """
    try:
        yield
    except TransferError as error:
        if resumable:
            message = "the download broke off; the downloaded part is kept, and the next call resumes it"
            raise ConnectionError(f"{repo_id}: {message} ({error})") from error
        raise ConnectionError(f"{repo_id} ({revision}): no answer from {constants.ENDPOINT}: {error}") from error
    except StatusError as error:
        raise _explained(error, repo_id, revision) from error


def _explained(error: StatusError, repo_id: str, revision: str) -> OSError | ValueError:
    where, page = f"{repo_id} ({revision})", f"{constants.ENDPOINT}/{repo_id}"
    if error.code == "RevisionNotFound":
        return FileNotFoundError(f"{where}: the repository exists, but this revision does not")
    if error.code == "GatedRepo" or error.status == 403:
        return PermissionError(
            f"{where}: access is restricted: accept the licence at {page}, then pass token=... or run `hf auth login` "
            f"({error})"
        )
    if error.code == "RepoNotFound" or error.status == 401:
        return FileNotFoundError(
            f"{where}: no such repository, or a private one: check the name at {page}; for a private one "
            "pass a valid token=... or run `hf auth login`"
        )
    if error.status == 404:
        return FileNotFoundError(f"{where}: the repository has no file {error.url}")
    if error.status == 416:
        return ValueError(f"{where}: truncated: expected more bytes in {error.url} than it has")
    return ConnectionError(f"{where}: no answer from {constants.ENDPOINT}: {error}")
