"""The models, inputs, ways to run vLLM and bars of `bench_vllm.py`."""

from collections.abc import Collection
from dataclasses import dataclass, replace
from typing import Any

from common.tower_inputs import Case
from qwenvit.config.published import published_config
from qwenvit.config.vision_config import VisionConfig

MODELS = {"Qwen2.5-VL-7B": "qwen2_5_vl-7b", "Qwen3-VL-8B": "qwen3_vl-8b"}
"""Names in `qwenvit.config.published`, by model."""
IMAGE_SIDES = (448, 672, 896, 1344)
"""Heights and widths of square images in pixels."""
IMAGES, IMAGES_SIDE = 8, 448
FRAMES, FRAME_SIDE = 16, 448
REQUESTS = {"448²": (448,), "896²": (896,), "1344²": (1344,), "4 × 896²": (896,) * 4}
"""Heights and widths of the images of one request."""
PROMPTS = ((448,), (224, 448), (672,), (336,))
"""Sides of the images of the requests whose log-probabilities are compared."""
CROWD, CROWD_SIDE = 64, 896
"""How many requests are sent at once, and the side of the image of each."""
VIDEO_CASE = f"{FRAMES} frames, {FRAME_SIDE}²"
TOWER_CASES = (*(f"{side}²" for side in IMAGE_SIDES), f"{IMAGES} × {IMAGES_SIDE}²", VIDEO_CASE)
CROWD_CASE = f"{CROWD} requests"
CASES = tuple(dict.fromkeys((*TOWER_CASES, *REQUESTS, CROWD_CASE)))
"""The choices of `--cases`."""
TOWER, REQUEST = "tower", "requests"
PARTS = (TOWER, REQUEST)
"""The choices of `--parts`."""
TINY_SHRINK = 4
"""What `--tiny` divides the sides of images by."""


@dataclass(frozen=True)
class Mode:
    """One way to run vLLM."""

    name: str
    """How tables call it."""
    parts: tuple[str, ...]
    plugin: dict[str, Any] | None = None
    """The plugin's options; None: vLLM without the plugin."""
    best_settings: bool = False
    """Whether vLLM compiles its tower, where this version can, and runs it in CUDA graphs of the cases' sizes."""


OFF, BEST, PLUGIN, PIXELS, ATTENTION, ATTENTION_BEST = MODE_NAMES = (
    "off", "best", "plugin", "pixels", "attention", "attention-best")  # fmt: skip
MODES = {
    OFF: Mode("vLLM", PARTS),
    BEST: Mode("vLLM, best settings", PARTS, best_settings=True),
    PLUGIN: Mode("plugin", PARTS, {"tower": "tower", "pixels": False}),
    PIXELS: Mode("plugin with pixels", (REQUEST,), {"tower": "tower", "pixels": True}),
    ATTENTION: Mode("attention mode", (TOWER,), {"tower": "attention", "pixels": False}),
    ATTENTION_BEST: Mode("attention mode, best settings", (TOWER,), {"tower": "attention", "pixels": False}, True),
}
"""The choices of `--modes`."""

TTFT_BARS = {"448²": 0.95, "896²": 0.80, "1344²": 0.65, "4 × 896²": 0.65}
"""Largest allowed ratio of the time to first token, plugin with pixels, to vLLM's with its best settings."""
ATTENTION_BARS = ("Qwen2.5-VL-7B",)
"""Models for which attention mode has to be faster than vLLM's own tower, eager and with the best settings."""
TOWER_ALLOWANCE = 0.97
"""Part of the ratio that `bench_e2e.py` measured over vLLM's best tower, which the tower has to reach in the engine."""


@dataclass(frozen=True)
class Shape:
    """The sizes of a benchmarked model."""

    model: str
    """A key of MODELS."""
    text_layers: int
    tiny: bool = False
    """Whether all widths are small and the images too, in fp32: for tests on a CPU."""

    @property
    def vision(self) -> VisionConfig:
        config = published_config(MODELS[self.model])
        return tiny_tower(config) if self.tiny else config

    @property
    def dtype(self) -> str:
        return "float32" if self.tiny else "bfloat16"

    def side(self, pixels: int) -> int:
        """Return the side that an image of nominally this side has: whole merged tokens."""
        unit = self.vision.patch_size * self.vision.spatial_merge_size
        return max(1, round(pixels / (TINY_SHRINK if self.tiny else 1) / unit)) * unit

    def sides(self, case: str) -> tuple[int, ...]:
        """Return the sides of the images of a case of REQUESTS."""
        return tuple(self.side(pixels) for pixels in REQUESTS[case])

    def tokens(self, pixels: int) -> int:
        """Return the tokens of an image of nominally this side."""
        return (self.side(pixels) // (self.vision.patch_size * self.vision.spatial_merge_size)) ** 2


def tiny_tower(config: VisionConfig) -> VisionConfig:
    """Return the config of a small tower with the family's structure and head_dim."""
    width = 2 * config.head_dim
    sizes: dict[str, Any] = {"hidden_size": width, "num_heads": 2, "intermediate_size": 200, "out_hidden_size": 128}
    if config.traits.windowed:
        sizes["fullatt_block_indexes"] = (1, 3)
    if config.traits.deepstack:
        sizes["deepstack_visual_indexes"] = (0, 2)
    return replace(config, depth=4, **sizes)


def tower_cases(shape: Shape, only: Collection[str] = TOWER_CASES) -> list[Case]:
    """Return the inputs of the tower alone in the order of TOWER_CASES."""

    def grid(pixels: int, frame_groups: int = 1) -> tuple[int, int, int]:
        patches = shape.side(pixels) // shape.vision.patch_size
        return frame_groups, patches, patches

    grids = [(grid(side),) for side in IMAGE_SIDES] + [(grid(IMAGES_SIDE),) * IMAGES]
    cases = [Case(name, one) for name, one in zip(TOWER_CASES, grids, strict=False)]
    video = grid(FRAME_SIDE, FRAMES // shape.vision.temporal_patch_size)
    cases.append(Case(VIDEO_CASE, (video,), FRAMES))
    return [case for case in cases if case.name in only]


def graph_budgets(shape: Shape, parts: Collection[str], only: Collection[str]) -> list[int]:
    """Return the token counts of all cases: the sizes of vLLM's CUDA graphs with its best settings.

    One of them is as large as the largest of `PROMPTS`.
    """
    found = set()
    if TOWER in parts:
        found |= {case.patches // shape.vision.merge_unit for case in tower_cases(shape, only)}
    if REQUEST in parts:
        found |= {sum(map(shape.tokens, sides)) for name, sides in REQUESTS.items() if name in only}
        found.add(max(sum(map(shape.tokens, sides)) for sides in PROMPTS))
        if CROWD_CASE in only:  # the scheduler encodes as many images in a step as its budget of tokens has room for
            found |= {shape.tokens(CROWD_SIDE) * count for count in (1, IMAGES)}
    return sorted(found)
