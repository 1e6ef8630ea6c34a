"""The default encoder: loaded by the first call of `qwenvit.encode` and kept for later calls."""

import os
import threading
from collections.abc import Iterable
from copy import deepcopy
from pathlib import Path
from typing import Any, Literal, Unpack

import torch

from qwenvit.arguments import Impl, check_device, check_dtype
from qwenvit.config.published import DEFAULT_MODEL
from qwenvit.encoder import Encoder
from qwenvit.outputs import Embeddings
from qwenvit.pipeline import OnError, check_on_error
from qwenvit.preprocess.decode import ImageInput
from qwenvit.preprocess.jpeg import Decoder, check_decoder
from qwenvit.preprocess.options import ImageOptions, check_image_options
from qwenvit.preprocess.prefetch import check_num_workers
from qwenvit.towers.checkpoint import ConfigSource

_current: dict[str, Any] = {"key": None, "encoder": None}
_current_lock = threading.Lock()


def encode(
    images: ImageInput | Iterable[ImageInput],
    *,
    model: str | os.PathLike[str] = DEFAULT_MODEL,
    device: torch.device | str | None = None,
    dtype: torch.dtype | str | None = None,
    impl: Impl = "auto",
    subfolder: str | None = None,
    config: ConfigSource | None = None,
    family: str | None = None,
    prefix: str | None = None,
    adapter: str | os.PathLike[str] | Literal[False] | None = None,
    num_workers: int | None = None,
    on_error: OnError = "raise",
    progress: bool = False,
    decode: Decoder = "pillow",
    keep_patches: bool = False,
    **options: Unpack[ImageOptions],
) -> Embeddings:
    """Embed images with an encoder that is kept for the next call with the same model and the same ways to load it.

    Args:
        images: one image or several: PIL images, uint8 arrays or tensors, paths, or encoded bytes.
        model: a path, Hub repository, short name or `"demo"`, as in `Encoder.from_pretrained`, which also has Hub
            options. The default is downloaded from the Hub once (1.35 GB).
        device: default: the GPU where there is one, else the CPU.
        dtype: a name, a torch dtype or `"auto"`. Default: bfloat16 on a GPU, float32 on the CPU.
        impl: `"auto"`, `"triton"` (the fast tower) or `"reference"`.
        subfolder: the folder inside the model's that has the checkpoint.
        config: the config, if not that of the checkpoint's `config.json`: a file, its folder, its content, or a
            `VisionConfig`.
        family: the tower's family, whatever `model_type` says.
        prefix: what the names of the tower's tensors start with, in a checkpoint with several towers.
        adapter: a LoRA adapter to merge. Default: the one beside the checkpoint or in it. False: none.
        num_workers: threads that decode; 0 decodes in this thread. None: 4, or fewer on a smaller machine. The result
            is the same.
        on_error: what an image that cannot be used does: `"raise"` its error, or `"skip"` it with a warning;
            `errors` of the result has its error too.
        progress: show a progress bar.
        decode: what decodes JPEG files: `"pillow"`, or `"nvjpeg"` on a GPU through torchvision, which is faster and
            differs by tens of levels where colours change sharply. Pillow decodes what nvJPEG does not, with a
            warning.
        keep_patches: keep the last block's states too, for `Embeddings.pooled("patches")`. They take more memory than
            the tokens.
        options: min_pixels, max_pixels, max_tokens, size, resize, do_rescale, channels; see `ImageOptions`.

    Returns:
        One entry per image in input order, None for a skipped image; on the tower's device and in its dtype.

    Raises:
        TypeError: an unknown option, or an image of a type or dtype that is not supported.
        ValueError: an impossible argument or option, a checkpoint or image that cannot be used.
        OSError: the Hub or a file cannot be read.
        OverflowError: the features exceed the range of float16.
    """
    check_image_options(options)
    check_num_workers(num_workers)
    check_on_error(on_error)
    device = check_device(device)
    check_decoder(decode, device)
    loading: dict[str, Any] = {
        "subfolder": subfolder,
        "config": config,
        "family": family,
        "prefix": prefix,
        "adapter": adapter,
    }
    key = (_identity(model), device, check_dtype(dtype, device), impl, *map(_identity, loading.values()))
    with _current_lock:
        if _current["key"] != key:
            _current.update(key=None, encoder=None)  # release the old tower before loading the new one
            encoder = Encoder.from_pretrained(model, device=device, dtype=dtype, impl=impl, **loading)
            _current.update(key=key, encoder=encoder)
        encoder = _current["encoder"]
    how: dict[str, Any] = {"num_workers": num_workers, "on_error": on_error, "progress": progress, "decode": decode}
    return encoder.encode(images, **how, keep_patches=keep_patches, **options)


def _identity(argument: Any) -> Any:
    """Return what an argument means, to compare it with that of a later call.

    A path is resolved now: a relative one means another file after a change of directory. A mapping may change.
    """
    if not isinstance(argument, str | os.PathLike):
        return deepcopy(argument)
    path = Path(argument).expanduser()
    return str(path.resolve()) if path.exists() else os.fspath(argument)
