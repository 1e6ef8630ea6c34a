"""The vision tower's tensors in a local directory or file: find, check and load them."""

import os
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path

import torch
from safetensors import safe_open

from qwenvit.weights.formats import PICKLES, no_checkpoint_error, pickle_error, quantisation_of, refuse_other_format
from qwenvit.weights.header import FLOAT_DTYPES, TensorEntry, read_header
from qwenvit.weights.index import read_index
from qwenvit.weights.names import official_name
from qwenvit.weights.recognise import FoundTower, NoTowerError, find_tower

# In order of preference: a separate vision file is there to be used, and Hugging Face's loader also prefers a single
# file to an index.
CHECKPOINT_FILES = ("model_visual.safetensors", "model.safetensors", "model.safetensors.index.json")
_PATCH_WEIGHT = "patch_embed.proj.weight"
_OTHER_ADAPTERS = (".ia3_", ".hada_", ".lokr_", ".oft_", ".vera_", ".boft_", ".hra_", ".ln_tuning_")
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
        advice: Sequence[str] = (),
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
        super().__init__("\n".join([*parts, *advice]))


def find_tensors(directory: str | os.PathLike[str], prefix: str | None = None) -> dict[str, TensorEntry]:
    """Return the vision tensors of a checkpoint by their full names there; only headers are read.

    `directory` is a folder, one .safetensors file, or the index of a sharded checkpoint. In a folder, the first of
    `CHECKPOINT_FILES` with a vision tower is used. Shards without vision tensors may be absent. `prefix` chooses
    between several towers, see `find_tower`. An incomplete tower is returned if there is no complete one.

    Raises FileNotFoundError if there is no checkpoint or a needed shard is absent, and ValueError for pickles and
    other formats, a file that is truncated or not a safetensors file, a checkpoint without vision tensors, or one
    with several towers.
    """
    path = Path(directory)
    if not path.is_dir():
        if path.suffix in PICKLES:
            raise pickle_error(path, [path.name])
        return find_vision_tensors([path], read_index, _read_local_header, prefix)
    candidates = [path / name for name in CHECKPOINT_FILES if os.path.lexists(path / name)]
    if not candidates:
        raise no_checkpoint_error(path, sorted(file.name for file in path.iterdir()), CHECKPOINT_FILES)
    return find_vision_tensors(candidates, read_index, _read_local_header, prefix)


def _read_local_header(file: Path) -> dict[str, TensorEntry]:
    refuse_other_format(file)
    return read_header(file)


def find_vision_tensors(
    candidates: Sequence[Path],
    index_of: Callable[[Path], dict[str, str]],
    header_of: Callable[[Path], dict[str, TensorEntry]],
    prefix: str | None = None,
) -> dict[str, TensorEntry]:
    """Return the tower's tensors of the first of `candidates` (.safetensors files or .json indices) that has one.

    A complete tower is preferred to an incomplete one. `index_of` and `header_of` read one such file, local or
    remote. Raises FileNotFoundError for an absent shard and ValueError for a checkpoint without vision tensors or with
    several towers, besides the errors of `index_of` and `header_of`.
    """
    errors, found = [], []
    for candidate in candidates:
        shards = index_of(candidate) if candidate.suffix == ".json" else {}
        entries = {} if shards else header_of(candidate)
        try:
            tower = find_tower(shards or entries, prefix)
        except NoTowerError as error:
            errors.append(f"{candidate}: {error}")
            continue
        except ValueError as error:
            raise ValueError(f"{candidate}: {error}") from error
        found.append((candidate, tower, shards, entries))
        if not tower.missing:
            break
    if not found:
        raise ValueError("; ".join(errors))
    candidate, tower, shards, entries = found[0] if found[-1][1].missing else found[-1]
    if shards:
        entries = _read_shards(candidate, {name: shards[name] for name in tower.names}, header_of)
    return {name: entries[name] for name in tower.names}


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
    tower, `dtype` the dtype to convert to (None: each tensor keeps its dtype in the file). A patch embedding with its
    channels last, as MLX stores it, is turned. Peak memory is the result and one tensor more.

    Raises CheckpointError, before any tensor is read, if names or shapes differ or a dtype is not in `FLOAT_DTYPES`;
    OSError if a file cannot be read.
    """
    check_entries(entries, expected, family)
    canonical = {official_name(name, family): name for name in expected}
    names = find_tower(entries).names
    tensors: dict[str, torch.Tensor] = {}
    with ExitStack() as opened:
        files = {}
        for file in sorted({entry.file for entry in entries.values()}):
            try:
                files[file] = opened.enter_context(safe_open(file, framework="pt", device="cpu"))
            except RuntimeError as error:  # torch's, where the system does not map the file into memory
                raise OSError(f"{file}: {error}") from error
        for name, entry in sorted(entries.items(), key=lambda item: (item[1].file, item[1].start)):
            own = canonical[names[name]]
            mapped = files[entry.file].get_tensor(name)
            if mapped.shape != expected[own]:
                mapped = mapped.movedim(-1, 1).contiguous()
            # Copy even without a conversion: a view of the mapped file would change or crash with the file.
            tensors[own] = mapped.to(device=device, dtype=dtype or mapped.dtype, copy=True)
    return {name: tensors[name] for name in expected}


def check_entries(entries: Mapping[str, TensorEntry], expected: Mapping[str, torch.Size], family: str) -> None:
    """Raise CheckpointError unless `entries` are the tensors of a tower of `family`, with `expected` shapes."""
    tower = find_tower(entries)
    shapes = {official_name(name, family): tuple(shape) for name, shape in expected.items()}
    present = set(tower.names.values())
    missing = [tower.prefix + name for name in shapes if name not in present]
    unexpected = [name for name, official in tower.names.items() if official not in shapes]
    mismatched = [
        (name, shapes[official], entries[name].shape)
        for name, official in tower.names.items()
        if official in shapes and not _fits(official, entries[name].shape, shapes[official])
    ]
    unreadable = [(name, entry.dtype) for name, entry in entries.items() if entry.dtype not in FLOAT_DTYPES]
    if missing or unexpected or mismatched or unreadable:
        hint = f" ({family})"
        if family not in tower.families:
            hint += f": these look like tensors of {' or '.join(tower.families)}"
        advice = _advice(entries, tower, [tower.names[name] for name, *_ in mismatched])
        if (wanted := _blocks(shapes)) != (found := _blocks(present)):
            advice.append(f"The config states {wanted} blocks, and the checkpoint has {found}.")
        raise CheckpointError(missing, unexpected, mismatched, unreadable, hint, advice)


def _blocks(official: Iterable[str]) -> int:
    return len({name.split(".")[1] for name in official if name.startswith("blocks.")})


def _fits(official: str, stored: tuple[int, ...], expected: tuple[int, ...]) -> bool:
    channels_last = (expected[0], *expected[2:], expected[1]) if official == _PATCH_WEIGHT else expected
    return stored in (expected, channels_last)


def _advice(entries: Mapping[str, TensorEntry], tower: FoundTower, mismatched: Sequence[str]) -> list[str]:
    """Return what to do about the differences whose cause is known."""
    advice = []
    if quantisation := quantisation_of({name: entry.dtype for name, entry in entries.items()}):
        advice.append(
            f"The tower's weights are quantised: {quantisation}. Quantised towers are not supported: use the "
            "unquantised checkpoint of the same model."
        )
    if any(part in name for name in entries for part in _OTHER_ADAPTERS):
        advice.append(
            "A PEFT adapter of another kind than LoRA was saved unmerged together with the tower: call "
            "merge_and_unload() of the PEFT model before save_pretrained()."
        )
    if _PATCH_WEIGHT in mismatched:
        advice.append(
            f"{tower.prefix}{_PATCH_WEIGHT} is read as [out, channels, frames, height, width] or, as MLX stores it, "
            "[out, frames, height, width, channels]; the order of other layouts cannot be known from a shape."
        )
    return advice
