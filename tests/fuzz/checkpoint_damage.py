"""Damage to checkpoints, which may be noticed or not."""

import os
import random
import socket
from pathlib import Path
from typing import Any

import torch

from fuzz.checkpoint_files import INDEX, Change, Files, bytes_of, edit_json, edit_tensors, framed, some_file, split
from support.json_damage import HUGE, damaged_json, flipped_bit

ODD = [
    None, True, False, -1, 0, 1, 2, 3, 1.5, 2.0, 1e300, "", "2", "x" * 10_000, "../../../etc/passwd", [], [0], [[1]],
    {}, {"a": {}}, 10**9, "silu", "qwen2_vl", "qwen3_5", *HUGE,
]  # fmt: skip
OTHER_FORMATS = [
    b"GGUF\x03\0\0\0" + bytes(64),
    b"PK\x03\x04" + bytes(64),
    b"\x80\x02}q\0.",
    b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n",
    b"<!DOCTYPE html><title>504 Gateway Time-out</title>",
    b'{"error": "Repository not found"}',
    b"\x1f\x8b\x08\0" + bytes(30),
    bytes(100),
    b"",
]


def header_json(files: Files, generator: random.Random) -> str:
    """Damage a header, whose length stays right."""
    name = some_file(files, generator, ".safetensors")
    text, data = split(files[name])
    files[name] = framed(damaged_json(text, generator), data)
    return f"{name}: header"


def header_length(files: Files, generator: random.Random) -> str:
    """Let the first 8 bytes lie."""
    name = some_file(files, generator, ".safetensors")
    length = int.from_bytes(files[name][:8], "little")
    lie = generator.choice([0, 1, length - 1, length + 1, length + 8, 10**8, 10**8 + 1, *HUGE[:9]])
    files[name] = max(lie, 0).to_bytes(8, "little") + files[name][8:]
    return f"{name}: header of {lie} bytes instead of {length}"


def tensor_bytes(files: Files, generator: random.Random) -> str:
    """Damage the tensors' own bytes, as a bad disk does."""
    name = some_file(files, generator, ".safetensors")
    text, data = split(files[name])
    start = generator.randrange(len(data) + 1)
    zeros = data[:start] + bytes(len(data) - start)  # a download that stopped after its space was reserved
    files[name] = framed(text, generator.choice([zeros, flipped_bit(data, generator)]))
    return f"{name}: tensors"


def any_bit(files: Files, generator: random.Random) -> str:
    """Flip bits anywhere."""
    name = some_file(files, generator, "")
    for _ in range(generator.choice([1, 1, 8, 64])):
        files[name] = flipped_bit(files[name], generator)
    return f"{name}: bits"


def size(files: Files, generator: random.Random) -> str:
    """Cut a file, or add to it."""
    name = some_file(files, generator, "")
    data = files[name]
    middle = generator.randrange(len(data))
    files[name] = generator.choice([data[:middle], data[:-1], data + b"\0", data + data, data[:middle] * 2])
    return f"{name}: {len(files[name])} bytes instead of {len(data)}"


def json_file(files: Files, generator: random.Random) -> str:
    """Damage a JSON file."""
    name = some_file(files, generator, ".json")
    for _ in range(generator.choice([1, 1, 2])):
        files[name] = damaged_json(bytes_of(files[name]), generator)
    return f"{name}: JSON"


def config_value(files: Files, generator: random.Random) -> str:
    """Give a key of a config another value, take it away, or add one."""

    def edit(content: Any) -> str:
        places = []

        def walk(part: Any) -> None:
            if isinstance(part, dict):
                places.extend((part, key) for key in part)
                for value in part.values():
                    walk(value)

        walk(content)
        part, key = generator.choice(places or [({}, "a")])
        if generator.random() < 0.2:
            part.pop(key, None)
            return f"without {key}"
        if generator.random() < 0.1:
            key = generator.choice(
                ["rope_theta", "quantization_config", "auto_map", "text_config", "head_dim", "depth"]
            )
        part[key] = generator.choice(ODD)
        return f"{key}: {str(part[key])[:40]}"

    return edit_json(files, generator.choice(["config.json", "config.json", "preprocessor_config.json"]), edit)


def index_value(files: Files, generator: random.Random) -> str:
    """Let the index say that tensors are elsewhere."""

    def edit(content: Any) -> str:
        weight_map = content.get("weight_map") or {"a": "b"}
        name = generator.choice(sorted(weight_map))
        others = [str(shard) for shard in weight_map.values()]
        lies = [*others, "absent.safetensors", "config.json", INDEX, ".", "..", "/dev/zero", "/etc/passwd", "", None, 1]
        lies += [f"../{others[0]}", f"./{others[0]}", f"{others[0]}/", others[0].upper(), f"{others[0]}\0", "a\\b", "~"]
        lie = generator.choice(lies)
        match generator.randrange(4):
            case 0:
                weight_map[name] = lie
                return f"{name} in {lie!r}"
            case 1:
                del weight_map[name]
                return f"without {name}"
            case 2:
                weight_map[generator.choice([name + "x", "visual.blocks.9.norm1.weight", ""])] = lie
                return f"another name in {lie!r}"
            case _:
                content["weight_map"] = generator.choice([dict.fromkeys(weight_map, lie), *ODD[:20]])
                return f"all in {lie!r}"

    return edit_json(files, INDEX, edit)


def swapped(files: Files, generator: random.Random) -> str:
    """Give a file another one's content."""
    first, second = some_file(files, generator, ""), some_file(files, generator, generator.choice(["", ".safetensors"]))
    if generator.random() < 0.5:
        files[first], files[second] = files[second], files[first]
        return f"{first} and {second} swapped"
    files[first] = files[second]
    return f"{first}: copy of {second}"


def other_format(files: Files, generator: random.Random) -> str:
    """Replace a file by one of another format."""
    name = some_file(files, generator, "")
    files[name] = generator.choice(OTHER_FORMATS)
    return f"{name}: {files[name][:8]!r}"


def absent(files: Files, generator: random.Random) -> str:
    """Remove a file."""
    name = some_file(files, generator, "")
    del files[name]
    return f"{name}: absent"


def no_file(files: Files, generator: random.Random) -> str:
    """Put something other than a file in its place."""
    name = some_file(files, generator, "")
    kind, make = generator.choice(
        [
            ("named pipe", os.mkfifo),
            ("folder", Path.mkdir),
            ("link to /dev/zero", lambda path: path.symlink_to("/dev/zero")),
            ("link to nothing", lambda path: path.symlink_to("nothing")),
            ("link to itself", lambda path: path.symlink_to(path)),
            ("link to its folder", lambda path: path.symlink_to(path.parent)),
            ("socket", lambda path: _bind(path)),
        ]
    )
    files[name] = make
    return f"{name}: {kind}"


def _bind(path: Path) -> None:
    here = os.open(".", os.O_RDONLY)  # the path of a socket must be short
    os.chdir(path.parent)
    with socket.socket(socket.AF_UNIX) as bound:
        bound.bind(path.name)
    os.fchdir(here)
    os.close(here)


def other_tensor(files: Files, generator: random.Random) -> str:
    """Take a tensor away, or give it another name, shape, dtype or size."""

    def edit(tensors: dict[str, torch.Tensor]) -> str:
        name = generator.choice(sorted(tensors))
        tensor = tensors.pop(name)
        flat = tensor.flatten()
        renamed = [name.replace(".0.", ".1."), name.replace(".0.", ".7."), name[1:], name.upper(), name + "_scale"]
        match generator.randrange(5):
            case 0:
                return f"without {name}"
            case 1:
                new = generator.choice(renamed)
                tensors[new] = tensor
                return f"{name} as {new}"
            case 2:
                dtypes = [torch.int8, torch.float8_e4m3fn, torch.float64, torch.bool, torch.complex64, torch.float16]
                tensors[name] = tensor.to(generator.choice(dtypes))
                return f"{name}: {tensors[name].dtype}"
            case 3:
                others = [flat[:0], flat[:1], torch.cat([flat, flat]), flat[None], flat[0].clone()]
                tensors[name] = generator.choice([*others, tensor.T.contiguous() if tensor.ndim == 2 else flat[None]])
                return f"{name}: {tuple(tensors[name].shape)}"
            case _:
                tensors |= {name: tensor, name + ".more": tensor.clone()}
                return f"more than {name}"

    return edit_tensors(files, generator, edit)


def second_tower(files: Files, generator: random.Random) -> str:
    """Add the tower again under another prefix."""

    def edit(tensors: dict[str, torch.Tensor]) -> str:
        prefix = generator.choice(["", "copy.", "ema.model.visual."])
        tensors |= {prefix + name: -tensor for name, tensor in tensors.items() if "visual." in name}
        return f"again under {prefix!r}"

    return edit_tensors(files, generator, edit)


def broken_adapter(files: Files, generator: random.Random) -> str:
    """Put an adapter beside the weights that cannot be merged."""
    config = generator.choice(
        [b"", b"{}", b"[]", b"{", b"[" * 5000, b'{"peft_type": "LORA"}', b'{"peft_type": "LORA", "r": 1e9}']
    )
    files["adapter_config.json"] = config
    if generator.random() < 0.5:
        files["adapter_model.safetensors"] = generator.choice(OTHER_FORMATS)
    return f"adapter_config.json: {config[:20]!r}"


DAMAGE: list[Change] = [
    header_json, header_json, header_length, tensor_bytes, any_bit, size, json_file, json_file, config_value,
    config_value, index_value, index_value, swapped, other_format, absent, no_file, other_tensor, other_tensor,
    second_tower, broken_adapter,
]  # fmt: skip
