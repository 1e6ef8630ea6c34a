"""The models, inputs and bars of `bench_e2e.py`."""

import random
from dataclasses import dataclass

from common.tower_inputs import Case
from qwenvit.config.vision_config import VisionConfig
from qwenvit.graphs import device_plan
from qwenvit.graphs.capacity import capacity_for

MODELS = {
    "Qwen2-VL-7B": "qwen2_vl-7b",
    "Qwen2.5-VL-7B": "qwen2_5_vl-7b",
    "Qwen3-VL-4B": "qwen3_vl-4b",
    "Qwen3-VL-8B": "qwen3_vl-8b",
}
"""Names in `qwenvit.config.published`, by model."""
IMAGE_SIDES = (448, 672, 896, 1344)
"""Heights and widths of square images in pixels."""
SERVED_SIDES = (94, 124, 156)
"""Rows and columns of patches of image sizes that are common in serving: 8836, 15376 and 24336 patches."""
BATCHES = (1, 8, 32)
MIXED_SIZES = ((480, 640), (768, 576), (336, 336), (224, 448), (896, 672), (300, 400), (512, 910), (640, 256))
"""Heights and widths in pixels of a batch's images, repeated as needed, and rounded to whole merge blocks."""
FRAMES = 16
RANDOM_SIZES = 20


def all_cases(config: VisionConfig) -> list[Case]:
    """Return the cases in the order they run."""
    cases = [Case(f"{side}²", ((1, side // config.patch_size, side // config.patch_size),)) for side in IMAGE_SIDES]
    cases += [Case(f"{side**2} patches", ((1, side, side),)) for side in SERVED_SIDES]
    for count in BATCHES:
        grid = tuple((1, *_round_to_patches(MIXED_SIZES[i % len(MIXED_SIZES)], config)) for i in range(count))
        cases.append(Case(f"batch of {count}", grid))
    side = IMAGE_SIDES[0] // config.patch_size
    frame_groups = FRAMES // config.temporal_patch_size
    return [*cases, Case(f"{FRAMES} frames, {IMAGE_SIDES[0]}²", ((frame_groups, side, side),), FRAMES)]


def _round_to_patches(size: tuple[int, int], config: VisionConfig) -> tuple[int, ...]:
    block = config.patch_size * config.spatial_merge_size
    return tuple(round(length / block) * config.spatial_merge_size for length in size)


def parity_case(config: VisionConfig) -> Case:
    """Return images of awkward sizes and a video: partial windows, one-token items, repeated lengths."""
    merge = config.spatial_merge_size
    grid = ((1, 16, 26), (3, 4, 6), (1, 1, 1), (1, 10, 8), (2, 8, 8), (1, 32, 20))
    return Case("parity", tuple((t, -(-h // merge) * merge, -(-w // merge) * merge) for t, h, w in grid))


def random_sizes(config: VisionConfig) -> list[Case]:
    """Return seeded images of random sizes, each smaller than its graph's capacity."""
    rng, merge, cases = random.Random(0), config.spatial_merge_size, list[Case]()
    while len(cases) < RANDOM_SIZES:
        h, w = (rng.randrange(8, 50) * merge for _ in range(2))
        case = Case(f"{h}×{w}", ((1, h, w),))
        capacity = capacity_for(device_plan.measure_grids(case.grid_thw(), config), config.merge_unit)
        if capacity.patches > case.patches:
            cases.append(case)
    return cases


@dataclass(frozen=True)
class Bar:
    """A limit that a figure has to reach, and a moonshot beyond it. `kind` is a key of `verdicts.KINDS`."""

    kind: str
    limit: float
    moonshot: float | None = None


def _image_bars(ms: float, over_sdpa: float, over_best: float, moonshot_ms: float) -> tuple[Bar, ...]:
    return Bar("ms", ms, moonshot_ms), Bar("over sdpa", over_sdpa), Bar("over best rival", over_best)


BARS: dict[tuple[str, str], tuple[Bar, ...]] = {
    ("Qwen2.5-VL-7B", "448²"): _image_bars(3.4, 8.5, 1.30, 2.8),
    ("Qwen2.5-VL-7B", "672²"): _image_bars(6.2, 8.0, 1.30, 5.4),
    ("Qwen2.5-VL-7B", "896²"): _image_bars(10.8, 7.5, 1.30, 9.5),
    ("Qwen2.5-VL-7B", "1344²"): (*_image_bars(25.5, 6.4, 1.30, 22.5), Bar("MiB", 260)),
    ("Qwen3-VL-8B", "448²"): _image_bars(2.6, 5.0, 1.30, 2.3),
    ("Qwen3-VL-8B", "672²"): _image_bars(4.7, 2.8, 1.25, 4.2),
    ("Qwen3-VL-8B", "896²"): _image_bars(8.6, 2.3, 1.33, 7.6),
    ("Qwen3-VL-8B", "1344²"): _image_bars(26.5, 1.7, 1.20, 23.0),
    ("Qwen2.5-VL-7B", "16 frames, 448²"): (Bar("frames/s", 780),),
    ("Qwen3-VL-8B", "16 frames, 448²"): (Bar("frames/s", 1400, 1500),),
}
"""Bars for one H200 in bf16 with all DeepStack levels, by model and case."""
EXACT_GRAPH_BAR = 1.12
"""Largest allowed ratio of a random size's time to the time of a graph of its exact shape."""
COLD_START_BAR = 30.0
"""Most seconds from load to first embedding in a cold process."""
