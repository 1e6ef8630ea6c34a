"""Names of vision tensors: translation between canonical and official names.

Canonical names are those of our towers, equal in all families (`blocks.N.mlp.fc1`, `merger.fc2`, ...). Official
names are those of published checkpoints and differ by family. The tables below have module names, with `N` for an
index; a tensor's name adds `.weight` or `.bias`.
"""

import re


def _unchanged(*modules: str) -> dict[str, str]:
    return {module: module for module in modules}


_BLOCK = _unchanged("patch_embed.proj", "blocks.N.norm1", "blocks.N.norm2", "blocks.N.attn.proj")
_FUSED_QKV = _unchanged("blocks.N.attn.qkv")
_SPLIT_QKV = _unchanged("blocks.N.attn.q", "blocks.N.attn.k", "blocks.N.attn.v")
_GATED_MLP = _unchanged("blocks.N.mlp.gate_proj", "blocks.N.mlp.up_proj", "blocks.N.mlp.down_proj")
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
_QWEN3_5 = {
    **_BLOCK,
    **_unchanged("pos_embed"),
    **_FUSED_QKV,
    **_LINEAR_MLP,
    **_LINEAR_MERGER,
}
_QWEN3_VL = {
    **_QWEN3_5,
    "deepstack_mergers.N.norm": "deepstack_merger_list.N.norm",
    "deepstack_mergers.N.fc1": "deepstack_merger_list.N.linear_fc1",
    "deepstack_mergers.N.fc2": "deepstack_merger_list.N.linear_fc2",
}

NAME_TABLES: dict[str, dict[str, str]] = {
    "qwen2_vl": {
        **_BLOCK,
        **_FUSED_QKV,
        **_unchanged("blocks.N.mlp.fc1", "blocks.N.mlp.fc2"),
        **_SEQUENTIAL_MERGER,
    },
    "qwen2_5_vl": {**_BLOCK, **_FUSED_QKV, **_GATED_MLP, **_SEQUENTIAL_MERGER},
    "qwen3_vl": _QWEN3_VL,
    "qwen3_5": _QWEN3_5,
    "qwen2_5_omni": {**_BLOCK, **_SPLIT_QKV, **_GATED_MLP, **_SEQUENTIAL_MERGER},
    "qwen3_omni": {
        **_BLOCK,
        **_unchanged("pos_embed"),
        **_FUSED_QKV,
        **_LINEAR_MLP,
        **_SEQUENTIAL_MERGER,
        "deepstack_mergers.N.norm": "merger_list.N.ln_q",
        "deepstack_mergers.N.fc1": "merger_list.N.mlp.0",
        "deepstack_mergers.N.fc2": "merger_list.N.mlp.2",
    },
}
"""Canonical to official module names, for each family."""

ALL_MODULES = frozenset(module for table in NAME_TABLES.values() for module in table.values())
"""The official names of every family's modules, without prefix."""
TOP_MODULES = frozenset(module.partition(".")[0] for module in ALL_MODULES)
"""Their first parts: `blocks`, `merger`, ..."""

_REVERSE_TABLES = {
    family: {official: canonical for canonical, official in table.items()} for family, table in NAME_TABLES.items()
}
# Only the second part of a name is an index: in `merger_list.1.mlp.0`, the 0 is part of the module's name.
_INDEXED = re.compile(r"(\w+)\.(0|[1-9][0-9]{0,8})\.(.+)")


def split_index(module: str) -> tuple[str, int | None]:
    """Return a module's name as in `NAME_TABLES`, with `N` for its index, and the index: 7 of `blocks.7.norm1`."""
    indexed = _INDEXED.fullmatch(module)
    return (module, None) if indexed is None else (f"{indexed[1]}.N.{indexed[3]}", int(indexed[2]))


def with_index(module: str, index: int | None) -> str:
    """Undo `split_index`."""
    return module if index is None else module.replace(".N.", f".{index}.")


def _translate(name: str, table: dict[str, str]) -> str | None:
    """Return the tensor's other name, or None if the table does not have its module."""
    module, _, parameter = name.rpartition(".")
    module, index = split_index(module)
    found = table.get(module)
    return None if found is None else f"{with_index(found, index)}.{parameter}"


def _table_of(tables: dict[str, dict[str, str]], family: str) -> dict[str, str]:
    if family not in tables:
        raise ValueError(f"family: expected one of {', '.join(NAME_TABLES)}, got {family!r}")
    return tables[family]


def official_name(canonical: str, family: str) -> str:
    """Return the official name, without prefix, of the tensor with the name `canonical` in our towers.

    Raises ValueError for an unknown family, or a name that this family's tower does not have.
    """
    official = _translate(canonical, _table_of(NAME_TABLES, family))
    if official is None:
        raise ValueError(f"canonical: expected a tensor of a {family} tower, got {canonical!r}")
    return official


def canonical_name(official: str, family: str) -> str:
    """Return the name in our towers of the tensor with the name `official` (without prefix) in checkpoints.

    Raises ValueError for an unknown family, or a name that this family's checkpoints do not have.
    """
    canonical = _translate(official, _table_of(_REVERSE_TABLES, family))
    if canonical is None:
        raise ValueError(f"official: expected a tensor of a {family} checkpoint, got {official!r}")
    return canonical
