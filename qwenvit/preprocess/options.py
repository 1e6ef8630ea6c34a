"""The options of a call that preprocesses images."""

from collections.abc import Iterable, Mapping
from typing import TypedDict

from qwenvit.preprocess.decode import Backend, Channels


class ImageOptions(TypedDict, total=False):
    """Keyword arguments of every call that takes images. All may be omitted."""

    min_pixels: int | None
    """Enlarge smaller images to this area, in pixels. Default: the image processor's own, or a lower upper bound."""
    max_pixels: int | None
    """Shrink larger images to this area, in pixels. Default: the image processor's own."""
    max_tokens: int | None
    """Shrink larger images to this many merged tokens, instead of passing `max_pixels`, which becomes
    `max_tokens · (patch_size · merge_size)²`. Only an image whose aspect ratio is above `max_tokens` has more, or one
    enlarged to your own `min_pixels`. Default: no bound but the image processor's `max_pixels`."""
    size: Mapping[str, int] | None
    """Both bounds as Hugging Face writes them: `{"shortest_edge": min_pixels, "longest_edge": max_pixels}`."""
    resize: Backend | None
    """Whose bicubic interpolation and rounding: `"torch"` or `"pillow"`. Default: the image processor's own, which is
    `"torch"` unless the checkpoint's config says otherwise."""
    do_rescale: bool
    """False for images that are float32 arrays or tensors in [0, 1]: `"pillow"` converts them to 8 bits, `"torch"`
    keeps them. Default: True, for 8-bit images."""
    channels: Channels
    """The axis of an array's channels, `"first"` or `"last"`. Default: inferred from its shape; a shape that could be
    either is refused."""


def check_image_options(names: Iterable[str]) -> None:
    """Raise TypeError unless every name is a key of `ImageOptions`."""
    known = list(ImageOptions.__annotations__)
    if unknown := [name for name in names if name not in known]:
        raise TypeError(f"options: expected only {', '.join(known)}, got {', '.join(unknown)}")
