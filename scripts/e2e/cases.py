"""What `bench_e2e.py` runs: models, inputs of still images and video, and what figures are held to and put beside."""

import random
from dataclasses import dataclass

import torch
from torch import Tensor

from qwenvit.config.vision_config import VisionConfig
from qwenvit.graphs import device_plan
from qwenvit.graphs.capacity import capacity_for

MODELS = {
    "Qwen2-VL-7B": "qwen2_vl-7b",
    "Qwen2.5-VL-7B": "qwen2_5_vl-7b",
    "Qwen3-VL-4B": "qwen3_vl-4b",
    "Qwen3-VL-8B": "qwen3_vl-8b",
}
"""Names of the registry."""
SIDES = (448, 672, 896, 1344)
SERVED = (94, 124, 156)
"""Rows and columns of patches of the sizes that real serving meets: 8836, 15376 and 24336 patches."""
BATCHES = (1, 8, 32)
MIXED = ((480, 640), (768, 576), (336, 336), (224, 448), (896, 672), (300, 400), (512, 910), (640, 256))
"""Heights and widths of a batch's images in pixels, over and over; rounded to whole merge blocks."""
FRAMES = 16
RANDOM_SIZES = 20


@dataclass(frozen=True)
class Case:
    """One input."""

    name: str
    grid: tuple[tuple[int, int, int], ...]
    """Frame groups, rows and columns of patches of each item."""
    frames: int = 0
    """Of a video, as the camera took them; 0 for images."""

    @property
    def patches(self) -> int:
        return sum(t * h * w for t, h, w in self.grid)

    def grid_thw(self) -> Tensor:
        return torch.tensor(self.grid, device="cpu")


def all_cases(config: VisionConfig) -> list[Case]:
    """In the order they run."""
    cases = [Case(f"{side}²", ((1, side // config.patch_size, side // config.patch_size),)) for side in SIDES]
    cases += [Case(f"{side**2} patches", ((1, side, side),)) for side in SERVED]
    for count in BATCHES:
        grid = tuple((1, *_patches(MIXED[i % len(MIXED)], config)) for i in range(count))
        cases.append(Case(f"batch of {count}", grid))
    side = SIDES[0] // config.patch_size
    pairs = FRAMES // config.temporal_patch_size
    return [*cases, Case(f"{FRAMES} frames, {SIDES[0]}²", ((pairs, side, side),), FRAMES)]


def _patches(size: tuple[int, int], config: VisionConfig) -> tuple[int, ...]:
    block = config.patch_size * config.spatial_merge_size
    return tuple(round(length / block) * config.spatial_merge_size for length in size)


def gate_case(config: VisionConfig) -> Case:
    """Images of awkward sizes and a video: partial windows, one-token items, repeated lengths."""
    merge = config.spatial_merge_size
    grid = ((1, 16, 26), (3, 4, 6), (1, 1, 1), (1, 10, 8), (2, 8, 8), (1, 32, 20))
    return Case("gate", tuple((t, -(-h // merge) * merge, -(-w // merge) * merge) for t, h, w in grid))


def random_sizes(config: VisionConfig) -> list[Case]:
    """Images of random sizes, seeded, none of which fills a graph's capacity."""
    draw, merge, cases = random.Random(0), config.spatial_merge_size, list[Case]()
    while len(cases) < RANDOM_SIZES:
        h, w = (draw.randrange(8, 50) * merge for _ in range(2))
        case = Case(f"{h}×{w}", ((1, h, w),))
        room = capacity_for(device_plan.measure_grids(case.grid_thw(), config), config.merge_unit)
        if room.patches > case.patches:
            cases.append(case)
    return cases


def pixel_values(case: Case, config: VisionConfig, device: torch.device | str, dtype: torch.dtype) -> Tensor:
    """As normalised stills have them, the two frames of a patch alike; a video's frames differ from pair to pair."""
    generator = torch.Generator(device).manual_seed(0)
    side = config.patch_size
    one = torch.randn(case.patches, config.in_channels, 1, side, side, generator=generator, device=device)
    return one.expand(-1, -1, config.temporal_patch_size, -1, -1).flatten(1).to(dtype)


def picture_of(pixels: Tensor, case: Case, config: VisionConfig) -> Tensor:
    """The still that pixel values were cut from, `[1, channels, height, width]`."""
    (_, h, w), merge, side = case.grid[0], config.spatial_merge_size, config.patch_size
    patches = pixels.view(h // merge, w // merge, merge, merge, config.in_channels, -1, side, side)[..., 0, :, :]
    return patches.permute(4, 0, 2, 5, 1, 3, 6).reshape(1, config.in_channels, h * side, w * side)


@dataclass(frozen=True)
class Bar:
    """What a figure has to reach; `kind` is a key of `e2e_verdicts.KINDS`."""

    kind: str
    limit: float
    moonshot: float | None = None


def _image(ms: float, over_sdpa: float, over_best: float, moonshot: float) -> tuple[Bar, ...]:
    return Bar("ms", ms, moonshot), Bar("over sdpa", over_sdpa), Bar("over the best", over_best)


BARS: dict[tuple[str, str], tuple[Bar, ...]] = {
    ("Qwen2.5-VL-7B", "448²"): _image(3.4, 8.5, 1.18, 2.8),
    ("Qwen2.5-VL-7B", "672²"): _image(6.2, 8.0, 1.29, 5.4),
    ("Qwen2.5-VL-7B", "896²"): _image(10.8, 7.5, 1.28, 9.5),
    ("Qwen2.5-VL-7B", "1344²"): (*_image(25.5, 6.4, 1.27, 22.5), Bar("MiB", 260)),
    ("Qwen3-VL-8B", "448²"): _image(2.6, 5.0, 1.3, 2.2),
    ("Qwen3-VL-8B", "672²"): _image(4.7, 2.8, 1.2, 4.2),
    ("Qwen3-VL-8B", "896²"): _image(8.6, 2.3, 1.29, 7.6),
    ("Qwen3-VL-8B", "1344²"): _image(26.5, 1.7, 1.13, 22.0),
    ("Qwen2.5-VL-7B", "16 frames, 448²"): (Bar("frames/s", 780),),
    ("Qwen3-VL-8B", "16 frames, 448²"): (Bar("frames/s", 1200, 1500),),
}
"""One H200, bf16, full DeepStack; by model and case."""
EXACT_BAR = 1.12
"""Most that a random size may take, of its own exact-shape graph's time."""
COLD_BAR = 30.0
"""Most seconds from load to first embedding in a cold process."""
