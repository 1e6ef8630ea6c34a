"""Changes to checkpoints that must not matter: the tower loads, and is the same."""

import functools
import json
import os
import random
from pathlib import Path
from typing import Any

from safetensors.torch import load, save

from fuzz.checkpoint_damage import OTHER_FORMATS
from fuzz.checkpoint_files import INDEX, Change, Files, edit_json, framed, some_file, split


def other_prefix(files: Files, generator: random.Random) -> str:
    """Name the tower's tensors as wrappers of models do."""
    prefix = "".join(generator.choices(["model.", "vlm.", "module.", "base_model.", "a.", "vision_tower."], k=3))
    for name, data in list(files.items()):
        if name.endswith(".safetensors"):
            tensors = {prefix + key if "visual." in key else key: value for key, value in load(data).items()}
            files[name] = save(tensors, {"format": "pt"})

    def edit(content: Any) -> str:
        weight_map = content["weight_map"]
        content["weight_map"] = {prefix + key if "visual." in key else key: weight_map[key] for key in weight_map}
        return ""

    edit_json(files, INDEX, edit)
    return f"names after {prefix}"


def other_files(files: Files, generator: random.Random) -> str:
    """Add files that are nobody's business."""
    for name in ("README.md", "pytorch_model.bin", "tokenizer.json", "generation_config.json", "optimizer.safetensors"):
        files[name] = generator.choice(OTHER_FORMATS)
    files["runs"] = Path.mkdir
    files["log"] = os.mkfifo
    return "other files"


def large_language_model(files: Files, generator: random.Random) -> str:
    """Add a tensor of 4 GB that takes no space on the disk."""
    name = some_file(files, generator, ".safetensors")
    text, data = split(files[name])
    header = json.loads(text)
    end = len(data) + (4 << 30)
    header["lm_head.weight2"] = {"dtype": "F32", "shape": [1 << 30], "data_offsets": [len(data), end]}
    start = framed(json.dumps(header).encode(), data)
    files[name] = functools.partial(_sparse, start=start, size=len(start) + (4 << 30))
    return f"{name}: 4 GB more"


def _sparse(path: Path, *, start: bytes, size: int) -> None:
    path.write_bytes(start)
    os.truncate(path, size)


def links(files: Files, generator: random.Random) -> str:
    """Replace files by links into a folder of blobs, as in the Hub's cache."""
    for name, data in list(files.items()):
        files[name] = functools.partial(_link, data=data)
    return "links"


def _link(path: Path, *, data: bytes) -> None:
    blobs = path.parent / "blobs"
    blobs.mkdir(exist_ok=True)
    (blobs / path.name).write_bytes(data)
    path.symlink_to(Path("blobs") / path.name)


def spaces(files: Files, generator: random.Random) -> str:
    """Write the same JSON with other white space and escapes, and in another order."""

    def rewritten(text: bytes) -> bytes:
        items = list(json.loads(text).items())
        generator.shuffle(items)
        return json.dumps(dict(items), indent=generator.randrange(4)).encode() + b" \n"

    for name, data in list(files.items()):
        if name.endswith(".safetensors"):
            text, tensors = split(data)
            files[name] = framed(rewritten(text), tensors)
        else:
            files[name] = rewritten(data)
    return "JSON written otherwise"


def nothing(files: Files, generator: random.Random) -> str:
    """Leave the checkpoint as it is."""
    return "nothing"


HARMLESS: list[Change] = [other_prefix, other_files, large_language_model, links, spaces, nothing]
