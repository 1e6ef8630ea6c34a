"""The vision tower's tensors in a directory or file: where they lie, whether all are there, into memory."""

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

# In this order: a tower put beside the model is meant to be taken, and one file to an index is what Hugging
# Face's loader prefers too.
CANDIDATES = ("model_visual.safetensors", "model.safetensors", "model.safetensors.index.json")
PICKLES = (".bin", ".pt", ".pth", ".ckpt")
_LINES = 12


class CheckpointError(ValueError):
    """A checkpoint's vision tensors are not the ones that the tower needs. All names are official and full.

    Attributes: `missing` and `unexpected` (names), `mismatched` (name, expected shape, actual shape) and
    `unreadable` (name, dtype that is not a floating one).
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
        parts = ["the checkpoint does not hold this vision tower" + hint]
        shapes = [f"{name}: expected {want}, got {got}" for name, want, got in mismatched]
        dtypes = [f"{name}: {dtype}" for name, dtype in unreadable]
        for title, lines in (
            ("missing", missing),
            ("unexpected", unexpected),
            ("of a wrong shape", shapes),
            (f"of a dtype other than {', '.join(FLOAT_DTYPES)}", dtypes),
        ):
            if lines:
                parts.append(f"{len(lines)} {title}:")
                parts += [f"  {line}" for line in lines[:_LINES]]
                parts += [f"  … and {len(lines) - _LINES} more"] if len(lines) > _LINES else []
        if unreadable:
            parts.append("Quantised towers are not supported: take the unquantised checkpoint of the same model.")
        super().__init__("\n".join(parts))


def find_tensors(directory: str | os.PathLike[str]) -> dict[str, TensorEntry]:
    """Return the vision tensors under `directory`, by their names there; only headers are read.

    `directory` is a folder or one .safetensors file. In a folder, the first of `CANDIDATES` that has vision
    tensors counts. Of a sharded checkpoint only the shards with vision tensors need be there.

    Raises FileNotFoundError if nothing of this is there or a needed shard is missing, and ValueError for
    pickles, a truncated or foreign file, or a checkpoint without vision tensors.
    """
    path = Path(directory)
    if path.is_file():
        if path.suffix in PICKLES:
            raise pickle_error(path, [path.name])
        return vision_tensors([path], read_index, read_header)
    candidates = [path / name for name in CANDIDATES if (path / name).is_file()]
    if not candidates:
        raise nothing_error(path, sorted(file.name for file in path.iterdir()))
    return vision_tensors(candidates, read_index, read_header)


def vision_tensors(
    candidates: Sequence[Path],
    index_of: Callable[[Path], dict[str, str]],
    header_of: Callable[[Path], dict[str, TensorEntry]],
) -> dict[str, TensorEntry]:
    """Return the vision tensors of the first of `candidates` (files, or a .json index) that has any.

    `index_of` and `header_of` read one such file, wherever it is. Raises what `find_tensors` raises.
    """
    refusals = []
    for candidate in candidates:
        shards = index_of(candidate) if candidate.suffix == ".json" else {}
        entries = {} if shards else header_of(candidate)
        try:
            prefix = find_prefix(shards or entries)
        except ValueError as error:
            refusals.append(f"{candidate}: {error}")
            continue
        names = vision_names(shards or entries, prefix)
        if shards:
            entries = _from_shards(candidate, {name: shards[name] for name in names}, header_of)
        return {name: entries[name] for name in names}
    raise ValueError("; ".join(refusals))


def read_index(file: Path) -> dict[str, str]:
    """Return which shard holds each tensor, from a `model.safetensors.index.json`; ValueError if broken."""
    try:
        shards = dict(json.loads(file.read_bytes())["weight_map"])
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{file}: expected JSON with a weight_map, got {error!r}") from error
    strange = [shard for shard in shards.values() if not isinstance(shard, str) or Path(shard).name != shard]
    if strange or not shards:
        raise ValueError(f"{file}: weight_map: expected names of files beside it, got {strange[:3] or 'none'}")
    return shards


def _from_shards(
    index: Path, shards: Mapping[str, str], header_of: Callable[[Path], dict[str, TensorEntry]]
) -> dict[str, TensorEntry]:
    headers, absent = {}, []
    for shard in sorted(set(shards.values())):
        try:
            headers[shard] = header_of(index.with_name(shard))
        except FileNotFoundError:
            absent.append(shard)
    if absent:
        raise FileNotFoundError(f"{index}: shards with vision tensors that are not there: {', '.join(absent)}")
    misplaced = [f"{name} in {shard}" for name, shard in shards.items() if name not in headers[shard]]
    if misplaced:
        raise ValueError(f"{index}: promises tensors that are not there: {', '.join(misplaced[:_LINES])}")
    return {name: headers[shard][name] for name, shard in shards.items()}


def nothing_error(where: Path, files: Sequence[str]) -> OSError | ValueError:
    """Return the error for a place with the `files` named, none of which is a checkpoint that can be read."""
    pickles = [name for name in files if name.endswith(PICKLES)]
    if pickles and not any(name.endswith(".safetensors") for name in files):
        return pickle_error(where, pickles)
    return FileNotFoundError(
        f"{where}: looked for {', '.join(CANDIDATES)}, found none of them; "
        f"there are: {', '.join(files[:_LINES]) or 'no files'} "
        "(a single .safetensors file can be given by its path)"
    )


def pickle_error(where: Path, pickles: Sequence[str]) -> ValueError:
    """Return the error for a checkpoint that consists of `pickles`."""
    return ValueError(
        f"{where}: only safetensors files are read, since a pickle ({', '.join(pickles[:3])}) runs whatever "
        "code is in it; convert it where you trust it, with safetensors.torch.save_file(torch.load(file, "
        "weights_only=True), 'model.safetensors')"
    )


def checkpoint_dtype(entries: Mapping[str, TensorEntry]) -> torch.dtype:
    """Return the floating dtype in which most bytes of `entries` are stored; ValueError if there is none."""
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
    """Return the tower's tensors by canonical name, each in memory of its own, on `device`.

    `entries` are the checkpoint's vision tensors (`find_tensors`), `expected` the canonical names and shapes
    that the tower has, `dtype` what to convert to (None: each tensor keeps the file's). Beyond the result,
    memory holds at most one tensor at a time.

    Raises CheckpointError if names, shapes or dtypes differ in any way, before anything is read.
    """
    prefix = find_prefix(entries)
    official = {prefix + official_name(name, family): name for name in expected}
    _check(entries, {name: tuple(expected[ours]) for name, ours in official.items()}, family, prefix)
    tensors: dict[str, torch.Tensor] = {}
    with ExitStack() as opened:
        files = {
            file: opened.enter_context(safe_open(file, framework="pt", device="cpu"))
            for file in sorted({entry.file for entry in entries.values()})
        }
        for name, entry in sorted(entries.items(), key=lambda item: (item[1].file, item[1].start)):
            mapped = files[entry.file].get_tensor(name)
            # A copy even where nothing is converted: a view of the mapped file would change or crash with it.
            tensors[official[name]] = mapped.to(device=device, dtype=dtype or mapped.dtype, copy=True)
    return {name: tensors[name] for name in expected}


def _check(entries: Mapping[str, TensorEntry], shapes: Mapping[str, tuple[int, ...]], family: str, prefix: str) -> None:
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

    The file appears whole or not at all. `metadata` (strings) goes into its header.
    Raises ValueError for a name that the family's tower does not have.
    """
    tensors = {}
    for name, tensor in canonical_tensors.items():
        ours = tensor.detach().to("cpu").contiguous()
        # safetensors refuses tensors that share memory, as slices of a fused weight do.
        whole = ours.untyped_storage().nbytes() == ours.nbytes
        tensors[official_name(name, family)] = ours if whole else ours.clone()
    write_safetensors(path, tensors, {**(metadata or {}), "format": "pt"})


def write_safetensors(
    path: str | os.PathLike[str], tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str]
) -> None:
    """Write contiguous CPU tensors to `path`, whole or not at all, readable as any new file of this user's is."""
    target = Path(path)
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    try:
        temporary.touch()
        mode = temporary.stat().st_mode  # what the umask says; safetensors itself lets nobody else read its files
        save_file(dict(tensors), temporary, metadata=dict(metadata))
        temporary.chmod(mode)
        with temporary.open("rb+") as stream:
            os.fsync(stream.fileno())
        os.replace(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)
