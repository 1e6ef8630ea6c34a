"""Download a tower, or an adapter beside it, from one commit of a Hub repository."""

import hashlib
import os
from collections.abc import Iterable
from pathlib import Path

from qwenvit.weights.adapters.adapter import ADAPTER_FILE, refuse_other_weights
from qwenvit.weights.adapters.config import ADAPTER_CONFIG
from qwenvit.weights.adapters.names import is_adapter_name
from qwenvit.weights.formats import no_checkpoint_error
from qwenvit.weights.header import TensorEntry, build_header, read_header
from qwenvit.weights.hub.errors import explain_hub_errors
from qwenvit.weights.hub.ranges import Chunk, download, hash_range, journal_path
from qwenvit.weights.hub.repository import Repository
from qwenvit.weights.index import parse_index
from qwenvit.weights.local import CHECKPOINT_FILES, find_vision_tensors
from qwenvit.weights.recognise import find_tower, refuse_incomplete
from qwenvit.weights.strict_json import parse_object

TOWER_FILE = "model.safetensors"
MAX_BYTES = 64 << 30
"""The largest tower or adapter that is downloaded; the largest published tower takes 3 GB in fp32."""


def download_tower(repository: Repository, directory: Path, prefix: str | None) -> None:
    """Download the tower to `directory`; the caller has it locked.

    Raises the errors of `fetch_tower`.
    """
    candidates = [repository.where / name for name in CHECKPOINT_FILES if name in repository.files]
    if not candidates and ADAPTER_CONFIG in repository.files:
        raise ValueError(
            f"{repository.where}: an adapter without the weights that it changes: load the model that "
            f"`base_model_name_or_path` in its {ADAPTER_CONFIG} names, and pass this one as adapter="
        )
    if not candidates:
        raise no_checkpoint_error(repository.where, sorted(repository.files), CHECKPOINT_FILES)
    entries = find_vision_tensors(
        candidates,
        lambda file: parse_index(parse_object(repository.read(file.name), file), file),
        lambda file: repository.header(file.name),
        prefix,
    )
    tower = find_tower(entries, prefix)
    refuse_incomplete(tower)
    # Full names stay where several towers are told apart by them, or an unmerged adapter's settings name modules so.
    if prefix is None and not any(map(is_adapter_name, entries)):
        entries = {name.removeprefix(tower.prefix): entry for name, entry in entries.items()}
    _refuse_giant(repository.where, entries.values())
    metadata = {
        "format": "pt",
        "source": f"{repository.repo_id}@{repository.commit}",
        "source_prefix": tower.prefix,
    }
    head, starts = build_header(entries, metadata)
    tensors = [(entry, starts[name]) for name, entry in entries.items()]
    incomplete = directory / f"{TOWER_FILE}.incomplete"
    with explain_hub_errors(repository.repo_id, repository.commit, resumable=True):
        download(
            repository.reader, _plan(repository, tensors), head, incomplete, f"{repository.repo_id} (vision tower)"
        )
    read_header(incomplete)
    for name in repository.heads:
        _check_whole_shard(repository, name, tensors, incomplete)
    _finish(incomplete, directory / TOWER_FILE)


def download_adapter(repository: Repository, directory: Path) -> None:
    """Download the adapter's weights, whole, to `directory`, unless they are there; the caller has it locked.

    Raises FileNotFoundError if the repository has none, ValueError if it has weights that were trained in full beside
    it, and the errors of `fetch_tower`.
    """
    absent = [name for name in (ADAPTER_CONFIG, ADAPTER_FILE) if name not in repository.files]
    if absent:
        raise no_checkpoint_error(repository.where, sorted(repository.files), absent)
    refuse_other_weights(repository.where, repository.files)
    entries = repository.header(ADAPTER_FILE)
    _refuse_giant(repository.where / ADAPTER_FILE, entries.values())
    size = max((entry.end for entry in entries.values()), default=len(repository.heads[ADAPTER_FILE]))
    incomplete = directory / f"{ADAPTER_FILE}.incomplete"
    whole = Chunk(repository.url(ADAPTER_FILE), 0, 0, size)
    with explain_hub_errors(repository.repo_id, repository.commit, resumable=True):
        download(repository.reader, [whole], b"", incomplete, f"{repository.repo_id} (adapter)")
    with incomplete.open("rb") as stream:
        digest = hashlib.sha256()
        hash_range(stream, 0, size, digest)
    _check_hash(repository, ADAPTER_FILE, digest.hexdigest(), incomplete)
    read_header(incomplete)
    _finish(incomplete, directory / ADAPTER_FILE)


def _refuse_giant(where: Path, entries: Iterable[TensorEntry]) -> None:
    nbytes = sum(entry.nbytes for entry in entries)
    if nbytes > MAX_BYTES:
        raise ValueError(f"{where}: expected at most {MAX_BYTES:,} bytes to download, got {nbytes:,} by its headers")


def _plan(repository: Repository, tensors: Iterable[tuple[TensorEntry, int]]) -> list[Chunk]:
    """Return the ranges to download for tensors (their place, target byte); neighbours share one."""
    runs: list[Chunk] = []
    for entry, target in sorted(tensors, key=lambda tensor: tensor[1]):
        url, last = repository.url(entry.file.name), runs[-1] if runs else None
        if last and last.url == url and last.source + last.length == entry.start:
            runs[-1] = Chunk(url, last.source, last.target, last.length + entry.nbytes)
        else:
            runs.append(Chunk(url, entry.start, target, entry.nbytes))
    return runs


def _check_whole_shard(
    repository: Repository, name: str, tensors: Iterable[tuple[TensorEntry, int]], incomplete: Path
) -> None:
    """Compare a shard's hash with the Hub's, if all of the shard was downloaded."""
    head = repository.heads[name]
    digest = hashlib.sha256(head)
    size = repository.reader.versions[repository.url(name)].size
    parts = sorted((entry.start, entry.nbytes, target) for entry, target in tensors if entry.file.name == name)
    if repository.sha256(name) is None or size is None or len(head) + sum(nbytes for _, nbytes, _ in parts) != size:
        return
    with incomplete.open("rb") as stream:
        for _, nbytes, target in parts:
            hash_range(stream, target, nbytes, digest)
    _check_hash(repository, name, digest.hexdigest(), incomplete)


def _check_hash(repository: Repository, name: str, actual: str, incomplete: Path) -> None:
    try:
        repository.check_sha256(name, actual)
    except ValueError:
        # Whatever is wrong in it, the next call must not resume it.
        journal_path(incomplete).unlink()
        incomplete.unlink()
        raise


def _finish(incomplete: Path, file: Path) -> None:
    # A file under its final name means that its download is complete.
    os.replace(incomplete, file)
    journal_path(incomplete).unlink()
