"""The default encoder: loaded at the first call of `qwenvit.encode` and kept for the next."""

import os
import threading
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

from qwenvit.arguments import Impl, check_device, check_dtype
from qwenvit.encoder import Encoder
from qwenvit.outputs import Embeddings
from qwenvit.preprocess.decode import Backend, Channels, ImageInput

DEFAULT_MODEL = "Qwen/Qwen2.5-VL-7B-Instruct"

_current: dict[str, Any] = {"key": None, "encoder": None}
_current_lock = threading.Lock()


def encode(
    images: ImageInput | Iterable[ImageInput],
    *,
    model: str | os.PathLike[str] = DEFAULT_MODEL,
    device: torch.device | str | None = None,
    dtype: torch.dtype | str | None = None,
    impl: Impl = "auto",
    min_pixels: int | None = None,
    max_pixels: int | None = None,
    size: Mapping[str, int] | None = None,
    resize: Backend | None = None,
    do_rescale: bool = True,
    channels: Channels = None,
) -> Embeddings:
    """Embed images with a tower that is loaded at the first call and kept for the next.

    Args:
        images: one image or several, as `Encoder.encode` takes them.
        model: see `Encoder.from_pretrained`, which also takes what the Hub may want to know. The default is fetched
            from the Hub once (1.35 GB).
        device: see `Encoder.from_pretrained`.
        dtype: see `Encoder.from_pretrained`.
        impl: see `Encoder.from_pretrained`.
        min_pixels: see `Encoder.encode`, as for what follows.
        max_pixels: largest area.
        size: both bounds as Hugging Face writes them.
        resize: `"pillow"` or `"torch"`.
        do_rescale: False for arrays already scaled to [0, 1].
        channels: `"first"` or `"last"`.

    Returns:
        One entry per image, in input order.
    """
    found = check_device(device)
    path = Path(model).expanduser()
    where = str(path.resolve()) if path.exists() else os.fspath(model)  # a relative path means another place later
    key = (where, found, check_dtype(dtype, found), impl)
    with _current_lock:
        if _current["key"] != key:
            _current.update(key=None, encoder=None)  # let go of the old tower before the new one is loaded
            encoder = Encoder.from_pretrained(model, device=found, dtype=dtype, impl=impl)
            _current.update(key=key, encoder=encoder)
        encoder = _current["encoder"]
    return encoder.encode(
        images,
        min_pixels=min_pixels,
        max_pixels=max_pixels,
        size=size,
        resize=resize,
        do_rescale=do_rescale,
        channels=channels,
    )
