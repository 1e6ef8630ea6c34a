"""The default encoder: loaded at the first call of `qwenvit.encode` and kept for the next."""

import os
import threading
from collections.abc import Iterable
from typing import Any

import torch

from qwenvit.arguments import Impl
from qwenvit.encoder import Encoder
from qwenvit.images import ImageInput
from qwenvit.outputs import Embeddings

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
    **options: Any,
) -> Embeddings:
    """Embed images with a tower that is loaded at the first call and kept for the next.

    Args:
        images: one image or several, as `Encoder.encode` takes them.
        model: see `Encoder.from_pretrained`. The default is fetched from the Hub once (1.35 GB).
        device: see `Encoder.from_pretrained`.
        dtype: see `Encoder.from_pretrained`.
        impl: see `Encoder.from_pretrained`.
        **options: of `Encoder.encode`.

    Returns:
        One entry per image, in input order.
    """
    key = (os.fspath(model), str(device), str(dtype), impl)
    with _current_lock:
        if _current["key"] != key:
            _current.update(key=None, encoder=None)  # let go of the old tower before the new one is loaded
            encoder = Encoder.from_pretrained(model, device=device, dtype=dtype, impl=impl)
            _current.update(key=key, encoder=encoder)
        encoder = _current["encoder"]
    return encoder.encode(images, **options)
