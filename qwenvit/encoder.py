"""The encoder: images, videos or pixel values in, embeddings out."""

import json
import os
import threading
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qwenvit import demo
from qwenvit.arguments import Impl, check_dtype, check_impl, check_pixel_values, default_device
from qwenvit.checkpoint import directory_of, load_tower, locate
from qwenvit.grid import GridPlan
from qwenvit.images import ImageInput, as_image_list
from qwenvit.outputs import Embeddings, TowerOutput
from qwenvit.processing import ImageProcessor, read_processors
from qwenvit.reference import ReferenceTower
from qwenvit.video import VideoProcessor
from qwenvit.weights.local import save_tensors

DEFAULT_MODEL = "Qwen/Qwen2.5-VL-7B-Instruct"
PATCHES_PER_BATCH = 32_768  # activations of 7B-size towers then stay under about 2 GB in bf16


class Encoder:
    """A loaded vision tower with the preprocessing that belongs to it.

    Attributes:
        tower: the tower, an `nn.Module`. Its parameters do not require gradients until you ask them to.
        config: its shape.
        image_processor: turns images into pixel values.
        video_processor: turns frames into pixel values.
    """

    def __init__(
        self,
        tower: ReferenceTower,
        image_processor: ImageProcessor | None = None,
        video_processor: VideoProcessor | None = None,
    ) -> None:
        self.tower = tower.requires_grad_(False).eval()
        self.config = tower.config
        self.image_processor = image_processor or ImageProcessor.for_family(self.config.family)
        self.video_processor = video_processor or VideoProcessor.for_family(self.config.family)
        for name, processor in (("image", self.image_processor), ("video", self.video_processor)):
            sizes = (processor.patch_size, processor.temporal_patch_size, processor.merge_size)
            expected = (self.config.patch_size, self.config.temporal_patch_size, self.config.spatial_merge_size)
            if sizes != expected:
                raise ValueError(
                    f"{name} processor: patch, temporal patch and merge size {sizes} do not fit the tower's {expected}"
                )

    @classmethod
    def from_pretrained(
        cls,
        model: str | os.PathLike[str],
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | str | None = None,
        impl: Impl = "auto",
        revision: str | None = None,
        token: str | bool | None = None,
        cache_dir: str | os.PathLike[str] | None = None,
        local_files_only: bool = False,
        force_download: bool = False,
    ) -> "Encoder":
        """Load the vision tower of a checkpoint; nothing else of the checkpoint is read or downloaded.

        Args:
            model: a local directory or `.safetensors` file, a Hub repository (`"Qwen/Qwen2.5-VL-7B-Instruct"`), a
                short name of `qwenvit.registry.PUBLISHED`, or `"demo"` for the embedded tower of random weights.
            device: default: the GPU where there is one, else the CPU.
            dtype: `"float32"`, `"bfloat16"`, `"float16"`, the torch dtype, or `"auto"` for the checkpoint's own.
                Default: bfloat16 on a GPU, float32 on the CPU.
            impl: `"reference"` is the plain torch tower. `"auto"` takes the fastest tower this version has for the
                device; an explicit choice never falls back.
            revision: Hub branch, tag or commit. A branch stays at the commit it was first fetched at until
                `force_download=True` asks again.
            token: Hub token; default: the one huggingface_hub finds.
            cache_dir: Hub cache; default: huggingface_hub's.
            local_files_only: never use the network.
            force_download: ask the Hub for the revision's current commit.

        Raises:
            ValueError: unknown model, dtype or impl; a checkpoint whose vision tensors are missing, unexpected or
                wrongly shaped (all named at once).
            OSError: the Hub or the files could not be read.
        """
        check_impl(impl)
        device = torch.device(device) if device is not None else default_device()
        tower_dtype = check_dtype(dtype, device)
        if os.fspath(model) == demo.NAME:
            return cls(demo.build_tower().to(device, tower_dtype), demo.image_processor())
        source = locate(
            model,
            revision=revision,
            token=token,
            cache_dir=cache_dir,
            local_files_only=local_files_only,
            force_download=force_download,
        )
        tower = load_tower(source, device=device, dtype=tower_dtype)
        return cls(tower, *read_processors(directory_of(source), tower.config.family))

    @property
    def device(self) -> torch.device:
        """Where the tower lives."""
        return self.tower.patch_embed.proj.weight.device

    @property
    def dtype(self) -> torch.dtype:
        """The dtype the tower computes in."""
        return self.tower.patch_embed.proj.weight.dtype

    def encode(self, images: ImageInput | Iterable[ImageInput], **options: Any) -> Embeddings:
        """Embed images.

        Args:
            images: one image or several: PIL images, uint8 arrays or tensors, paths, or encoded bytes.
            **options: passed to the image processor: `min_pixels`, `max_pixels`, `size`, `resize`, `channels`,
                `do_rescale`.

        Returns:
            One entry per image in input order, on the tower's device and in its dtype. However many images there
            are, at most `PATCHES_PER_BATCH` patches (or one image) go through the tower at once.

        Raises:
            ValueError, TypeError: an image or option that cannot be used, named with what was expected.
        """
        return self._embed(self.image_processor([image], **options) for image in as_image_list(images))

    def encode_video(self, frames: Any, **options: Any) -> Embeddings:
        """Embed one video.

        Args:
            frames: a list of frames (anything `encode` takes as an image), or a uint8 array or tensor
                `[frames, H, W, C]`. Used as given: choose them with `sample_frames` if you hold a whole clip.
            **options: passed to the video processor: `min_pixels`, `max_pixels`, `size`, `channels`,
                `cap_pixels_per_frame`.

        Returns:
            One entry; `entry.spatial()` is `[t, h, w, out_hidden_size]`, a t for every two frames.

        Raises:
            ValueError, TypeError: frames or options that cannot be used, named with what was expected.
        """
        return self._embed([self.video_processor(frames, **options)])

    @torch.no_grad()
    def _embed(self, items: Iterable[tuple[Tensor, Tensor]]) -> Embeddings:
        outputs, grids = [], []
        for pixel_values, grid in _batches(items):
            outputs.append(self(pixel_values, grid))
            grids.append(grid)
        return Embeddings(
            torch.cat([output.pooler_output for output in outputs]),
            torch.cat(grids),
            [torch.cat(layer) for layer in zip(*(output.deepstack_features for output in outputs), strict=True)],
            self.config.spatial_merge_size,
        )

    def __call__(self, pixel_values: Tensor, grid_thw: Tensor) -> TowerOutput:
        """Run the tower on what a Hugging Face processor returns.

        Args:
            pixel_values: `[patches, C·T·P·P]` in any floating dtype (`pixel_values` or `pixel_values_videos`).
            grid_thw: `[items, 3]` integers (`image_grid_thw` or `video_grid_thw`).

        Returns:
            What transformers' tower returns: `last_hidden_state` in the tower's own order, `pooler_output` in
            reading order, `deepstack_features`. Gradients flow if the tower's parameters or `pixel_values` want them.

        Raises:
            TypeError: `pixel_values` is not a floating tensor.
            ValueError: shapes that do not fit the tower or each other.
        """
        plan = GridPlan.build(grid_thw, self.config, self.device)
        check_pixel_values(pixel_values, plan, self.config)
        return self.tower(pixel_values.to(self.device), plan)

    def save_pretrained(self, directory: str | os.PathLike[str]) -> None:
        """Write the tower alone: `model.safetensors`, `config.json` and the processors' configs.

        The directory loads again here and in transformers' own tower class.
        """
        target = Path(directory)
        target.mkdir(parents=True, exist_ok=True)
        hf = self.config.to_hf() | {"dtype": str(self.dtype).removeprefix("torch.")}
        for name, content in {
            "config.json": hf,
            "preprocessor_config.json": self.image_processor.to_hf(),
            "video_preprocessor_config.json": self.video_processor.to_hf(),
        }.items():
            (target / name).write_text(json.dumps(content, indent=2) + "\n")
        save_tensors(target / "model.safetensors", self.tower.state_dict(), family=self.config.family)

    def __repr__(self) -> str:
        return f"Encoder({self.config.family}, {self.config.depth} blocks, {self.dtype}, {self.device})"


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
        **options: passed to the image processor.

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


def _batches(items: Iterable[tuple[Tensor, Tensor]]) -> Iterator[tuple[Tensor, Tensor]]:
    """Join consecutive items, as many as `PATCHES_PER_BATCH` allows and at least one."""
    pending: list[tuple[Tensor, Tensor]] = []
    patches = 0
    for item in items:
        if pending and patches + len(item[0]) > PATCHES_PER_BATCH:
            yield _join(pending)
            pending, patches = [], 0
        pending.append(item)
        patches += len(item[0])
    if pending:
        yield _join(pending)


def _join(items: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    return torch.cat([pixels for pixels, _ in items]), torch.cat([grid for _, grid in items])
