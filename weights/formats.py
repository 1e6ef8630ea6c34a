"""Formats that are not read (GGUF, pickles, quantised weights, ...): recognised, and refused with what to do."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from qwenvit.weights.regular_file import open_regular

PICKLES = (".bin", ".pt", ".pth", ".ckpt")
_HEAD_BYTES = 64
_LFS_POINTER = b"version https://git-lfs.github.com/spec/"


def refuse_other_format(file: Path) -> None:
    """Raise ValueError, which says what the file is and what to do, if its first bytes are another format's.

    Raises OSError if the file cannot be read, and ValueError also if it is not a regular file.
    """
    with open_regular(file) as stream:
        head = stream.read(_HEAD_BYTES)
    if head[4:8] == bytes(4):  # as in every safetensors file: its header is shorter than 4 GB
        return
    if head.startswith(b"GGUF"):
        raise gguf_error(file)
    if head.startswith((b"PK\x03\x04", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")):
        raise pickle_error(file, [file.name])
    if head.startswith(_LFS_POINTER):
        raise ValueError(
            f"{file}: a pointer of Git LFS, not the file itself: run `git lfs pull` in the repository, or download it "
            "with `hf download`"
        )


def no_checkpoint_error(where: Path, files: Sequence[str], expected: Sequence[str]) -> OSError | ValueError:
    """Return the error for a folder or repository whose `files` include none of the `expected` ones."""
    pickles = [name for name in files if name.endswith(PICKLES)]
    if not any(name.endswith(".safetensors") for name in files):
        if any(name.endswith(".gguf") for name in files):
            return gguf_error(where)
        if pickles:
            return pickle_error(where, pickles)
    return FileNotFoundError(
        f"{where}: expected one of {', '.join(expected)}, got {', '.join(files[:12]) or 'no files'} "
        "(pass a .safetensors file of another name by its path, and a folder inside as subfolder=)"
    )


def gguf_error(where: Path) -> ValueError:
    """Return the error for GGUF files."""
    return ValueError(
        f"{where}: only safetensors files are read, and this is GGUF, the format of llama.cpp, with quantised or "
        "rearranged weights: use the safetensors checkpoint that it was converted from"
    )


def pickle_error(where: Path, pickles: Sequence[str], converted: str = "model.safetensors") -> ValueError:
    """Return the error for weights that consist of `pickles`, and what to call them once they are `converted`."""
    return ValueError(
        f"{where}: only safetensors files are read, since loading a pickle ({', '.join(pickles[:3])}) runs the code "
        "in it; if you trust it, convert it with safetensors.torch.save_file(torch.load(file, weights_only=True), "
        f"{converted!r})"
    )


def quantisation_of(dtypes: Mapping[str, str]) -> str | None:
    """Return how a tower is quantised, or None, from its tensors' names and dtypes as safetensors spells them."""
    parameters = {name.rpartition(".")[2] for name in dtypes}
    weights = {dtype for name, dtype in dtypes.items() if name.endswith(".weight")}
    if "qweight" in parameters:
        return "GPTQ (qweight, g_idx)" if "g_idx" in parameters else "AWQ or GPTQ (qweight)"
    if "weight_packed" in parameters:
        return "compressed-tensors (weight_packed)"
    if any(name.endswith((".weight.absmax", ".weight.quant_map")) or ".quant_state." in name for name in dtypes):
        return "bitsandbytes in 4 bits (absmax)"
    if "SCB" in parameters:
        return "bitsandbytes in 8 bits (SCB)"
    if any(dtype.startswith("F8_") for dtype in weights):
        return "FP8"
    if "U32" in weights:
        return "MLX's quantisation (U32)"
    integers = sorted(dtype for dtype in weights if dtype[0] in "IU")
    return f"integers ({', '.join(integers)})" if integers else None
