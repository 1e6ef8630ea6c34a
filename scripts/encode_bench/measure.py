"""The measurements of `bench_encode.py` on one model's towers."""

import itertools
import os
import statistics
import time
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from common.encoders import fresh_encoder
from common.hf_towers import forward
from common.steps import ParityError, raise_on
from common.timing import Call, balanced_orders, synchronize, wall_seconds
from encode_bench.folders import Folder
from encode_bench.parity import layers_of, pixel_failures, same, token_failures, tower_layers
from encode_bench.stages import decode, decode_seconds, sample_by_area, stage_seconds, tower_batches, video_batches
from encode_bench.verdicts import CPU_RIVAL, ENCODE, FEATURES, GPU_RIVAL, HF_RIVAL, LAST_MAP, TOWER, Row
from peers.transformers_processors import build_processor, process
from qwenvit import Encoder
from qwenvit.plan.reading_order import reading_order

ROUNDS, MAX_SECONDS = 3, 10.0
"""Timed rounds of a folder; fewer, where they take longer than MAX_SECONDS together."""
WARM_PASSES = 2
"""Untimed passes before the rounds: a CUDA graph may be captured when its capacity comes the second time."""
LATENCY_CALLS = 20
FEATURE_SIDES = (448, 896)
"""Heights and widths in pixels of the square images whose layers are asked for."""
FRAMES = 64
MANY_IMAGES, FIRST_IMAGES = 5000, 500
"""Images of the generator whose memory is measured, and after how many the measurement begins."""


def median_seconds(
    calls: Mapping[str, Call], rounds: int = ROUNDS, max_seconds: float = MAX_SECONDS
) -> dict[str, float]:
    """Return the median wall seconds of each call. They take turns, in another order each time."""
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    start = time.perf_counter()
    for order in balanced_orders(calls, rounds):
        for name in order:
            seconds[name].append(wall_seconds(calls[name]))
        if time.perf_counter() - start > max_seconds:
            break
    return {name: statistics.median(times) for name, times in seconds.items()}


def run_tower(encoder: Encoder, inputs: Sequence[tuple[Tensor, Tensor]]) -> None:
    """Run the tower on batches of pixel values, one after another, and drop the results."""
    for pixels, grid in inputs:
        encoder(pixels, grid)


class EncodeBench:
    """One model's towers with the same weights.

    Args:
        encoder: qwenvit's.
        hf_tower: transformers'.
    """

    def __init__(self, encoder: Encoder, hf_tower: nn.Module) -> None:
        self.encoder, self.hf_tower = encoder, hf_tower
        self.processor = build_processor(encoder.image_processor.to_hf())

    def fresh(self) -> Encoder:
        """Return an encoder with the same weights and processors, and no CUDA graphs."""
        tower = fresh_encoder(self.encoder.tower).tower
        return Encoder(tower, self.encoder.image_processor, self.encoder.video_processor)

    def folder(self, folder: Folder, paths: Sequence[Path]) -> Row:
        """Time a folder: `encode` of its files, the tower alone, and transformers' processor before either tower.

        Returns:
            Seconds an image: `times` by contender, `cold` of the first pass of an encoder without graphs, and `stages`.

        Raises:
            ParityError: the pixel values or tokens of some of the images differ.
        """
        encoder = self.fresh()
        raise_on(pixel_failures(encoder, self.processor, paths[0]) + token_failures(encoder, paths))
        encoder = self.fresh()
        cold = wall_seconds(lambda: encoder.encode(paths))
        inputs = tower_batches(encoder, paths)
        distinct = {grid.numpy().tobytes(): (pixels, grid) for pixels, grid in inputs}

        encoder.encode(paths)
        run_tower(encoder, [*distinct.values()] * WARM_PASSES)
        seconds = median_seconds({ENCODE: lambda: encoder.encode(paths), TOWER: lambda: run_tower(encoder, inputs)})
        times = {name: value / len(paths) for name, value in seconds.items()}
        patches = sum(len(pixels) for pixels, _ in inputs)
        times |= self.rivals(encoder, sample_by_area(paths, folder.rival_images))
        row: Row = {"name": folder.name, "images": len(paths), "patches": patches / len(paths)}
        return row | {"times": times, "cold": cold / len(paths), "stages": stage_seconds(encoder, paths)}

    def rivals(self, encoder: Encoder, paths: Sequence[Path]) -> dict[str, float]:
        """Return the seconds an image of transformers' processor, one image after another, before either tower."""

        def before_our_tower(device: torch.device | str) -> None:
            for path in paths:
                pixels, grid = process(self.processor, path, device)
                encoder(pixels.to(encoder.device), grid)

        def before_their_tower() -> None:
            for path in paths:
                pixels, grid = process(self.processor, path, encoder.device)
                forward(self.hf_tower, pixels.to(encoder.dtype), grid)

        calls = {
            GPU_RIVAL: lambda: before_our_tower(encoder.device),
            CPU_RIVAL: lambda: before_our_tower("cpu"),
            HF_RIVAL: before_their_tower,
        }
        for _ in range(WARM_PASSES):
            calls[GPU_RIVAL]()
        process(self.processor, paths[0], "cpu")
        before_their_tower()
        return {name: value / len(paths) for name, value in median_seconds(calls, max_seconds=MAX_SECONDS / 2).items()}

    def one_image(self, path: Path) -> Row:
        """Return the median seconds of `encode` of one file, of decoding it, and of the tower alone."""
        encoder = self.fresh()
        [(pixels, grid)] = tower_batches(encoder, [path])
        calls = {ENCODE: lambda: encoder.encode(path), TOWER: lambda: encoder(pixels, grid)}
        for call in [*calls.values()] * WARM_PASSES:
            call()
        return median_seconds(calls, rounds=LATENCY_CALLS) | {"decode": decode_seconds(path, LATENCY_CALLS)}

    def video(self, paths: Sequence[Path], frames: int = FRAMES) -> Row:
        """Return the median seconds of `encode_video` of decoded frames, and of the tower alone.

        Raises:
            ParityError: `encode_video` and the tower differ for the same pixel values.
        """
        encoder = self.fresh()
        video = np.stack([decode(path) for path in itertools.islice(itertools.cycle(paths), frames)])
        pixels, grid = encoder.video_processor(video, channels="last")
        inputs = video_batches(pixels.to(encoder.device, encoder.dtype), grid)
        if not same(layers_of(encoder.encode_video(video)), tower_layers(encoder, inputs)):
            raise ParityError("encode_video differs from the tower for the same pixel values")
        calls = {ENCODE: lambda: encoder.encode_video(video), TOWER: lambda: run_tower(encoder, inputs)}
        for call in calls.values():
            call()
        return median_seconds(calls) | {"frames": frames, "patches": len(pixels)}

    def features(self, sides: Sequence[int] = FEATURE_SIDES) -> list[Row]:
        """Return the median seconds of four layers' maps of one square image, of the last layer's, and of the tower.

        Maps need no mergers, so the tower alone does more than the last layer's map.

        Raises:
            ParityError: the last layer's map differs from the tower's hidden states for the same pixel values.
        """
        encoder, config = self.fresh(), self.encoder.config
        layers = (config.depth // 4, config.depth // 2, config.depth * 3 // 4, config.depth)
        rows = []
        for side in sides:
            grid = torch.tensor([[1, side // config.patch_size, side // config.patch_size]])
            generator = torch.Generator().manual_seed(0)
            pixels = torch.randn(int(grid.prod()), config.patch_dim, generator=generator)
            pixels = pixels.to(encoder.device, encoder.dtype)
            calls = {
                TOWER: partial(encoder, pixels, grid),
                LAST_MAP: partial(encoder.features_of_pixels, pixels, grid, layers[-1:]),
                FEATURES: partial(encoder.features_of_pixels, pixels, grid, layers),
            }
            order = reading_order(grid, config).to(encoder.device)
            expected = encoder(pixels, grid).last_hidden_state[order]
            (found,) = encoder.features_of_pixels(pixels, grid, layers)
            if not same([found.maps[-1].flatten(0, 1)], [expected]):
                raise ParityError(f"{side}²: the map of the last layer differs from the tower's hidden states")
            for call in [*calls.values()] * WARM_PASSES:
                call()
            rows.append(median_seconds(calls, rounds=LATENCY_CALLS) | {"side": side, "layers": len(layers)})
        return rows

    def memory(self, paths: Sequence[Path], images: int = MANY_IMAGES, first: int = FIRST_IMAGES) -> Row:
        """Return the host memory of this process while a generator's images are encoded and the results dropped.

        Returns:
            `before`: bytes after the first images; `most`: the most bytes after any later image.
        """
        encoder = self.fresh()
        generator = itertools.islice(itertools.cycle(paths), images)
        return memory_while(encoder.iter_encode(generator), first)


def memory_while(results: Any, first: int) -> Row:
    """Exhaust an iterator, and return the resident bytes after its first results and the most after any later one.

    Raises:
        ValueError: the iterator ends before.
    """
    before, most, count = 0, 0, 0
    for count, _ in enumerate(results, 1):
        if count == first:
            before = resident_bytes()
        if count >= first:
            most = max(most, resident_bytes())
    synchronize()
    if count <= first:
        raise ValueError(f"results: expected more than {first}, got {count}")
    return {"images": count, "first": first, "before": before, "most": most}


def resident_bytes() -> int:
    """Return the bytes of this process that are in the host's memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
