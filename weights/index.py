"""The index of a sharded checkpoint: which file has which tensor."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qwenvit.weights.strict_json import read_json


def read_index(file: Path) -> dict[str, str]:
    """Return the shard's file name of each tensor from a `model.safetensors.index.json`.

    Raises OSError if the file cannot be read, and ValueError if it is not such an index, see `parse_index`.
    """
    return parse_index(read_json(file), file)


def parse_index(content: Mapping[str, Any], file: Path) -> dict[str, str]:
    """Return the shard's file name of each tensor from the `content` of the index `file`.

    Shards are files beside the index. A name with a folder, an absolute one or `..` is refused: an index must not
    reach other files.

    Raises ValueError if there is no `weight_map` of such names.
    """
    shards = content.get("weight_map")
    if not isinstance(shards, dict) or not shards:
        got = "none" if shards is None else str(shards)[:100]
        raise ValueError(f"{file}: weight_map: expected an object with the file of each tensor, got {got}")
    for name, shard in shards.items():
        if not isinstance(shard, str) or not _is_plain_name(shard):
            raise ValueError(
                f"{file}: weight_map: {name[:200]!r}: expected the name of a file beside it, got {str(shard)[:200]!r}"
            )
    return shards


def _is_plain_name(name: str) -> bool:
    # Backslashes and colons separate folders and drives on Windows, and no shard has them in its name.
    return name not in ("", ".", "..") and not any(letter in name for letter in "/\\:\0")
