"""LoRA adapters as peft saves them: find the weights that change the vision tower, check them, merge them.

An adapter is a folder with `adapter_config.json` and `adapter_model.safetensors`, beside its base or apart, or part of
a checkpoint that was saved without merging it (`…base_layer.weight`, `…lora_A.default.weight`).
"""

import os
import warnings
from collections import defaultdict
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open

from qwenvit.weights.adapters.config import ADAPTER_CONFIG, AdapterConfig
from qwenvit.weights.adapters.merge import EMBEDDING, LINEAR, LORA_BIAS, PARTS, delta_of, shape_problems
from qwenvit.weights.adapters.names import (
    AdapterTensor,
    is_adapter_name,
    looks_like_tower,
    parse_adapter_name,
    plain_name,
)
from qwenvit.weights.formats import PICKLES, pickle_error, refuse_other_format
from qwenvit.weights.header import FLOAT_DTYPES, TensorEntry, read_header
from qwenvit.weights.names import canonical_name, official_name

ADAPTER_FILE = "adapter_model.safetensors"
PICKLE_FILE = "adapter_model.bin"
# Trainers other than peft's write the weights that they trained in full, such as the tower's, into these.
OTHER_WEIGHTS = ("non_lora_state_dict.bin", "non_lora_trainables.bin", "vit.safetensors")
_PEFT_PREFIX = "base_model.model."
_MAX_LISTED = 12
_MAX_MODULES = 2000  # of a tower; the largest published one has a few hundred


@dataclass(frozen=True)
class Adapter:
    """What an adapter changes in a vision tower; only its config and the header of its tensors have been read."""

    source: Path
    """The file of its tensors, or the folder of the checkpoint that has it unmerged."""
    config: AdapterConfig
    prefix: str
    """What the names of the tower's modules start with in the adapter."""
    changes: Mapping[str, Mapping[str, tuple[str, TensorEntry]]]
    """Name and entry in the file by the tower's module (official name) and part, see `AdapterTensor`."""
    other_tensors: int
    """How many tensors are for other parts of the model."""

    @property
    def tower_tensors(self) -> tuple[str, ...]:
        """The tower's tensors that it changes, by official name without prefix; none if it leaves the tower alone."""
        tensors = [
            f"{module}.{parameter}"
            for module, parts in self.changes.items()
            for parameter, sources in (("weight", {*LINEAR, *EMBEDDING, "weight"}), ("bias", {LORA_BIAS, "bias"}))
            if not sources.isdisjoint(parts)
        ]
        return tuple(tensors)

    def warn_if_irrelevant(self, stacklevel: int = 1) -> None:
        """Say by `warnings.warn` that the adapter leaves the vision tower alone, if it does.

        `stacklevel` is as if the caller of this method called `warnings.warn`.
        """
        if not self.changes:
            message = (
                f"{self.source}: this adapter changes other parts of the model ({self.other_tensors} tensors) and "
                "nothing in the vision tower, whose embeddings stay those of the base"
            )
            warnings.warn(message, stacklevel=stacklevel + 1)

    def path(self, module: str) -> str:
        """Return the path that peft knows one of the tower's modules by, without its own `base_model.model.`."""
        return self.prefix.removeprefix(_PEFT_PREFIX) + module

    def check(self, expected: Mapping[str, torch.Size], family: str) -> None:
        """Check the adapter against a tower, before any tensor is read.

        `expected` are the tower's shapes by canonical name, as `load_tensors` takes them.
        Raises ValueError, which lists what does not fit: modules that the tower lacks, ranks and shapes, A without B.
        """
        shapes = {official_name(name, family): tuple(shape) for name, shape in expected.items()}
        problems = []
        for module, parts in self.changes.items():
            if f"{module}.weight" in shapes:
                found = {part: entry.shape for part, (_, entry) in parts.items()}
                rank = self.config.rank(self.path(module))
                problems += [
                    f"{self.prefix}{module}: {problem}"
                    for problem in shape_problems(
                        found, shapes[f"{module}.weight"], shapes.get(f"{module}.bias"), rank, self.config.has_lora_bias
                    )
                ]
            else:
                problems.append(
                    f"{self.prefix}{module}: the {family} tower of {len(shapes)} tensors has no such module"
                )
        problems += self._missing_modules(shapes)
        if problems:
            more = [f"… and {len(problems) - _MAX_LISTED} more"] if len(problems) > _MAX_LISTED else []
            listed = "\n".join(f"  {line}" for line in problems[:_MAX_LISTED] + more)
            raise ValueError(f"{self.source}: the adapter does not fit this vision tower:\n{listed}")

    def _missing_modules(self, names: Mapping[str, object]) -> list[str]:
        """Return a line for each of the tower's tensors that `modules_to_save` promises and the file lacks."""
        if not self.changes:
            return []
        missing = []
        for name in names:
            module, _, part = name.rpartition(".")
            steps = self.path(module).split(".")
            above = [".".join(steps[: count + 1]) for count in range(len(steps))]
            saved = [key for key in self.config.modules("modules_to_save") if any(a.endswith(key) for a in above)]
            if saved and part not in self.changes.get(module, {}):
                missing.append(f"{self.prefix}{name}: missing, though modules_to_save lists {saved[0][:200]!r}")
        return missing

    def merge(self, tensors: Mapping[str, torch.Tensor], family: str) -> None:
        """Merge the adapter, in place, into the tower's `tensors` by canonical name, as `load_tensors` returns them.

        The tensors have the dtype that the tower will have. In it, the results are those of peft's `merge_and_unload`,
        bit by bit on a CPU; for a tower on a GPU, the product of A and B is still computed on the CPU.
        Call `check` first. Raises ValueError if the file has changed since, or a result is not finite.
        """
        with ExitStack() as opened:
            entries = [entry for parts in self.changes.values() for _, entry in parts.values()]
            files = {
                file: opened.enter_context(safe_open(file, framework="pt", device="cpu"))
                for file in sorted({entry.file for entry in entries})
            }

            def read(name: str, entry: TensorEntry) -> torch.Tensor:
                tensor: torch.Tensor = files[entry.file].get_tensor(name)
                if tuple(tensor.shape) != entry.shape:
                    raise ValueError(f"{entry.file}: {name} changed while it was read")
                return tensor

            # An autocast around the call would round the products.
            opened.enter_context(torch.autocast("cpu", enabled=False))
            opened.enter_context(torch.no_grad())
            for module, parts in self.changes.items():
                stored = {part: read(*place) for part, place in parts.items()}
                scale = self.config.scale(self.path(module))
                for parameter in ("weight", "bias"):
                    if (name := canonical_name(f"{module}.{parameter}", family)) not in tensors:
                        continue
                    target = tensors[name]
                    if parameter in stored:
                        target.copy_(stored[parameter])
                    if (delta := delta_of(parameter, stored, scale, target.dtype)) is not None:
                        target += delta.to(target.device)
                    if not target.isfinite().all():
                        raise ValueError(
                            f"{self.source}: {self.prefix}{module}.{parameter} is not finite in {target.dtype} once "
                            "the adapter is merged"
                        )


def adapter_beside(directory: Path) -> Path | None:
    """Return the folder of the adapter beside the checkpoint in `directory`: itself, if it has a file of one."""
    files = (ADAPTER_CONFIG, ADAPTER_FILE, PICKLE_FILE)
    return directory if any(os.path.lexists(directory / name) for name in files) else None


def read_adapter(path: Path) -> Adapter:
    """Read an adapter's config and header: `path` is its folder, or its .safetensors file with the config beside it.

    Raises FileNotFoundError if a file is absent, and ValueError for a pickle, a broken file, and all that would change
    the tower in another way than LoRA's (DoRA, LoHa, …), by its name.
    """
    directory, file = (path, path / ADAPTER_FILE) if path.is_dir() else (path.parent, path)
    if not (directory / ADAPTER_CONFIG).exists():
        raise FileNotFoundError(
            f"adapter: {path}: expected {ADAPTER_CONFIG} and {ADAPTER_FILE}, got no {ADAPTER_CONFIG}, which has the "
            "rank and alpha; adapter=False loads a base beside it as it is"
        )
    refuse_other_weights(directory, [name for name in OTHER_WEIGHTS if (directory / name).exists()])
    if not file.exists():
        if (directory / PICKLE_FILE).exists():
            raise pickle_error(directory, [PICKLE_FILE], ADAPTER_FILE)
        raise FileNotFoundError(
            f"adapter: {directory}: expected {file.name} beside {ADAPTER_CONFIG}, got none; adapter=False loads a base "
            "beside it as it is"
        )
    refuse_other_format(file)
    return _build(file, AdapterConfig.read(directory / ADAPTER_CONFIG), read_header(file))


def refuse_other_weights(where: Path, files: Iterable[str]) -> None:
    """Raise ValueError if one of the `files` beside an adapter has weights that were trained in full."""
    if others := sorted(set(OTHER_WEIGHTS).intersection(files)):
        raise ValueError(
            f"{where}: {others[0]} beside the adapter has weights that were trained in full, perhaps the tower's: "
            "merge them into the base with the trainer that wrote them, and load the result"
        )


def split_unmerged(names: Iterable[str]) -> tuple[dict[str, str], list[str]]:
    """Split the names of a checkpoint that was saved with an unmerged adapter.

    Return the base's names in the file by plain name (`….base_layer.weight` by `….weight`; a checkpoint without
    adapters has them all here, unchanged), and the adapter's names in the file (`….lora_A.default.weight`).
    """
    names = list(names)
    base = {plain_name(name): name for name in names if not is_adapter_name(name)}
    return base, [name for name in names if is_adapter_name(name)]


def adapter_in_checkpoint(directory: Path, entries: Mapping[str, TensorEntry]) -> Adapter:
    """Return the adapter that a checkpoint in `directory` has unmerged, from its `entries`, see `split_unmerged`.

    Raises ValueError if no adapter_config.json is beside the checkpoint, since alpha is then unknown, or an
    `adapter_model.safetensors` is, since it could be another adapter; and as `read_adapter` does.
    """
    own = {name: entry for name, entry in entries.items() if is_adapter_name(name)}
    what = f"an adapter that is not merged ({next(iter(own))}, …)"
    if not (directory / ADAPTER_CONFIG).exists():
        raise ValueError(
            f"{directory}: the checkpoint has {what}, and no {ADAPTER_CONFIG} beside it, so that alpha is unknown: "
            "merge it with peft's merge_and_unload and save it again"
        )
    if (directory / ADAPTER_FILE).exists():
        raise ValueError(
            f"{directory}: expected one adapter, got {what} in the checkpoint, and another in {ADAPTER_FILE}: remove "
            "one of them"
        )
    refuse_other_weights(directory, [name for name in OTHER_WEIGHTS if (directory / name).exists()])
    return _build(directory, AdapterConfig.read(directory / ADAPTER_CONFIG), own)


def is_adapter_alone(directory: Path) -> bool:
    """Return whether a folder has an adapter and no other weights."""
    weights = {file.name for file in directory.iterdir() if file.suffix in (".safetensors", ".gguf", *PICKLES)}
    index = directory / "model.safetensors.index.json"
    return (directory / ADAPTER_CONFIG).is_file() and weights <= {ADAPTER_FILE, PICKLE_FILE} and not index.exists()


def adapter_alone_error(directory: Path) -> ValueError:
    """Return the error for a folder that has an adapter and no base, given as a model: it says how to load them."""
    base = AdapterConfig.read(directory / ADAPTER_CONFIG).base_model
    trained = f"trained on {base[:200]!r} (its base_model_name_or_path)" if base else "of a base that it does not name"
    call = (
        f"from_pretrained({base[:200]!r}, adapter={str(directory)!r})" if base else "from_pretrained(base, adapter=…)"
    )
    return ValueError(f"{directory}: this is an adapter, {trained}, without the base's weights: call {call}")


def _build(source: Path, config: AdapterConfig, entries: Mapping[str, TensorEntry]) -> Adapter:
    parsed = {name: parse_adapter_name(name) for name in entries}
    ours = [tensor for tensor in parsed.values() if tensor is not None and not tensor.is_original]
    strange = [name for name, tensor in parsed.items() if tensor is None and looks_like_tower(name)]
    prefixes = sorted({tensor.prefix for tensor in ours})
    if ours or strange:
        paths = list(dict.fromkeys(tensor.prefix.removeprefix(_PEFT_PREFIX) + tensor.module for tensor in ours))
        if len(paths) > _MAX_MODULES:
            raise ValueError(f"{source}: expected at most {_MAX_MODULES} modules of a vision tower, got {len(paths)}")
        config.check(paths)
    elif promised := [name for name in config.modules("modules_to_save") if looks_like_tower(name)]:
        raise ValueError(
            f"{source}: expected weights of {promised[0][:200]!r}, which modules_to_save in {config.file.name} lists, "
            "got none"
        )
    if strange:
        raise ValueError(f"{source}: {strange[0]}: expected a module of a vision tower, got none that is known")
    if len(prefixes) > 1:
        raise ValueError(
            f"{source}: expected one vision tower in the adapter, got {' and '.join(map(repr, prefixes[:4]))}"
        )
    if len(adapters := sorted({tensor.adapter for tensor in ours if tensor.adapter})) > 1:
        raise ValueError(f"{source}: expected one adapter, got {' and '.join(adapters[:4])}")
    changes = _group(source, ours, entries)
    return Adapter(source, config, prefixes[0] if prefixes else "", changes, len(entries) - len(ours))


def _group(
    source: Path, tensors: list[AdapterTensor], entries: Mapping[str, TensorEntry]
) -> dict[str, dict[str, tuple[str, TensorEntry]]]:
    """Return the tensors' names and entries by module and part; ValueError for parts that are not LoRA's."""
    changes: dict[str, dict[str, tuple[str, TensorEntry]]] = defaultdict(dict)
    # With bias="all", peft writes the biases of modules_to_save twice, and reads those under their plain names.
    for tensor in sorted(tensors, key=lambda tensor: ".modules_to_save." in tensor.name):
        kind = "DoRA" if "magnitude" in tensor.part else "no part of LoRA"
        if tensor.part not in PARTS:
            raise ValueError(f"{source}: {tensor.name}: expected LoRA's weights, got {tensor.part} ({kind})")
        if (entry := entries[tensor.name]).dtype not in FLOAT_DTYPES:
            raise ValueError(f"{source}: {tensor.name}: expected {', '.join(FLOAT_DTYPES)}, got {entry.dtype}")
        first, _ = changes[tensor.module].setdefault(tensor.part, (tensor.name, entry))
        if first != tensor.name and ".modules_to_save." not in tensor.name:
            raise ValueError(f"{source}: expected one tensor for each weight, got {first} and {tensor.name}")
    return dict(changes)
