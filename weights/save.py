"""Writing safetensors files: whole or not at all."""

import os
import secrets
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

import torch

from qwenvit.weights.header import FLOAT_DTYPES, TensorEntry, build_header, parse_header
from qwenvit.weights.names import official_name

_DTYPE_NAMES = {dtype: name for name, dtype in FLOAT_DTYPES.items()}


def save_tensors(
    path: str | os.PathLike[str],
    canonical_tensors: Mapping[str, torch.Tensor],
    family: str,
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write a tower alone to the .safetensors file `path`, under official names without prefix.

    `metadata` goes into the file's header. Raises what `write_safetensors` does, and ValueError for a name that the
    family's tower does not have.
    """
    tensors = {
        official_name(name, family): tensor.detach().to("cpu").contiguous()
        for name, tensor in canonical_tensors.items()
    }
    write_safetensors(path, tensors, {**(metadata or {}), "format": "pt"})


def write_safetensors(
    path: str | os.PathLike[str], tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str]
) -> None:
    """Write contiguous CPU tensors to `path`, whole or not at all, with the permissions that the umask gives.

    The bytes go to a temporary file beside it, which takes its place once they are on the disk. On any failure `path`
    is what it was. Several threads and processes may write the same `path`: one of their files stays, whole.

    Raises:
        OSError: the file cannot be written, for example since the disk is full.
        ValueError: a dtype outside `FLOAT_DTYPES`, or names or metadata that a safetensors file cannot have.
    """
    target = Path(path)
    entries = {}
    for name, tensor in tensors.items():
        if tensor.dtype not in _DTYPE_NAMES:
            raise ValueError(f"tensors: {name}: expected {', '.join(FLOAT_DTYPES)}, got {tensor.dtype}")
        entries[name] = TensorEntry(target, _DTYPE_NAMES[tensor.dtype], tuple(tensor.shape), 0, tensor.nbytes)
    head, offsets = build_header(entries, metadata)
    parse_header(head[8:], target, len(head) + sum(tensor.nbytes for tensor in tensors.values()))
    # A name of its own length: one made from the target's could be too long for the file system.
    temporary = target.with_name(f".{secrets.token_hex(8)}.safetensors.tmp")
    try:
        with temporary.open("xb") as stream:
            stream.write(head)
            for name in sorted(offsets, key=offsets.__getitem__):
                stream.write(tensors[name].detach().reshape(-1).view(torch.uint8).numpy().data)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(temporary, target)
    except OSError as error:
        if error.errno is None:
            raise
        raise type(error)(error.errno, error.strerror, str(target)) from error  # not the temporary name
    finally:
        temporary.unlink(missing_ok=True)
    sync_folder(target.parent)


def sync_folder(folder: Path) -> None:
    """Bring the names in `folder` to the disk, so that a power failure does not bring the old files back."""
    if os.name == "posix":
        # Some file systems cannot do this for a folder. The file itself is whole in any case.
        with suppress(OSError):
            descriptor = os.open(folder, os.O_RDONLY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
