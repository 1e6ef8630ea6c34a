"""The encoder: turns images, videos or pixel values into embeddings."""

import os
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import closing, nullcontext
from functools import partial
from pathlib import Path
from typing import Any, Literal, Unpack

import torch
from torch import Tensor
from tqdm import tqdm  # type: ignore[import-untyped]

from qwenvit.arguments import Impl, check_device, check_dtype
from qwenvit.busy_clock import BusyClock
from qwenvit.features.encoder_methods import DenseFeatures
from qwenvit.features.maps import check_layers
from qwenvit.graphs.graphed_tower import graphs_of
from qwenvit.input_stream import ImageStream, VideoStream
from qwenvit.outputs import Embeddings, ItemEmbeddings, TowerOutput
from qwenvit.pipeline import BatchOutput, OnError, RunTower, check_on_error, handle_errors, items_of, run_batches
from qwenvit.plan.grid_plan import GridPlan
from qwenvit.plan.inputs import CheckedGrid, WritePixels, check_grid, check_pixel_values
from qwenvit.preprocess.batching import PATCHES_PER_BATCH, PATCHES_PER_VIDEO_BATCH
from qwenvit.preprocess.decode import Channels, ImageInput
from qwenvit.preprocess.from_checkpoint import read_processors
from qwenvit.preprocess.image_processor import ImageProcessor
from qwenvit.preprocess.jpeg import Decoder
from qwenvit.preprocess.options import ImageOptions
from qwenvit.preprocess.prefetch import Prefetched
from qwenvit.preprocess.prepared import Prepared
from qwenvit.preprocess.video_processor import VideoProcessor
from qwenvit.towers.checkpoint import ConfigSource, save_tower
from qwenvit.towers.choose import Tower
from qwenvit.towers.fast import FastTower
from qwenvit.towers.pretrained import load_pretrained


class Encoder(DenseFeatures):
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
        subfolder: str | None = None,
        config: ConfigSource | None = None,
        family: str | None = None,
        prefix: str | None = None,
        adapter: str | os.PathLike[str] | Literal[False] | None = None,
        revision: str | None = None,
        token: str | bool | None = None,
        cache_dir: str | os.PathLike[str] | None = None,
        local_files_only: bool = False,
        force_download: bool = False,
    ) -> "Encoder":
        """Load the vision tower of a checkpoint, and nothing else of the checkpoint.

        Args:
            model: a local directory or `.safetensors` file, a Hub repository (`"Qwen/Qwen2.5-VL-7B-Instruct"`), a
                short name of `qwenvit.registry.PUBLISHED`, or `"demo"` for a tiny tower with random weights. The
                directory may be one of huggingface_hub's cache (`models--organisation--name`, or a snapshot in it).
            device: default: the GPU if there is one, else the CPU.
            dtype: `"float32"`, `"bfloat16"`, `"float16"`, the torch dtype, or `"auto"` for the checkpoint's own.
                Default: bfloat16 on a GPU, float32 on the CPU.
            impl: `"triton"` is the fast tower, for inference on a GPU; `"reference"` is the plain torch tower, which is
                differentiable. `"auto"` takes the fast tower where it can run; an explicit choice never falls back.
            subfolder: the folder inside the model's that has the checkpoint, such as `"text_encoder"`.
            config: what to read instead of the checkpoint's `config.json`: another file, its folder, its content, or a
                `VisionConfig`. Preprocessors' configs beside that file are read if the checkpoint has none.
            family: the tower's family, such as `"qwen2_5_vl"`. Default: that of `model_type`, or if this is unknown,
                that of the tensors' names.
            prefix: what the names of the tower's tensors start with, in a checkpoint with several towers.
            adapter: a LoRA adapter to merge: folder, file or Hub repository. Default: the one beside the checkpoint or
                in it, if there is one. False: none (biases trained in place of the base's stay).
            revision: Hub branch, tag or commit. A branch stays at the commit of its first download until
                `force_download=True`.
            token: Hub token; default: the one that huggingface_hub finds.
            cache_dir: Hub cache; default: huggingface_hub's.
            local_files_only: do not use the network.
            force_download: download the revision's current commit.

        Raises:
            ValueError: unknown model, device, dtype or impl; an explicit impl that cannot run here; a checkpoint with
                missing, unexpected or wrongly shaped vision tensors (the message counts them and names 12 of a kind).
            TypeError: a config or an adapter of an unsupported type.
            OSError: the Hub or the files cannot be read.
        """
        device = check_device(device)
        checkpoint = {"subfolder": subfolder, "config": config, "family": family, "prefix": prefix, "adapter": adapter}
        hub = {"revision": revision, "token": token, "cache_dir": cache_dir, "local_files_only": local_files_only}
        options: dict[str, Any] = checkpoint | hub | {"force_download": force_download}
        tower, directory = load_pretrained(model, impl=impl, device=device, dtype=check_dtype(dtype, device), **options)
        return cls(tower) if directory is None else cls(tower, *read_processors(directory, tower.config.family))

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
        *,
        num_workers: int | None = None,
        on_error: OnError = "raise",
        progress: bool = False,
        decode: Decoder = "pillow",
        keep_patches: bool = False,
        **options: Unpack[ImageOptions],
    ) -> Embeddings:
        """Embed images. Images are decoded in threads while the tower is busy with those before them.

        A 12-megapixel photograph has 15,301 tokens of Qwen2.5-VL at the default bounds: `max_tokens` sets another.

        Args:
            images: one image or several: PIL images, uint8 arrays or tensors, paths, or encoded bytes.
            num_workers: threads that decode; 0 decodes in this thread. None: 4, or fewer on a smaller machine. The
                result is the same.
            on_error: what an image that cannot be used does: `"raise"` its error, or `"skip"` it with a warning;
                `errors` of the result has its error too.
            progress: show a progress bar; it moves when a batch is done.
            decode: what decodes JPEG files: `"pillow"`, or `"nvjpeg"` on a GPU through torchvision, which is faster and
                differs by tens of levels where colours change sharply. Pillow decodes what nvJPEG does not, with a
                warning.
            keep_patches: keep the last block's states too, for `Embeddings.pooled("patches")`. They take more memory
                than the tokens.
            options: min_pixels, max_pixels, max_tokens, size, resize, do_rescale, channels; see `ImageOptions`.

        Returns:
            One entry per image in input order, None for a skipped image; on the tower's device and in its dtype. Images
            are encoded in batches of at most `PATCHES_PER_BATCH` patches, or of one larger image. None has gradients.

        Raises:
            TypeError: an unknown option, or an image of a type or dtype that is not supported.
            ValueError: an impossible argument or option, or an image that cannot be used.
            OSError: a file that cannot be read.
            OverflowError: the features exceed the range of float16.
        """
        batches = self._encode_batches(images, num_workers, on_error, progress, decode, options, keep_patches)
        return Embeddings.concatenate(list(batches))

    def iter_encode(
        self,
        images: Iterable[ImageInput],
        *,
        num_workers: int | None = None,
        on_error: OnError = "raise",
        progress: bool = False,
        decode: Decoder = "pillow",
        **options: Unpack[ImageOptions],
    ) -> Iterator[ItemEmbeddings]:
        """Embed more images than memory holds: yield the embeddings of each in order, as they come.

        `images` may be a generator of any length; it is drawn in the caller's thread, some images ahead. Arrays,
        tensors, byte arrays and PIL images of a generator are copied, so that it may reuse or close them. The iterator
        may be left at any time.

        The fast tower in 16 bits on Hopper does not make the images of a slow generator, such as a camera, wait for a
        full batch of 32,768 patches. Elsewhere an image's last bits may depend on its batch, and batches must not
        depend on time.

        The arguments are those of `encode`. What it raises is raised in its turn, after the embeddings of all images
        before.

        Yields:
            The embeddings of each image, None for a skipped one. The tensors are views of their batch: to keep few of
            many, copy them.
        """
        return items_of(self._encode_batches(images, num_workers, on_error, progress, decode, options))

    def _encode_batches(
        self,
        images: ImageInput | Iterable[ImageInput],
        num_workers: int | None,
        on_error: OnError,
        progress: bool,
        decode: Decoder,
        options: ImageOptions,
        keep_patches: bool = False,
    ) -> Generator[Embeddings]:
        """Check the arguments of `encode`, and return an iterator of the embeddings of each batch."""
        check_on_error(on_error)
        stream = ImageStream.open(images, self.image_processor, self.device, num_workers, decode, options)
        bar = partial(tqdm, total=stream.total, unit="image") if progress else None
        return self.run_batches(stream.prefetched, on_error, PATCHES_PER_BATCH, bar, keep_patches=keep_patches)

    def run_batches(
        self,
        prefetched: Generator[Prefetched[Prepared]],
        on_error: OnError | Literal["keep"],
        max_patches: int,
        progress_bar: Callable[[], tqdm] | None = None,
        *,
        keep_patches: bool = False,
        clock: BusyClock | None = None,
    ) -> Generator[Embeddings]:
        """Yield the embeddings of prepared images, batch by batch; see `qwenvit.pipeline.run_batches`."""

        def run(pixel_values: Tensor | WritePixels, grid: CheckedGrid) -> list[Tensor]:
            output = self._run(pixel_values, grid)
            tokens = [output.pooler_output, *output.deepstack_features]
            return [*tokens, output.last_hidden_state] if keep_patches else tokens

        levels = 1 + len(self.config.deepstack_visual_indexes)
        widths = [self.config.out_hidden_size] * levels + [self.config.hidden_size] * keep_patches
        outputs = self._run_pipeline(run, widths, prefetched, on_error, max_patches, progress_bar, clock)
        with closing(outputs):
            for batch in outputs:
                packed, *deepstack = batch.tensors[:levels]
                states = batch.tensors[levels] if keep_patches else None
                skipped: dict[str, Any] = {"skipped": batch.skipped, "errors": batch.errors}
                yield Embeddings(packed, batch.grid, deepstack, self.config, **skipped, last_hidden_state=states)

    def _run_pipeline(
        self,
        run: RunTower,
        widths: Sequence[int],
        prefetched: Generator[Prefetched[Prepared]],
        on_error: OnError | Literal["keep"],
        max_patches: int,
        progress_bar: Callable[[], tqdm] | None = None,
        clock: BusyClock | None = None,
    ) -> Generator[BatchOutput]:
        """Yield what `run` computes of prepared images, tensors of these widths, batch by batch."""
        empty = [torch.empty(0, width, device=self.device, dtype=self.dtype) for width in widths]
        tower = (self.device, self.config.spatial_merge_size)
        with progress_bar() if progress_bar else nullcontext() as bar:
            try:  # not `closing`: an image's error would refer to itself by the frame of its `__exit__`
                images = handle_errors(prefetched, on_error)
                for batch in run_batches(images, run, *tower, empty, max_patches, self.is_batch_invariant(), clock):
                    if bar is not None:
                        bar.update(len(batch))
                    yield batch
            finally:
                prefetched.close()

    def encode_video(
        self,
        frames: Iterable[ImageInput] | str | os.PathLike[str],
        *,
        fps: float | None = None,
        num_frames: int | None = None,
        frame_times: Sequence[float] | None = None,
        min_pixels: int | None = None,
        max_pixels: int | None = None,
        size: Mapping[str, int] | None = None,
        channels: Channels = None,
        cap_pixels_per_frame: bool | None = None,
        num_workers: int | None = None,
        keep_patches: bool = False,
    ) -> Embeddings:
        """Embed one video.

        Args:
            frames: a list of frames (anything `encode` takes as an image), or one uint8 array or tensor
                `[frames, H, W, C]`, of which all are encoded; or a video file, whose frames are sampled. Video files
                need PyAV: `pip install "av>=15"`.
            fps: frames per second to take of a video file.
            num_frames: frames to take of a video file in all. Where neither is passed, the checkpoint's own settings
                sample the frames; `sample_frames` does the same for frames that you decode.
            frame_times: seconds from the start of the video for each frame of a list or array, ascending, as some
                language models need them (`ItemEmbeddings.times`). Those of a video file are known.
            min_pixels: lower bound of the area of each frame (Qwen2 and 2.5) or of all frames together (Qwen3 and
                later). None: the video processor's own.
            max_pixels: upper bound of that area. None: the video processor's own.
            size: both bounds as Hugging Face writes them, `{"shortest_edge": min_pixels, "longest_edge": max_pixels}`.
            channels: the axis of an array's channels, `"first"` or `"last"`. None: inferred from its shape.
            cap_pixels_per_frame: transformers' argument of that name. None: the video processor's own.
            num_workers: threads that open frames, as in `encode`.
            keep_patches: keep the last block's states too, as in `encode`.

        Returns:
            One entry; its `spatial()` is `[t, h, w, out_hidden_size]`, with one t for every two frames. Groups of
            frames do not see one another in the tower: a long video is encoded in several batches.

        Raises:
            TypeError: frames of a type or dtype that is not supported.
            ValueError: frames that cannot be used, or impossible options.
            ImportError: a video file, and PyAV is not installed.
            OSError: a file that cannot be read.
            OverflowError: the features exceed the range of float16.
        """
        bounds: dict[str, Any] = {"min_pixels": min_pixels, "max_pixels": max_pixels, "size": size}
        sampling: dict[str, Any] = {"fps": fps, "num_frames": num_frames, "frame_times": frame_times}
        options = bounds | sampling | {"channels": channels, "cap_pixels_per_frame": cap_pixels_per_frame}
        video = VideoStream.open(frames, self.video_processor, self.device, **options, num_workers=num_workers)
        max_patches = PATCHES_PER_VIDEO_BATCH if self.device.type == "cuda" else PATCHES_PER_BATCH
        pieces = self.run_batches(video.prefetched, "raise", max_patches, keep_patches=keep_patches)
        parts = Embeddings.concatenate(list(pieces))
        whole = (parts.packed, torch.tensor([video.grid], device="cpu"), parts.deepstack, self.config)
        return Embeddings(*whole, video=True, times=video.times, last_hidden_state=parts.last_hidden_state)

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

    def is_batch_invariant(self) -> bool:
        """Return whether an item's bits are known to be the same in every batch: in 16 bits, on Hopper (TUNING.md)."""
        fast = isinstance(self.tower, FastTower) and self.tower.impl != "reference" and self.dtype != torch.float32
        return fast and self.device.type == "cuda" and torch.cuda.get_device_capability(self.device)[0] == 9

    def _run(self, pixel_values: Tensor | WritePixels, grid: CheckedGrid) -> TowerOutput:
        if graphs := graphs_of(self.tower):
            return graphs(pixel_values, grid)
        if not isinstance(pixel_values, Tensor):
            write = pixel_values
            pixel_values = torch.empty(grid.patches, self.config.patch_dim, device=self.device, dtype=self.dtype)
            write(pixel_values)
        return self.tower(pixel_values.to(self.device), GridPlan.build(grid, self.config, self.device))

    def warmup(self, max_tokens: int, *, layers: Iterable[int] | None = None) -> int:
        """Compile kernels and capture the CUDA graphs of single images before they are needed.

        Images of more than 512 patches a side, or 25 times as long as wide, may need other graphs.

        Args:
            max_tokens: merged tokens of the largest image to prepare for.
            layers: prepare for `features` of these layers, which have graphs of their own. None: for `encode`.

        Returns:
            The number of graphs for images up to that size; 0 for the reference tower, which uses none.

        Raises:
            TypeError: layers that are no integers.
            ValueError: not a positive number, or so large that batches run without graphs; layers that do not exist.
        """
        if isinstance(max_tokens, bool) or not isinstance(max_tokens, int) or max_tokens < 1:
            raise ValueError(f"max_tokens: expected a positive number of tokens, got {max_tokens!r}")
        computed = () if layers is None else tuple(sorted(set(check_layers(layers, self.config.depth))))
        graphs = graphs_of(self.tower)
        return graphs.warm_up(max_tokens * self.config.merge_unit, computed) if graphs else 0

    def save_pretrained(self, directory: str | os.PathLike[str]) -> None:
        """Write the tower alone: `model.safetensors`, `config.json` and the processors' configs.

        `Encoder.from_pretrained` and transformers' own tower class can load the directory.

        Raises:
            ValueError: the directory has a whole checkpoint, which this would overwrite or loading would prefer.
        """
        image, video = self.image_processor.to_hf(), self.video_processor.to_hf()
        processors = {"preprocessor_config.json": image, "video_preprocessor_config.json": video}
        save_tower(Path(directory).expanduser(), self.tower, self.dtype, processors)

    def __repr__(self) -> str:
        return f"Encoder({self.config.family}, {self.config.depth} blocks, {self.dtype}, {self.device})"
