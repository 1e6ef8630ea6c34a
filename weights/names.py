"""What each family calls the parts of its vision tower, and how a checkpoint prefixes them.

Our tower has one set of module names for all families (`blocks.N.mlp.fc1`, `merger.fc2`, ...); official
checkpoints have one per family. The tables hold module names, `N` standing for an index;
`.weight` or `.bias` follows.
"""

import re
from collections.abc import Iterable

PREFIXES = ("model.visual.", "visual.", "thinker.visual.", "")


def _same(*modules: str) -> dict[str, str]:
    return {module: module for module in modules}


_BLOCK = _same("patch_embed.proj", "blocks.N.norm1", "blocks.N.norm2", "blocks.N.attn.proj")
_FUSED_QKV = _same("blocks.N.attn.qkv")
_SPLIT_QKV = _same("blocks.N.attn.q", "blocks.N.attn.k", "blocks.N.attn.v")
_GATED_MLP = _same("blocks.N.mlp.gate_proj", "blocks.N.mlp.up_proj", "blocks.N.mlp.down_proj")
_LINEAR_MLP = {"blocks.N.mlp.fc1": "blocks.N.mlp.linear_fc1", "blocks.N.mlp.fc2": "blocks.N.mlp.linear_fc2"}
_SEQUENTIAL_MERGER = {
    "merger.norm": "merger.ln_q",
    "merger.fc1": "merger.mlp.0",
    "merger.fc2": "merger.mlp.2",
}
_LINEAR_MERGER = {
    "merger.norm": "merger.norm",
    "merger.fc1": "merger.linear_fc1",
    "merger.fc2": "merger.linear_fc2",
}
_QWEN3 = {
    **_BLOCK,
    **_same("pos_embed"),
    **_FUSED_QKV,
    **_LINEAR_MLP,
    **_LINEAR_MERGER,
    "deepstack_mergers.N.norm": "deepstack_merger_list.N.norm",
    "deepstack_mergers.N.fc1": "deepstack_merger_list.N.linear_fc1",
    "deepstack_mergers.N.fc2": "deepstack_merger_list.N.linear_fc2",
}

FAMILIES: dict[str, dict[str, str]] = {
    "qwen2_vl": {
        **_BLOCK,
        **_FUSED_QKV,
        **_same("blocks.N.mlp.fc1", "blocks.N.mlp.fc2"),
        **_SEQUENTIAL_MERGER,
    },
    "qwen2_5_vl": {**_BLOCK, **_FUSED_QKV, **_GATED_MLP, **_SEQUENTIAL_MERGER},
    "qwen3_vl": _QWEN3,
    "qwen3_5": _QWEN3,
    "qwen2_5_omni": {**_BLOCK, **_SPLIT_QKV, **_GATED_MLP, **_SEQUENTIAL_MERGER},
    "qwen3_omni": {
        **_BLOCK,
        **_same("pos_embed"),
        **_FUSED_QKV,
        **_LINEAR_MLP,
        **_SEQUENTIAL_MERGER,
        "deepstack_mergers.N.norm": "merger_list.N.ln_q",
        "deepstack_mergers.N.fc1": "merger_list.N.mlp.0",
        "deepstack_mergers.N.fc2": "merger_list.N.mlp.2",
    },
}

_OFFICIAL = {family: {official: ours for ours, official in table.items()} for family, table in FAMILIES.items()}
_ROOTS = frozenset(module.split(".")[0] for table in _OFFICIAL.values() for module in table)
# Only the second part of a name is an index: in `merger_list.1.mlp.0` the 0 belongs to the name.
_INDEXED = re.compile(r"(\w+)\.(\d+)\.(.+)")


def _translate(name: str, table: dict[str, str]) -> str | None:
    module, _, parameter = name.rpartition(".")
    indexed = _INDEXED.fullmatch(module)
    if indexed is None:
        found = table.get(module)
        return None if found is None else f"{found}.{parameter}"
    found = table.get(f"{indexed[1]}.N.{indexed[3]}")
    return None if found is None else f"{found.replace('.N.', f'.{indexed[2]}.')}.{parameter}"


def _table(tables: dict[str, dict[str, str]], family: str) -> dict[str, str]:
    if family not in tables:
        raise ValueError(f"family: expected one of {', '.join(FAMILIES)}, got {family!r}")
    return tables[family]


def official_name(canonical: str, family: str) -> str:
    """Return the official name, without prefix, of our tower's tensor `canonical`.

    Raises ValueError for an unknown family, or a name that this family's tower does not have.
    """
    official = _translate(canonical, _table(FAMILIES, family))
    if official is None:
        raise ValueError(f"canonical: expected a tensor of a {family} tower, got {canonical!r}")
    return official


def canonical_name(official: str, family: str) -> str:
    """Return our tower's name of the official tensor `official` (given without prefix).

    Raises ValueError for an unknown family, or a name that this family's checkpoints do not have.
    """
    canonical = _translate(official, _table(_OFFICIAL, family))
    if canonical is None:
        raise ValueError(f"official: expected a tensor of a {family} checkpoint, got {official!r}")
    return canonical


def likely_families(names: Iterable[str]) -> list[str]:
    """Return the families that know the most of `names` (official, without prefix); empty if none knows any.

    More than one where families share a table, as Qwen3-VL and Qwen3.5 do.
    """
    names = list(names)
    known = {family: sum(_translate(n, table) is not None for n in names) for family, table in _OFFICIAL.items()}
    most = max(known.values())
    return [family for family, count in known.items() if count == most > 0]


def find_prefix(names: Iterable[str]) -> str:
    """Return which of `PREFIXES` the vision tensors among `names` carry ("" for a tower saved alone).

    Everything else in a composite checkpoint (language model, audio tower, talker, ...) is ignored.
    Raises ValueError if no vision tensor is there or if two prefixes are, saying what the names begin with.
    """
    names = list(names)
    found = [
        prefix
        for prefix in PREFIXES
        if any(name.startswith(prefix) and (prefix or name.split(".")[0] in _ROOTS) for name in names)
    ]
    if len(found) == 1:
        return found[0]
    present = ", ".join(sorted({".".join(name.split(".")[:2]) for name in names})[:12]) or "nothing at all"
    if not found:
        raise ValueError(
            "no vision tensors: expected names beginning with model.visual., visual. or thinker.visual., "
            f"or a tower saved alone (patch_embed., blocks., merger.); the checkpoint has {present}"
        )
    prefixes = " and ".join(prefix or "no prefix" for prefix in found)
    raise ValueError(f"vision tensors under more than one prefix ({prefixes}); the checkpoint has {present}")


def vision_names(names: Iterable[str], prefix: str) -> list[str]:
    """Return those of `names` that belong to the vision tower under `prefix`, in their order."""
    return [name for name in names if name.startswith(prefix) and (prefix or name.split(".")[0] in _ROOTS)]
