"""Recognise a vision tower by structure: by the names of a checkpoint's tensors, whatever the prefix is.

A tower is a complete set of one family's modules under one prefix. Names of other modules (language model, audio
tower, another vision model) make no complete set, so they need no list.
"""

import re
from collections import defaultdict
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from heapq import nlargest, nsmallest

from qwenvit.weights.adapters.names import is_adapter_name, plain_name
from qwenvit.weights.names import ALL_MODULES, NAME_TABLES, TOP_MODULES, split_index, with_index

_MODULES = {family: frozenset(table.values()) for family, table in NAME_TABLES.items()}
# The prefix ends before the last name of a top module: a prefix may contain `blocks.`, a module's own name does not.
_SPLIT = re.compile(rf"(.*\.|)((?:{'|'.join(sorted(TOP_MODULES))})\..+)")
_MAX_LISTED = 12
_MAX_BLOCKS = 1024  # more than any config may state
_ALMOST_COMPLETE = 0.9
"""The share of its modules from which on an incomplete tower may be the one that is meant, and its file damaged."""
_MAX_LOOKED_AT = 64
"""The most prefixes that are looked at, those with the most modules: a broken header may have a million."""


class NoTowerError(ValueError):
    """There is no vision tower among the names, complete or not."""


@dataclass(frozen=True)
class FoundTower:
    """A vision tower among the names of a checkpoint, complete or not."""

    prefix: str
    """What the tower's names start with: `"model.visual."`; empty for a tower saved alone."""
    families: tuple[str, ...]
    """The families whose modules these are, by structure alone. If the tower is incomplete: the likeliest."""
    names: dict[str, str]
    """Every name under the prefix, and its official name without prefix. The latter may be one that no tower has."""
    missing: tuple[str, ...]
    """Modules that a tower of the first of `families` also has, with prefix; empty if the tower is complete."""

    def __str__(self) -> str:
        return f"{self.prefix or 'no prefix'} ({' or '.join(self.families)})"


def find_tower(names: Iterable[str], prefix: str | None = None) -> FoundTower:
    """Return the vision tower among the names of a checkpoint's tensors.

    All other tensors (language model, audio tower, talker, ...) are ignored, and so is a tower that lacks a tenth of
    its modules or more beside a complete one. If no tower is complete, the most complete one is returned: its `missing`
    says what it lacks.

    Names that PEFT gives to the weights below an adapter (`attn.qkv.base_layer.weight`) are understood as the plain
    ones (`attn.qkv.weight`). The adapter's own names are in the result's `names` like others that no tower has.

    Args:
        names: the names of a checkpoint's tensors.
        prefix: the tower's prefix, with or without its last dot. None: the only one with a complete tower.

    Raises:
        NoTowerError: no name is a vision tower's, or none under `prefix`.
        ValueError: several towers are complete, or almost, or equally incomplete; two names are one weight's.
    """
    plain = {name: plain_name(name) for name in names}
    modules: dict[str, set[str]] = defaultdict(set)
    for name, own in plain.items():
        split = None if is_adapter_name(name) else _SPLIT.fullmatch(own)
        if split and (module := _module_of(split[2])):
            modules[split[1]].add(module)
    chosen = prefix if not prefix or prefix.endswith(".") else f"{prefix}."
    looked_at = nlargest(_MAX_LOOKED_AT, modules, key=lambda found: (found == chosen, len(modules[found])))
    towers = {found: (*_best_families(modules[found]), len(modules[found])) for found in looked_at}
    complete = [found for found, (_, missing, _) in towers.items() if not missing]
    if chosen is not None:
        if chosen not in towers:
            known = ", ".join(repr(found) for found in complete or towers) or f"none among {_overview(plain)}"
            raise NoTowerError(f"prefix: expected one with vision tensors ({known}), got {prefix!r}")
    else:
        chosen = _choose(plain.values(), towers, complete)
    # A tower inside the chosen one's prefix, as in a checkpoint with two, is not part of it.
    inner = tuple(found for found in complete if found != chosen and found.startswith(chosen))
    own_names = {
        name: own.removeprefix(chosen)
        for name, own in plain.items()
        if _is_under(own, chosen) and not own.startswith(inner)
    }
    seen: set[str] = set()
    for name, official in own_names.items():
        if official in seen:
            raise ValueError(f"expected one tensor for each weight, got {name} and another for {chosen}{official}")
        seen.add(official)
    families, missing, _ = towers[chosen]
    return FoundTower(chosen, families, own_names, tuple(chosen + module for module in missing))


def refuse_incomplete(tower: FoundTower) -> None:
    """Raise ValueError with the missing modules unless the tower is complete."""
    if tower.missing:
        more = f", … and {len(tower.missing) - _MAX_LISTED} more" if len(tower.missing) > _MAX_LISTED else ""
        raise ValueError(
            f"incomplete vision tower under {tower}: {len(tower.missing)} modules have no tensor: "
            f"{', '.join(tower.missing[:_MAX_LISTED])}{more}"
        )


def _module_of(official: str) -> str | None:
    """Return the module of a tensor's official name, or None if no family has it."""
    module = official.rpartition(".")[0]
    return module if split_index(module)[0] in ALL_MODULES else None


def _best_families(present: set[str]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Return the families from which the modules `present` differ least, and what the first of them also has."""
    counts: dict[str, int] = defaultdict(int)
    indexes: dict[str, set[int]] = defaultdict(set)
    for name in present:
        module, index = split_index(name)
        counts[module] += 1
        if index is not None:
            indexes[module.partition(".")[0]].add(index)
    # Never up to the largest index: a name may claim block 999,999,999.
    wanted = {part: nsmallest(_MAX_BLOCKS, found | {*range(len(found))}) for part, found in indexes.items()}
    missing, differing = {}, {}
    for family, modules in _MODULES.items():
        names = [
            with_index(module, index)
            for module in sorted(modules)
            for index in (wanted.get(module.partition(".")[0], [0]) if ".N." in module else [None])
        ]
        missing[family] = tuple(name for name in names if name not in present)
        foreign = sum(count for module, count in counts.items() if module not in modules)
        differing[family] = len(missing[family]) + foreign
    least = min(differing.values())
    families = tuple(family for family, count in differing.items() if count == least)
    return families, missing[families[0]]


def _choose(
    names: Collection[str], towers: dict[str, tuple[tuple[str, ...], tuple[str, ...], int]], complete: list[str]
) -> str:
    """Return the prefix of the only complete tower, or of the most complete one if there is none."""
    if not towers:
        raise NoTowerError(
            "no vision tensors: expected a tower's names (patch_embed, blocks, merger) under any prefix, such as "
            f"model.visual., or none, got {_overview(names)}"
        )
    share = {found: present / (present + len(missing)) for found, (_, missing, present) in towers.items()}
    best = complete
    if not best:
        most = max(share.values())
        best = [found for found in share if share[found] == most]
    elif len(best) == 1:
        damaged = [found for found in share if found not in complete and share[found] >= _ALMOST_COMPLETE]
        best = complete + [found for found in damaged if _has_no_other_module(names, found)]
    if len(best) == 1:
        return best[0]
    which = ("" if len(complete) > 1 else "almost complete ") if complete else "equally incomplete "
    listed = " and ".join(f"{found or 'no prefix'} ({' or '.join(towers[found][0])})" for found in best[:_MAX_LISTED])
    raise ValueError(f"expected one vision tower, got {len(best)} {which}under {listed}: choose one by prefix=")


def _has_no_other_module(names: Iterable[str], prefix: str) -> bool:
    """Return whether all that is under a prefix is a vision tower's, as it would not be in another vision model."""
    return all(_module_of(name.removeprefix(prefix)) for name in names if _is_under(name, prefix))


def _is_under(name: str, prefix: str) -> bool:
    # Without a prefix, the tower's siblings are the rest of the model.
    return name.startswith(prefix) and (prefix != "" or name.partition(".")[0] in TOP_MODULES)


def _overview(names: Iterable[str]) -> str:
    """Return the first parts of the names, as an error shows them."""
    starts = sorted({".".join(name.split(".", 2)[:2])[:80] for name in names})
    return ", ".join(starts[:_MAX_LISTED]) or "nothing at all"
