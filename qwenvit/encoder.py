"""The encoder: turns images, videos or pixel values into embeddings."""

import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Unpack

import torch
from torch import Tensor

from qwenvit.arguments import Impl, check_device, check_dtype
from qwenvit.graphs.graphed_tower import graphs_of
from qwenvit.outputs import Embeddings, TowerOutput
from qwenvit.plan.grid_plan import GridPlan
from qwenvit.plan.inputs import CheckedGrid, check_grid, check_pixel_values
from qwenvit.preprocess.batching import PATCHES_PER_BATCH, batches
from qwenvit.preprocess.decode import Channels, ImageInput
from qwenvit.preprocess.from_checkpoint import read_processors
from qwenvit.preprocess.image_processor import ImageProcessor
from qwenvit.preprocess.options import ImageOptions
from qwenvit.preprocess.video_processor import VideoProcessor
from qwenvit.towers import demo
from qwenvit.towers.checkpoint import directory_of, load_tower, locate, save_tower
from qwenvit.towers.choose import Tower


class Encoder:
    """A loaded vision tower with the preprocessing that belongs to it.

    Attributes:
        tower: the tower, an `nn.Module` in eval mode whose parameters require no gradients; the reference tower's may.
        config: the tower's config.
        image_processor: turns images into pixel values.
        video_processor: turns frames into pixel values.
    """

    def __init__(
        self,
        tower: Tower,
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
        """Load the vision tower of a checkpoint, and nothing else of the checkpoint.

        Args:
            model: a local directory or `.safetensors` file, a Hub repository (`"Qwen/Qwen2.5-VL-7B-Instruct"`), a
                short name of `qwenvit.registry.PUBLISHED`, or `"demo"` for a tiny tower with random weights.
            device: default: the GPU if there is one, else the CPU.
            dtype: `"float32"`, `"bfloat16"`, `"float16"`, the torch dtype, or `"auto"` for the checkpoint's own.
                Default: bfloat16 on a GPU, float32 on the CPU.
            impl: `"triton"` is the fast tower, for inference on a GPU; `"reference"` is the plain torch tower, which is
                differentiable. `"auto"` takes the fast tower where it can run; an explicit choice never falls back.
            revision: Hub branch, tag or commit. A branch stays at the commit of its first download until
                `force_download=True`.
            token: Hub token; default: the one that huggingface_hub finds.
            cache_dir: Hub cache; default: huggingface_hub's.
            local_files_only: do not use the network.
            force_download: download the revision's current commit.

        Raises:
            ValueError: unknown model, device, dtype or impl; an explicit impl that cannot run here; a checkpoint with
                missing, unexpected or wrongly shaped vision tensors (the message lists them all).
            OSError: the Hub or the files cannot be read.
        """
        device = check_device(device)
        tower_dtype = check_dtype(dtype, device)
        if os.fspath(model) == demo.NAME:
            return cls(demo.build_tower(impl, device, tower_dtype))
        source = locate(
            model,
            revision=revision,
            token=token,
            cache_dir=cache_dir,
            local_files_only=local_files_only,
            force_download=force_download,
        )
        tower = load_tower(source, impl=impl, device=device, dtype=tower_dtype)
        return cls(tower, *read_processors(directory_of(source), tower.config.family))

    @property
    def device(self) -> torch.device:
        """The device of the tower's weights."""
        return next(self.tower.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the tower's weights and activations."""
        return next(self.tower.parameters()).dtype

    def encode(
        self,
        images: ImageInput | Iterable[ImageInput],
        **options: Unpack[ImageOptions],
    ) -> Embeddings:
        """Embed images.

        Args:
            images: one image or several: PIL images, uint8 arrays or tensors, paths, or encoded bytes.
            options: min_pixels, max_pixels, size, resize, do_rescale, channels; see `ImageOptions`.

        Returns:
            One entry per image in input order, on the tower's device and in its dtype. Images are read and encoded in
            batches of at most `PATCHES_PER_BATCH` patches, or of one larger image.

        Raises:
            TypeError: an unknown option, or an image of a type or dtype that is not supported.
            ValueError: an impossible option, or an image that cannot be used.
            OSError: a file that cannot be read.
            OverflowError: the features exceed the range of float16.
        """
        single_frame = self.tower.repeats_single_frames
        return self._embed(self.image_processor.each(images, single_frame=single_frame, **options))

    def encode_video(
        self,
        frames: Iterable[ImageInput],
        *,
        min_pixels: int | None = None,
        max_pixels: int | None = None,
        size: Mapping[str, int] | None = None,
        channels: Channels = None,
        cap_pixels_per_frame: bool | None = None,
    ) -> Embeddings:
        """Embed one video.

        Args:
            frames: a list of frames (anything `encode` takes as an image), or one uint8 array or tensor
                `[frames, H, W, C]`. All frames are encoded: choose the frames of a long clip with `sample_frames`.
            min_pixels: lower bound of the area of each frame (Qwen2 and 2.5) or of all frames together (Qwen3 and
                later). None: the video processor's own.
            max_pixels: upper bound of that area. None: the video processor's own.
            size: both bounds as Hugging Face writes them, `{"shortest_edge": min_pixels, "longest_edge": max_pixels}`.
            channels: the axis of an array's channels, `"first"` or `"last"`. None: inferred from its shape.
            cap_pixels_per_frame: transformers' argument of that name. None: the video processor's own.

        Returns:
            One entry; its `spatial()` is `[t, h, w, out_hidden_size]`, with one t for every two frames. The whole video
            is one forward pass.

        Raises:
            TypeError: frames of a type or dtype that is not supported.
            ValueError: frames that cannot be used, or impossible options.
            OSError: a file that cannot be read.
            OverflowError: the features exceed the range of float16.
        """
        processor = self.video_processor.with_bounds(min_pixels, max_pixels, size)
        pixels = processor(frames, channels=channels, cap_pixels_per_frame=cap_pixels_per_frame)
        return self._embed([pixels], video=True)

    @torch.no_grad()
    def _embed(self, items: Iterable[tuple[Tensor, Tensor]], video: bool = False) -> Embeddings:
        """Embed the `(pixel_values, grid_thw)` of images or videos, which our own processors made."""
        grids, layers = [], []  # for each batch: its grids; its tokens, then its DeepStack features
        for pixel_values, grid_thw in batches(items, PATCHES_PER_BATCH):
            output = self._run(pixel_values, check_grid(grid_thw, self.config.spatial_merge_size))
            grids.append(grid_thw)
            layers.append([output.pooler_output, *output.deepstack_features])
        packed, *deepstack = (torch.cat(layer) for layer in zip(*layers, strict=True))
        if self.dtype == torch.float16 and not all(layer.isfinite().all() for layer in (packed, *deepstack)):
            raise OverflowError("the features exceed the range of float16 (65504): use bfloat16 or float32")
        return Embeddings(packed, torch.cat(grids), deepstack, self.config.spatial_merge_size, video=video)

    def __call__(self, pixel_values: Tensor, grid_thw: Tensor) -> TowerOutput:
        """Run the tower on the tensors that a Hugging Face processor returns.

        Args:
            pixel_values: `[patches, C·T·P·P]` in any floating dtype (`pixel_values` or `pixel_values_videos`).
            grid_thw: `[items, 3]` integers (`image_grid_thw` or `video_grid_thw`).

        Returns:
            The output of transformers' tower: `last_hidden_state` in the tower's own order, `pooler_output` in reading
            order, `deepstack_features`. Gradients flow through the reference tower if its parameters or `pixel_values`
            require them.

        Raises:
            TypeError: `pixel_values` is not a floating tensor.
            ValueError: shapes that do not fit the tower or each other; gradients requested of the fast tower.
        """
        grid = check_grid(grid_thw, self.config.spatial_merge_size)
        check_pixel_values(pixel_values, grid, self.config)
        return self._run(pixel_values, grid)

    def _run(self, pixel_values: Tensor, grid: CheckedGrid) -> TowerOutput:
        if graphs := graphs_of(self.tower):
            return graphs(pixel_values, grid)
        return self.tower(pixel_values.to(self.device), GridPlan.build(grid, self.config, self.device))

    def warmup(self, max_tokens: int) -> int:
        """Compile kernels and capture the CUDA graphs of single images before they are needed.

        Images of more than 512 patches a side, or 25 times as long as wide, may need other graphs.

        Args:
            max_tokens: merged tokens of the largest image to prepare for.

        Returns:
            The number of graphs for images up to that size; 0 for the reference tower, which uses none.

        Raises:
            ValueError: not a positive number, or so large that batches run without graphs.
        """
        if isinstance(max_tokens, bool) or not isinstance(max_tokens, int) or max_tokens < 1:
            raise ValueError(f"max_tokens: expected a positive number of tokens, got {max_tokens!r}")
        graphs = graphs_of(self.tower)
        return graphs.warm_up(max_tokens * self.config.merge_unit) if graphs else 0

    def save_pretrained(self, directory: str | os.PathLike[str]) -> None:
        """Write the tower alone: `model.safetensors`, `config.json` and the processors' configs.

        `Encoder.from_pretrained` and transformers' own tower class can load the directory.

        Raises:
            ValueError: the directory has a whole checkpoint, which this would overwrite or loading would prefer.
        """
        image, video = self.image_processor.to_hf(), self.video_processor.to_hf()
        processors = {"preprocessor_config.json": image, "video_preprocessor_config.json": video}
        save_tower(Path(directory), self.tower, self.dtype, processors)

    def __repr__(self) -> str:
        return f"Encoder({self.config.family}, {self.config.depth} blocks, {self.dtype}, {self.device})"
