"""A checkpoint in memory, and how the fuzzer's changes edit it.

A checkpoint is a mapping from file names to bytes, or to a function that makes something other than a file. Each
change takes it and a generator, changes it in place and returns what it did.
"""

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

from safetensors.torch import load, save

Files = dict[str, bytes | Callable[[Path], None]]
Change = Callable[[Files, random.Random], str]
INDEX = "model.safetensors.index.json"


def some_file(files: Files, generator: random.Random, suffix: str) -> str:
    found = sorted(name for name, data in files.items() if name.endswith(suffix) and bytes_of(data))
    return generator.choice(found or [_refill(files, suffix)])


def _refill(files: Files, suffix: str) -> str:
    """Add a file, since earlier changes left none to damage."""
    name = f"model{suffix}"
    files[name] = framed(b"{}", b"") if suffix == ".safetensors" else b"{}"
    return name


def bytes_of(data: bytes | Callable[[Path], None]) -> bytes:
    return data if isinstance(data, bytes) else b""


def split(raw: bytes) -> tuple[bytes, bytes]:
    end = 8 + int.from_bytes(raw[:8], "little")
    return raw[8:end], raw[end:]


def framed(text: bytes, data: bytes) -> bytes:
    return len(text).to_bytes(8, "little") + text + data


def edit_tensors(files: Files, generator: random.Random, edit: Callable[[dict[str, Any]], str]) -> str:
    """Let `edit` change the tensors of a file, which stays well formed."""
    name = some_file(files, generator, ".safetensors")
    try:
        tensors = load(files[name])
    except Exception:  # noqa: BLE001 - an earlier change may have broken it in any way
        return "nothing"
    done = edit(tensors)
    files[name] = save(tensors, {"format": "pt"})
    return f"{name}: {done}"


def edit_json(files: Files, name: str, edit: Callable[[Any], str]) -> str:
    try:
        content = json.loads(files[name])
    except (KeyError, TypeError, ValueError):
        return "nothing"
    done = edit(content)
    files[name] = json.dumps(content).encode()
    return f"{name}: {done}"
