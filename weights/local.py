"""The vision tower's tensors in a local directory or file: find, check, load and save them."""

import json
import os
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from qwenvit.weights.header import FLOAT_DTYPES, TensorEntry, read_header
from qwenvit.weights.names import find_prefix, likely_families, official_name, vision_names

# In order of preference: a separate vision file is there to be used, and Hugging Face's loader also prefers a single
# file to an index.
CHECKPOINT_FILES = ("model_visual.safetensors", "model.safetensors", "model.safetensors.index.json")
PICKLES = (".bin", ".pt", ".pth", ".ckpt")
_MAX_LISTED = 12


class CheckpointError(ValueError):
    """A checkpoint's vision tensors differ from those of the tower.

    Attributes: `missing` and `unexpected` (names), `mismatched` (name, expected shape, actual shape) and
    `unreadable` (name, dtype outside `FLOAT_DTYPES`). Names are official and include the prefix.
    """

    def __init__(
        self,
        missing: list[str],
        unexpected: list[str],
        mismatched: list[tuple[str, tuple[int, ...], tuple[int, ...]]],
        unreadable: list[tuple[str, str]],
        hint: str = "",
    ) -> None:
        self.missing, self.unexpected = missing, unexpected
        self.mismatched, self.unreadable = mismatched, unreadable
        parts = ["the checkpoint does not contain this vision tower" + hint]
        shapes = [f"{name}: expected {expected}, got {actual}" for name, expected, actual in mismatched]
        dtypes = [f"{name}: {dtype}" for name, dtype in unreadable]
        for title, lines in (
            ("missing", missing),
            ("unexpected", unexpected),
            ("with a wrong shape", shapes),
            (f"with a dtype other than {', '.join(FLOAT_DTYPES)}", dtypes),
        ):
            if lines:
                parts.append(f"{len(lines)} {title}:")
                parts += [f"  {line}" for line in lines[:_MAX_LISTED]]
                parts += [f"  … and {len(lines) - _MAX_LISTED} more"] if len(lines) > _MAX_LISTED else []
        if unreadable:
            parts.append("Quantised towers are not supported: use the unquantised checkpoint of the same model.")
        super().__init__("\n".join(parts))


def find_tensors(directory: str | os.PathLike[str]) -> dict[str, TensorEntry]:
    """Return the vision tensors of a checkpoint by their full official names; only headers are read.

    `directory` is a folder or one .safetensors file. In a folder, the first of `CHECKPOINT_FILES` with vision tensors
    is used. Shards without vision tensors may be absent.

    Raises FileNotFoundError if there is no checkpoint or a needed shard is absent, and ValueError for pickles, a
    file that is truncated or not a safetensors file, or a checkpoint without vision tensors.
    """
    path = Path(directory)
    if path.is_file():
        if path.suffix in PICKLES:
            raise pickle_error(path, [path.name])
        return find_vision_tensors([path], read_index, read_header)
    candidates = [path / name for name in CHECKPOINT_FILES if (path / name).is_file()]
    if not candidates:
        raise no_checkpoint_error(path, sorted(file.name for file in path.iterdir()))
    return find_vision_tensors(candidates, read_index, read_header)


def find_vision_tensors(
    candidates: Sequence[Path],
    index_of: Callable[[Path], dict[str, str]],
    header_of: Callable[[Path], dict[str, TensorEntry]],
) -> dict[str, TensorEntry]:
    """Return the vision tensors of the first of `candidates` (.safetensors files or .json indices) that has any.

    `index_of` and `header_of` read one such file, local or remote. Raises FileNotFoundError for an absent shard and
    ValueError for a checkpoint without vision tensors, besides the errors of `index_of` and `header_of`.
    """
    errors = []
    for candidate in candidates:
        shards = index_of(candidate) if candidate.suffix == ".json" else {}
        entries = {} if shards else header_of(candidate)
        try:
            prefix = find_prefix(shards or entries)
        except ValueError as error:
            errors.append(f"{candidate}: {error}")
            continue
        names = vision_names(shards or entries, prefix)
        if shards:
            entries = _read_shards(candidate, {name: shards[name] for name in names}, header_of)
        return {name: entries[name] for name in names}
    raise ValueError("; ".join(errors))


def read_index(file: Path) -> dict[str, str]:
    """Return the shard's file name of each tensor from a `model.safetensors.index.json`; ValueError if broken."""
    try:
        shards = dict(json.loads(file.read_bytes())["weight_map"])
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{file}: expected JSON with a weight_map, got {error!r}") from error
    invalid = [shard for shard in shards.values() if not isinstance(shard, str) or Path(shard).name != shard]
    if invalid or not shards:
        raise ValueError(f"{file}: weight_map: expected names of files beside it, got {invalid[:3] or 'none'}")
    return shards


def _read_shards(
    index: Path, shards: Mapping[str, str], header_of: Callable[[Path], dict[str, TensorEntry]]
) -> dict[str, TensorEntry]:
    headers, absent = {}, []
    for shard in sorted(set(shards.values())):
        try:
            headers[shard] = header_of(index.with_name(shard))
        except FileNotFoundError:
            absent.append(shard)
    if absent:
        raise FileNotFoundError(
            f"{index}: expected all shards with vision tensors, but these are absent: {', '.join(absent)}"
        )
    misplaced = [f"{name} in {shard}" for name, shard in shards.items() if name not in headers[shard]]
    if misplaced:
        raise ValueError(f"{index}: lists tensors that are not in their shards: {', '.join(misplaced[:_MAX_LISTED])}")
    return {name: headers[shard][name] for name, shard in shards.items()}


def no_checkpoint_error(where: Path, files: Sequence[str]) -> OSError | ValueError:
    """Return the error for a folder or repository whose `files` do not include a readable checkpoint."""
    pickles = [name for name in files if name.endswith(PICKLES)]
    if pickles and not any(name.endswith(".safetensors") for name in files):
        return pickle_error(where, pickles)
    return FileNotFoundError(
        f"{where}: expected one of {', '.join(CHECKPOINT_FILES)}, got {', '.join(files[:_MAX_LISTED]) or 'no files'} "
        "(pass a .safetensors file of another name by its path)"
    )


def pickle_error(where: Path, pickles: Sequence[str]) -> ValueError:
    """Return the error for a checkpoint that consists of `pickles`."""
    return ValueError(
        f"{where}: only safetensors files are read, since loading a pickle ({', '.join(pickles[:3])}) runs the code "
        "in it; if you trust it, convert it with safetensors.torch.save_file(torch.load(file, weights_only=True), "
        "'model.safetensors')"
    )


def checkpoint_dtype(entries: Mapping[str, TensorEntry]) -> torch.dtype:
    """Return the floating dtype of most bytes of `entries`; ValueError if none is of `FLOAT_DTYPES`."""
    nbytes: Counter[str] = Counter()
    for entry in entries.values():
        nbytes[entry.dtype] += entry.nbytes
    floating = [dtype for dtype, _ in nbytes.most_common() if dtype in FLOAT_DTYPES]
    if not floating:
        raise ValueError(f"entries: expected tensors of {', '.join(FLOAT_DTYPES)}, got {', '.join(nbytes) or 'none'}")
    return FLOAT_DTYPES[floating[0]]


def load_tensors(
    entries: Mapping[str, TensorEntry],
    expected: Mapping[str, torch.Size],
    *,
    family: str,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
) -> dict[str, torch.Tensor]:
    """Return the tower's tensors by canonical name, on `device`; no two share memory.

    `entries` are the checkpoint's vision tensors (`find_tensors`), `expected` the canonical names and shapes of the
    tower, `dtype` the dtype to convert to (None: each tensor keeps its dtype in the file). Peak memory is the result
    and one tensor more.

    Raises CheckpointError, before any tensor is read, if names or shapes differ or a dtype is not in `FLOAT_DTYPES`.
    """
    prefix = find_prefix(entries)
    official = {prefix + official_name(name, family): name for name in expected}
    _check_entries(entries, {name: tuple(expected[own]) for name, own in official.items()}, family, prefix)
    tensors: dict[str, torch.Tensor] = {}
    with ExitStack() as opened:
        files = {
            file: opened.enter_context(safe_open(file, framework="pt", device="cpu"))
            for file in sorted({entry.file for entry in entries.values()})
        }
        for name, entry in sorted(entries.items(), key=lambda item: (item[1].file, item[1].start)):
            mapped = files[entry.file].get_tensor(name)
            # Copy even without a conversion: a view of the mapped file would change or crash with the file.
            tensors[official[name]] = mapped.to(device=device, dtype=dtype or mapped.dtype, copy=True)
    return {name: tensors[name] for name in expected}


def _check_entries(
    entries: Mapping[str, TensorEntry], shapes: Mapping[str, tuple[int, ...]], family: str, prefix: str
) -> None:
    missing = [name for name in shapes if name not in entries]
    unexpected = [name for name in entries if name not in shapes]
    mismatched = [
        (name, shape, entries[name].shape)
        for name, shape in shapes.items()
        if name in entries and entries[name].shape != shape
    ]
    unreadable = [(name, entry.dtype) for name, entry in entries.items() if entry.dtype not in FLOAT_DTYPES]
    if missing or unexpected or mismatched or unreadable:
        families = likely_families(name.removeprefix(prefix) for name in entries)
        other = f" ({family}): these look like tensors of {' or '.join(families)}"
        hint = other if families and family not in families else f" ({family})"
        raise CheckpointError(missing, unexpected, mismatched, unreadable, hint)


def save_tensors(
    path: str | os.PathLike[str],
    canonical_tensors: Mapping[str, torch.Tensor],
    family: str,
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write a tower alone to the .safetensors file `path`, under official names without prefix.

    The write is atomic. `metadata` goes into the file's header.
    Raises ValueError for a name that the family's tower does not have.
    """
    tensors = {}
    for name, tensor in canonical_tensors.items():
        tensor = tensor.detach().to("cpu").contiguous()
        # safetensors refuses tensors that share memory, as slices of a fused weight do.
        owns_storage = tensor.untyped_storage().nbytes() == tensor.nbytes
        tensors[official_name(name, family)] = tensor if owns_storage else tensor.clone()
    write_safetensors(path, tensors, {**(metadata or {}), "format": "pt"})


def write_safetensors(
    path: str | os.PathLike[str], tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str]
) -> None:
    """Write contiguous CPU tensors atomically to `path`, with the permissions that the umask gives."""
    target = Path(path)
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    try:
        temporary.touch()
        mode = temporary.stat().st_mode  # by the umask; safetensors makes files readable by their owner alone
        save_file(dict(tensors), temporary, metadata=dict(metadata))
        temporary.chmod(mode)
        with temporary.open("rb+") as stream:
            os.fsync(stream.fileno())
        os.replace(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)
