"""What a job is asked to do, and the settings that follow from it."""

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from qwenvit.datasets.formats import check_format
from qwenvit.datasets.item import ShardLayout
from qwenvit.encoder import Encoder
from qwenvit.pooling import PoolMode, check_pool_mode
from qwenvit.preprocess.jpeg import Decoder
from qwenvit.preprocess.options import ImageOptions, check_image_options
from qwenvit.preprocess.prefetch import check_num_workers


@dataclass(frozen=True)
class JobOptions:
    """The options of a job, which `encode_dataset` describes. Can be pickled unless `model` is an encoder."""

    model: str | os.PathLike[str] | Encoder
    loading: Mapping[str, Any]
    """Arguments of `Encoder.from_pretrained` besides model and device."""
    format: str
    pool: PoolMode | None
    normalize: bool
    tokens: bool
    shard_images: int
    shard_bytes: int
    num_workers: int | None
    decode: Decoder
    video: bool
    verify: bool
    image: ImageOptions
    image_column: str | None = None

    def check(self) -> None:
        """Refuse what can be seen to be impossible before a model is loaded.

        Raises:
            TypeError: an unknown option of images.
            ValueError: an impossible option.
            ImportError: the format needs a package that is not installed.
        """
        if self.pool is not None:
            check_pool_mode(self.pool)
        elif self.normalize:
            raise ValueError("normalize: expected False without pooling, got True; pass pool='mean'")
        for name, value in (("shard_images", self.shard_images), ("shard_bytes", self.shard_bytes)):
            if isinstance(value, bool) or not isinstance(value, int | np.integer) or value < 1:
                raise ValueError(f"{name}: expected a positive integer, got {value!r}")
        check_format(self.format, self.tokens, self.pool is not None)
        check_num_workers(self.num_workers)
        check_image_options(self.image)
        if unfit := [name for name in ("do_rescale", "channels") if name in self.image]:
            raise TypeError(f"{unfit[0]}: expected nothing, since files have no such option")
        of_images = [name for name in ("max_tokens", "resize") if self.image.get(name) is not None]
        if self.video and of_images:
            raise ValueError(f"{of_images[0]}: expected None with video, since it is for images alone; see max_pixels")

    @property
    def model_name(self) -> str:
        """The model as the manifest names it."""
        return repr(self.model) if isinstance(self.model, Encoder) else os.fspath(self.model)

    def requested(self) -> dict[str, Any]:
        """Return the settings that are known before the model is."""
        return {
            "model": self.model_name,
            "revision": self.loading.get("revision"),
            "format": self.format,
            "tokens": self.tokens,
            "pool": self.pool,
            "normalize": self.normalize,
            "decode": self.decode,
            "video": self.video,
            "verify": self.verify,
            "image_column": self.image_column,
        }


@dataclass(frozen=True)
class Resolved:
    """What is known of a job once its model is loaded."""

    settings: dict[str, Any]
    """What decides the values of a row."""
    layout: ShardLayout

    @classmethod
    def of(cls, encoder: Encoder, options: JobOptions) -> "Resolved":
        """Return the settings and the layout of the shards.

        Raises:
            ValueError: impossible bounds of pixels.
        """
        image = options.image
        bounds = (image.get("min_pixels"), image.get("max_pixels"), image.get("size"), image.get("max_tokens"))
        processor = encoder.image_processor.with_bounds(*bounds)
        dtype = str(encoder.dtype).removeprefix("torch.")
        settings = options.requested() | {
            "weights": f"sha256:{hash_weights(encoder.tower)}",
            "dtype": dtype,
            "device": encoder.device.type,
            "impl": getattr(encoder.tower, "impl", "reference"),
            "min_pixels": processor.min_pixels,
            "max_pixels": processor.max_pixels,
            "resize": image.get("resize") or processor.resize,
        }
        metadata = {key: json.dumps(value) for key, value in settings.items()}
        has_pooled = options.pool is not None
        layout = ShardLayout(encoder.config, options.model_name, encoder.dtype, options.tokens, has_pooled, metadata)
        return cls(settings, layout)


def hash_weights(tower: torch.nn.Module) -> str:
    """Return the SHA-256 of the tower's weights: names, dtypes, shapes and bytes, in the order of the names."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tower.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        flat = tensor.detach().to("cpu").contiguous().reshape(-1)
        digest.update(flat.view(torch.uint8).numpy().data)
    return digest.hexdigest()
