"""The methods of `Encoder` that return maps of hidden states."""

import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from functools import partial
from typing import Any, Literal, Unpack, cast

import torch
from torch import Tensor
from tqdm import tqdm  # type: ignore[import-untyped]

from qwenvit.busy_clock import BusyClock
from qwenvit.config.vision_config import VisionConfig
from qwenvit.features.maps import Cells, ItemFeatures, MapRequest
from qwenvit.graphs.graphed_tower import graphs_of
from qwenvit.input_stream import ImageStream, VideoStream
from qwenvit.pipeline import BatchOutput, OnError, RunTower, check_on_error, items_of
from qwenvit.plan.grid_plan import GridPlan
from qwenvit.plan.inputs import CheckedGrid, WritePixels, check_grid, check_pixel_values
from qwenvit.plan.reading_order import reading_order
from qwenvit.preprocess.batching import PATCHES_PER_BATCH, PATCHES_PER_VIDEO_BATCH
from qwenvit.preprocess.decode import Channels, ImageInput
from qwenvit.preprocess.image_processor import ImageProcessor
from qwenvit.preprocess.jpeg import Decoder
from qwenvit.preprocess.options import ImageOptions
from qwenvit.preprocess.prefetch import Prefetched
from qwenvit.preprocess.prepared import Prepared
from qwenvit.preprocess.video_processor import VideoProcessor
from qwenvit.towers.choose import Tower
from qwenvit.towers.hidden_states import ordered_hidden_states


class DenseFeatures(ABC):
    """What an encoder inherits: maps of the hidden states of chosen layers, in reading order."""

    tower: Tower
    config: VisionConfig
    image_processor: ImageProcessor
    video_processor: VideoProcessor

    @property
    @abstractmethod
    def device(self) -> torch.device:
        """The device of the tower's weights."""

    @property
    @abstractmethod
    def dtype(self) -> torch.dtype:
        """The dtype of the tower's weights and activations."""

    @abstractmethod
    def _run_pipeline(
        self,
        run: RunTower,
        widths: Sequence[int],
        prefetched: Generator[Prefetched[Prepared]],
        on_error: OnError | Literal["keep"],
        max_patches: int,
        progress_bar: Callable[[], tqdm] | None = None,
        clock: BusyClock | None = None,
    ) -> Generator[BatchOutput]: ...

    def features(
        self,
        images: ImageInput | Iterable[ImageInput],
        layers: Iterable[int] = (-1,),
        *,
        what: Cells = "patches",
        norm: bool = False,
        num_workers: int | None = None,
        on_error: OnError = "raise",
        progress: bool = False,
        decode: Decoder = "pillow",
        **options: Unpack[ImageOptions],
    ) -> list[ItemFeatures]:
        """Return maps of hidden states of images, which may differ in size.

        The tower stops after the deepest layer asked for, and runs no merger. Maps take far more memory than tokens:
        `iter_features` yields those of one image after another.

        Args:
            images: one image or several, as in `encode`.
            layers: which hidden states, counted as in transformers' `hidden_states`: 0 is the first block's input (the
                patch embedding with positions), k the output of the k-th block; -1 is the last block's output.
            what: what a cell of a map is: `"patches"`, or `"tokens"` for the mean of each merged token's patches,
                added in float32.
            norm: apply the final merger's norm to each patch first, as the tower itself does after the last block.
                Without it, a few channels may be far larger than the rest.
            num_workers: threads that decode, as in `encode`.
            on_error: what an image that cannot be used does: `"raise"` its error, or `"skip"` it with a warning.
            progress: show a progress bar; it moves when a batch is done.
            decode: what decodes JPEG files, as in `encode`.
            options: min_pixels, max_pixels, max_tokens, size, resize, do_rescale, channels; see `ImageOptions`.

        Returns:
            One entry per image in input order, None for a skipped image, without gradients (`features_of_pixels` has
            them). Every bit depends on the image alone where that is so in `encode`.

        Raises:
            TypeError: layers that are no integers, an unknown option, or an image of a type or dtype that is not
                supported.
            ValueError: layers that the tower does not have, an impossible argument or option, an image that cannot be
                used, or a tower with hooks in CUDA graphs.
            OSError: a file that cannot be read.
            OverflowError: the features exceed the range of float16.
        """
        request = MapRequest.check(layers, what, norm, self.config)
        batches = self._feature_batches(request, images, num_workers, on_error, progress, decode, options)
        return [item for batch in batches for item in batch]

    def iter_features(
        self,
        images: Iterable[ImageInput],
        layers: Iterable[int] = (-1,),
        *,
        what: Cells = "patches",
        norm: bool = False,
        num_workers: int | None = None,
        on_error: OnError = "raise",
        progress: bool = False,
        decode: Decoder = "pillow",
        **options: Unpack[ImageOptions],
    ) -> Iterator[ItemFeatures]:
        """Yield the maps of each image in order, as they come; None for a skipped image.

        `images` may be a generator of any length, as in `iter_encode`. The arguments are those of `features`. What it
        raises is raised in its turn, after the maps of all images before.
        """
        request = MapRequest.check(layers, what, norm, self.config)
        return items_of(self._feature_batches(request, images, num_workers, on_error, progress, decode, options))

    def features_of_video(
        self,
        frames: Iterable[ImageInput] | str | os.PathLike[str],
        layers: Iterable[int] = (-1,),
        *,
        what: Cells = "patches",
        norm: bool = False,
        fps: float | None = None,
        num_frames: int | None = None,
        min_pixels: int | None = None,
        max_pixels: int | None = None,
        size: Mapping[str, int] | None = None,
        channels: Channels = None,
        cap_pixels_per_frame: bool | None = None,
        num_workers: int | None = None,
    ) -> ItemFeatures:
        """Return maps `[t, h, w, hidden_size]` of the hidden states of one video, with one t for every two frames.

        Args:
            frames: frames, or a video file, as in `encode_video`.
            layers: which hidden states, as in `features`.
            what: what a cell of a map is, as in `features`.
            norm: apply the final merger's norm to each patch first, as in `features`.
            fps: frames per second to take of a video file, as in `encode_video`.
            num_frames: frames to take of a video file in all, as in `encode_video`.
            min_pixels: lower bound of the area, as in `encode_video`.
            max_pixels: upper bound of the area, as in `encode_video`.
            size: both bounds as Hugging Face writes them, as in `encode_video`.
            channels: the axis of an array's channels, as in `encode_video`.
            cap_pixels_per_frame: transformers' argument of that name, as in `encode_video`.
            num_workers: threads that open frames, as in `encode`.

        Raises:
            TypeError: layers that are no integers, or frames of a type or dtype that is not supported.
            ValueError: layers that the tower does not have, frames that cannot be used, or impossible options.
            ImportError: a video file, and PyAV is not installed.
            OSError: a file that cannot be read.
            OverflowError: the features exceed the range of float16.
        """
        request = MapRequest.check(layers, what, norm, self.config)
        bounds: dict[str, Any] = {"min_pixels": min_pixels, "max_pixels": max_pixels, "size": size}
        sampling: dict[str, Any] = {"fps": fps, "num_frames": num_frames, "frame_times": None}
        options = bounds | sampling | {"channels": channels, "cap_pixels_per_frame": cap_pixels_per_frame}
        video = VideoStream.open(frames, self.video_processor, self.device, **options, num_workers=num_workers)
        max_patches = PATCHES_PER_VIDEO_BATCH if self.device.type == "cuda" else PATCHES_PER_BATCH
        pieces = list(self._map_batches(request, video.prefetched, "raise", max_patches))
        of_layers = zip(*(piece.tensors for piece in pieces), strict=True)
        cells = [parts[0] if len(parts) == 1 else torch.cat(parts) for parts in of_layers]
        return request.items(cells, [video.grid], self.config, is_video=True)[0]

    def features_of_pixels(
        self,
        pixel_values: Tensor,
        grid_thw: Tensor,
        layers: Iterable[int] = (-1,),
        *,
        what: Cells = "patches",
        norm: bool = False,
    ) -> list[ItemFeatures]:
        """Return maps of hidden states, from the tensors that a Hugging Face processor returns.

        Gradients flow through the reference tower if its parameters or `pixel_values` require them.

        Args:
            pixel_values: `[patches, C·T·P·P]` in any floating dtype (`pixel_values` or `pixel_values_videos`).
            grid_thw: `[items, 3]` integers (`image_grid_thw` or `video_grid_thw`).
            layers: which hidden states, as in `features`.
            what: what a cell of a map is, as in `features`.
            norm: apply the final merger's norm to each patch first, as in `features`.

        Returns:
            One entry per item. Items of several frame groups are videos, with maps `[t, h, w, hidden_size]`; all
            others are images.

        Raises:
            TypeError: `pixel_values` is not a floating tensor, or layers are no integers.
            ValueError: shapes that do not fit the tower or each other, layers that it does not have, an unknown
                `what`; gradients requested of the fast tower.
        """
        request = MapRequest.check(layers, what, norm, self.config)
        grid = check_grid(grid_thw, self.config.spatial_merge_size)
        check_pixel_values(pixel_values, grid, self.config)
        return request.items(self._cells(request, pixel_values, grid), grid.tensor.tolist(), self.config)

    def _feature_batches(
        self,
        request: MapRequest,
        images: ImageInput | Iterable[ImageInput],
        num_workers: int | None,
        on_error: OnError,
        progress: bool,
        decode: Decoder,
        options: ImageOptions,
    ) -> Generator[list[ItemFeatures]]:
        """Check the arguments of `features`, and return an iterator of the maps of each batch."""
        check_on_error(on_error)
        stream = ImageStream.open(images, self.image_processor, self.device, num_workers, decode, options)
        bar = partial(tqdm, total=stream.total, unit="image") if progress else None
        outputs = self._map_batches(request, stream.prefetched, on_error, PATCHES_PER_BATCH, bar)

        def batches() -> Generator[list[ItemFeatures]]:
            with closing(outputs):
                for output in outputs:
                    items = request.items(output.tensors, output.grid.tolist(), self.config)
                    for position in output.skipped:
                        items.insert(position, cast(ItemFeatures, None))  # only callers who ask for it get None
                    yield items

        return batches()

    def _map_batches(
        self,
        request: MapRequest,
        prefetched: Generator[Prefetched[Prepared]],
        on_error: OnError,
        max_patches: int,
        progress_bar: Callable[[], tqdm] | None = None,
    ) -> Generator[BatchOutput]:
        """Yield the cells of the maps of prepared images, batch by batch."""
        widths = [self.config.hidden_size] * len(request.computed)
        return self._run_pipeline(
            partial(self._cells, request), widths, prefetched, on_error, max_patches, progress_bar
        )

    def _cells(self, request: MapRequest, pixel_values: Tensor | WritePixels, grid: CheckedGrid) -> list[Tensor]:
        """Return the cells of the maps of a batch, `[cells, hidden_size]` for each of the layers, in reading order."""
        if graphs := graphs_of(self.tower):
            states = graphs.hidden_states(pixel_values, grid, request.computed, request.by_token)
            return request.cells(states, self.tower)
        if not isinstance(pixel_values, Tensor):
            write = pixel_values
            pixel_values = torch.empty(grid.patches, self.config.patch_dim, device=self.device, dtype=self.dtype)
            write(pixel_values)
        plan = GridPlan.build(grid, self.config, self.device)
        order = reading_order(grid.tensor, self.config, request.by_token).to(self.device)
        pixel_values = pixel_values.to(self.device)
        states = ordered_hidden_states(self.tower, pixel_values, plan, request.computed, order)
        return request.cells(states, self.tower)
