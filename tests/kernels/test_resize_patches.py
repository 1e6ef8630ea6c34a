"""Patches of resized 8-bit frames: against Pillow's resize and torch's on the CPU, cut by torch's unfold."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image

from qwenvit import ops
from qwenvit.preprocess.resize import pillow_resizes_height_first

GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
IMPLS = ["triton", "reference"]
RULES = ["pillow", "torch"]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
LAYOUTS = ["planar", "interleaved", "crop", "interleaved crop", "every other column", "transposed", "grey"]
CONTENTS = ["noise", "black and white", "checkerboard", "black", "white"]
LONG, SHORT = (4000, 20) if GPU else (800, 4)
"""Sides of a ratio of 200."""
PATCHES = [(14, 2, 2), (16, 2, 2), (16, 2, 1), (4, 1, 2), (2, 3, 3), (3, 1, 1), (5, 2, 3), (1, 2, 2)]
"""Sides of a patch, frames in a patch and sides of a token in patches: P, T, M."""


def sides(limit: int) -> st.SearchStrategy[int]:
    """Return sides up to a limit, as many between 1 and 2 pixels as between 1,000 and 2,000."""
    octaves = st.integers(0, limit.bit_length() - 1)
    return octaves.flatmap(lambda octave: st.integers(2**octave, min(2 ** (octave + 1) - 1, limit)))


@st.composite
def cases(
    draw: st.DrawFn,
    limit: int,
    max_pixels: int,
    max_height: int = 4000,
    max_tokens: int = 4000,
    patches: list[tuple[int, int, int]] = PATCHES,
    dtypes: list[torch.dtype] = DTYPES,
) -> dict:
    """Draw the arguments of `check`.

    Args:
        draw: from hypothesis.
        limit: longest side, before and after resizing.
        max_pixels: most pixels of several frames, before and after resizing together.
        max_height: greatest height before resizing.
        max_tokens: most rows and columns of tokens.
        patches: P, T, M to choose from.
        dtypes: of the patches, to choose from.
    """
    patch, group, merge = draw(st.sampled_from(patches))
    factor = patch * merge
    height, width = draw(sides(min(limit, max_height))), draw(sides(limit))
    new_height, new_width = (min(max(1, draw(sides(limit)) // factor), max_tokens) * factor for _ in range(2))
    if factor == 1:
        new_width = max(new_width, 2)  # torch reads past the end of a row when it writes a column of one pixel
    pixels = height * width + new_height * new_width
    return {
        "size": (height, width),
        "new_size": (new_height, new_width),
        "patch_group_merge": (patch, group, merge),
        "count": draw(st.integers(1, max(1, min(5, max_pixels // pixels)))),
        "rule": draw(st.sampled_from(RULES)),
        "layout": draw(st.sampled_from(LAYOUTS)),
        "content": draw(st.sampled_from(CONTENTS)),
        "dtype": draw(st.sampled_from(dtypes)),
        "seed": draw(st.integers(0, 99)),
    }


def fill(shape: tuple[int, ...], content: str, seed: int) -> torch.Tensor:
    """Return `[F, C, H, W]` uint8; sharp edges make bicubic interpolation overshoot."""
    if content == "checkerboard":
        index = np.indices(shape).sum(0)
        return torch.from_numpy((index % 2 * 255).astype(np.uint8))
    if content in ("black", "white"):
        return torch.full(shape, 255 * (content == "white"), dtype=torch.uint8, device="cpu")
    noise = np.frombuffer(np.random.default_rng(seed).bytes(int(np.prod(shape))), np.uint8).reshape(shape).copy()
    return torch.from_numpy(noise if content == "noise" else noise // 128 * 255)


def make_frames(count: int, size: tuple[int, int], layout: str, content: str, seed: int) -> torch.Tensor:
    """Return `[count, 3, *size]` uint8 on the CPU, in memory as `layout` says."""
    height, width = size
    if layout == "grey":
        return fill((count, 1, height, width), content, seed).expand(-1, 3, -1, -1)
    if layout == "transposed":
        return fill((count, 3, width, height), content, seed).mT
    if layout == "every other column":
        return fill((count, 3, height, 2 * width), content, seed)[..., ::2]
    margin = 3 if "crop" in layout else 0
    frames = fill((count, 3, height + 2 * margin, width + 2 * margin), content, seed)
    if "interleaved" in layout:
        frames = frames.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)
    return frames[..., margin : margin + height, margin : margin + width]


def resize(frames: torch.Tensor, new_size: tuple[int, int], rule: str) -> torch.Tensor:
    """Resize `[F, 3, H, W]` uint8 on the CPU by Pillow or torch."""
    if rule == "torch":
        frames = torch.empty(frames.shape, dtype=torch.uint8).copy_(frames)  # torch misreads transposed lines
        return F.interpolate(frames, size=new_size, mode="bicubic", align_corners=False, antialias=True)
    pictures = [Image.fromarray(frame.permute(1, 2, 0).contiguous().numpy()) for frame in frames]
    resized = [np.asarray(picture.resize(new_size[::-1], Image.Resampling.BICUBIC)) for picture in pictures]
    return torch.from_numpy(np.stack(resized)).permute(0, 3, 1, 2)


def cut(frames: torch.Tensor, patch: int, group: int, merge: int) -> torch.Tensor:
    """Cut bytes `[F, 3, H, W]` into `[patches, 3, T·P·P]`: torch's unfold, then the patches of each token together."""
    frames = torch.cat((frames, *[frames[-1:]] * (-len(frames) % group)))
    rows, columns = frames.shape[2] // patch, frames.shape[3] // patch
    by_row = torch.arange(rows * columns, device=frames.device).view(rows // merge, merge, columns // merge, merge)
    order = by_row.transpose(1, 2).flatten()
    patches = F.unfold(frames.float(), patch, stride=patch)[..., order]  # [F, 3·P·P, rows · columns]
    patches = patches.unflatten(1, (3, -1)).unflatten(0, (-1, group))  # [F / T, T, 3, P·P, rows · columns]
    return patches.permute(0, 4, 2, 1, 3).flatten(0, 1).flatten(2).byte()


def look_up(patches: torch.Tensor, levels: torch.Tensor) -> torch.Tensor:
    """Normalise bytes `[patches, 3, values]` to `[patches, 3 · values]`."""
    return torch.stack([levels[channel][patches[:, channel].int()] for channel in range(3)], 1).flatten(1)


def random_levels(dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Return another value for each byte of each channel, in no order."""
    generator = torch.Generator().manual_seed(0)
    return torch.randperm(3 * 256, generator=generator).view(3, 256).sub(384).to(DEVICE, dtype)


def check(
    impl: str,
    size: tuple[int, int],
    new_size: tuple[int, int],
    *,
    patch_group_merge: tuple[int, int, int] = (4, 2, 1),
    count: int = 1,
    rule: str = "pillow",
    layout: str = "planar",
    content: str = "noise",
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> None:
    """Compare one case with the truth; its patches are rows of a larger tensor of NaN."""
    patch, group, merge = patch_group_merge
    frames, levels = make_frames(count, size, layout, content, seed), random_levels(dtype)
    expected = look_up(cut(resize(frames, new_size, rule).to(DEVICE), patch, group, merge), levels)
    on_device = torch.empty_strided(frames.shape, frames.stride(), dtype=torch.uint8, device=DEVICE)
    channels = 1 if layout == "grey" else 3  # grey channels share memory
    on_device[:, :channels] = frames[:, :channels].to(DEVICE)
    rows = torch.full((len(expected) + 5, expected.shape[1]), torch.nan, dtype=dtype, device=DEVICE)
    out = rows[2:-3]
    result = ops.resize_patches(
        on_device,
        *new_size,
        levels,
        rule=rule,
        vertical_first=rule == "pillow" and pillow_resizes_height_first(size, new_size),
        patch_size=patch,
        temporal_patch_size=group,
        merge_size=merge,
        out=out,
        impl=impl,
    )
    assert result is out
    assert torch.equal(out, expected)
    assert rows[:2].isnan().all()
    assert rows[-3:].isnan().all()
    assert torch.equal(on_device.cpu(), frames)


@pytest.mark.parametrize("impl", IMPLS)
@settings(max_examples=40, deadline=None)
@given(case=cases(60, max_pixels=300, max_height=12, max_tokens=2))  # the interpreter takes 2 ms for each row and tap
def test_small_frames(impl: str, case: dict) -> None:
    check(impl, **case)


@settings(max_examples=60, deadline=None)
@given(case=cases(400, max_pixels=200_000))
def test_larger_frames_by_the_reference(case: dict) -> None:
    check("reference", **case)


@pytest.mark.skipif(not GPU, reason="needs a GPU: the interpreter takes hours")
@settings(max_examples=2000, deadline=None)
@given(case=cases(4000, max_pixels=20_000_000, patches=PATCHES[:2], dtypes=[torch.bfloat16]))  # few kernels to compile
@example({"size": (4000, 4000), "new_size": (3584, 3584), "patch_group_merge": (14, 2, 2)})
@example({"size": (4000, 20), "new_size": (28, 3976), "patch_group_merge": (14, 2, 2), "rule": "torch"})
def test_frames_of_any_size_on_a_gpu(case: dict) -> None:
    check("triton", **case)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize(
    ("size", "new_size"),
    [
        ((400, 2), (2, 2)),
        ((2, 400), (2, 2)),
        ((1, 1), (2, 200)),
        ((1, 1), (200, 2)),
        ((1, 40), (2, 8)),
        ((40, 1), (40, 2)),
        ((6, 8), (6, 8)),  # one pass, which copies
        ((6, 8), (6, 20)),
        ((6, 8), (6, 4)),
        ((6, 8), (20, 8)),
        ((6, 8), (4, 8)),
        ((2, 400), (4, 516)),  # more than a block of a row
        ((12, 16), (8, 20)),  # Pillow 13 runs the vertical pass first
        ((12, 12), (8, 4)),
    ],
)
def test_extreme_and_unchanged_sizes(impl: str, rule: str, size: tuple[int, int], new_size: tuple[int, int]) -> None:
    check(impl, size, new_size, patch_group_merge=(1, 2, 2), rule=rule, content="black and white")


@pytest.mark.parametrize(
    "impl", ["reference", pytest.param("triton", marks=pytest.mark.skipif(not GPU, reason="needs a GPU"))]
)
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("content", CONTENTS)
@pytest.mark.parametrize(
    ("size", "new_size"),
    [
        ((LONG, LONG), (SHORT, SHORT)),
        ((LONG, SHORT), (SHORT, LONG)),
        ((SHORT, LONG), (LONG, SHORT)),
        ((SHORT, SHORT), (LONG, LONG)),
        ((LONG, 3), (SHORT, 4)),
        ((3, LONG), (4, SHORT)),
    ],
)
def test_ratios_of_200(impl: str, rule: str, content: str, size: tuple[int, int], new_size: tuple[int, int]) -> None:
    check(impl, size, new_size, patch_group_merge=(1, 2, 2), rule=rule, content=content)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("group", [1, 2, 3])
@pytest.mark.parametrize("count", [1, 2, 3, 4, 5])
def test_the_last_frame_fills_its_group(impl: str, group: int, count: int) -> None:
    check(impl, (2, 9), (12, 24), patch_group_merge=(6, group, 2), count=count)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_memory_layouts(impl: str, layout: str, dtype: torch.dtype) -> None:
    check(impl, (3, 10), (8, 16), patch_group_merge=(4, 2, 2), count=3, layout=layout, dtype=dtype)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("vertical_first", [False, True])
def test_the_order_of_the_passes(impl: str, rule: str, vertical_first: bool) -> None:
    frames = make_frames(1, (11, 13), "planar", "black and white", 0)
    horizontal = resize(resize(frames, (11, 16), rule), (8, 16), rule)
    vertical = resize(resize(frames, (8, 13), rule), (8, 16), rule)
    assert not torch.equal(horizontal, vertical)
    found = ops.resize_patches(
        frames.to(DEVICE),
        8,
        16,
        random_levels(),
        rule=rule,
        vertical_first=vertical_first,
        patch_size=4,
        temporal_patch_size=1,
        merge_size=2,
        impl=impl,
    )
    expected = cut((vertical if vertical_first else horizontal).to(DEVICE), 4, 1, 2)
    assert torch.equal(found, look_up(expected, random_levels()))


def test_overshoot_is_clamped_after_each_pass() -> None:
    """Without clamping between the passes, the first one's overshoot would change the second one's result."""
    frames = make_frames(1, (8, 8), "planar", "black and white", 3)
    resized = resize(frames, (16, 16), "pillow")
    assert (resized == 0).any()
    assert (resized == 255).any()
    in_floats = F.interpolate(frames.double(), size=(16, 16), mode="bicubic", antialias=True).round().clamp(0, 255)
    assert (in_floats - resized).abs().max() > 2
    for impl in IMPLS:
        check(impl, (8, 8), (16, 16), content="black and white", seed=3)


def call(**changes: object) -> torch.Tensor:
    arguments = {
        "frames": torch.zeros(2, 3, 30, 40, dtype=torch.uint8, device=DEVICE),
        "height": 28,
        "width": 56,
        "levels": torch.zeros(3, 256, device=DEVICE),
        "rule": "torch",
        "patch_size": 14,
        "temporal_patch_size": 2,
        "merge_size": 2,
    }
    return ops.resize_patches(**arguments | changes)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_without_out_it_allocates(dtype: torch.dtype) -> None:
    found = call(levels=random_levels(dtype))
    assert (found.dtype, found.shape, found.device.type) == (dtype, (8, 3 * 2 * 14 * 14), DEVICE)


@pytest.mark.parametrize(
    ("changes", "kind", "message"),
    [
        (
            {"frames": np.zeros((1, 3, 8, 8), np.uint8)},
            TypeError,
            r"^frames: expected a uint8 tensor \[frames, 3, height, width\], got ndarray$",
        ),
        ({"frames": torch.rand(1, 3, 8, 8)}, TypeError, "^frames: expected a uint8 tensor .*, got torch.float32$"),
        (
            {"frames": torch.zeros(3, 8, 8, dtype=torch.uint8)},
            ValueError,
            r"^frames: expected \[frames, 3, height, width\] with at least one pixel, got \[3, 8, 8\]$",
        ),
        ({"frames": torch.zeros(1, 4, 8, 8, dtype=torch.uint8)}, ValueError, r"^frames: .* got \[1, 4, 8, 8\]$"),
        ({"frames": torch.zeros(1, 1, 8, 8, dtype=torch.uint8)}, ValueError, r"^frames: .* got \[1, 1, 8, 8\]$"),
        ({"frames": torch.zeros(0, 3, 8, 8, dtype=torch.uint8)}, ValueError, r"^frames: .* got \[0, 3, 8, 8\]$"),
        ({"frames": torch.zeros(1, 3, 0, 8, dtype=torch.uint8)}, ValueError, r"^frames: .* got \[1, 3, 0, 8\]$"),
        ({"rule": "cubic"}, ValueError, r"^rule: expected one of \('pillow', 'torch'\), got 'cubic'$"),
        ({"height": 0}, ValueError, "^height: expected a positive multiple of 28, got 0$"),
        ({"height": -28}, ValueError, "^height: expected a positive multiple of 28, got -28$"),
        ({"height": 42}, ValueError, "^height: expected a positive multiple of 28, got 42$"),
        ({"width": 40}, ValueError, "^width: expected a positive multiple of 28, got 40$"),
        (
            {"levels": [[0.0] * 256] * 3},
            TypeError,
            r"^levels: expected a float32, bfloat16 or float16 tensor \[3, 256\], got list$",
        ),
        (
            {"levels": torch.zeros(3, 256, dtype=torch.float64, device=DEVICE)},
            TypeError,
            "^levels: .* got torch.float64$",
        ),
        (
            {"levels": torch.zeros(3, 255, device=DEVICE)},
            ValueError,
            r"^levels: expected shape \[3, 256\], got \[3, 255\]$",
        ),
        ({"levels": torch.zeros(256, 3, device=DEVICE).T}, ValueError, "^levels: expected contiguous, got strides"),
        ({"levels": torch.zeros(3, 256, device="meta")}, ValueError, f"^levels: expected on {DEVICE}.*, got meta$"),
        (
            {"out": torch.zeros(16, 1176, device=DEVICE)},
            ValueError,
            r"^out: expected shape \[8, 1176\], got \[16, 1176\]$",
        ),
        (
            {"out": torch.zeros(8, 1176, dtype=torch.float16, device=DEVICE)},
            TypeError,
            "^out: expected torch.float32, got torch.float16$",
        ),
        ({"out": torch.zeros(8, 1176, device="meta")}, ValueError, f"^out: expected on {DEVICE}.*, got meta$"),
        ({"out": torch.zeros(8, 2000, device=DEVICE)[:, :1176]}, ValueError, "^out: expected contiguous, got strides"),
        ({"out": np.zeros((8, 1176), np.float32)}, TypeError, "^out: expected a torch.Tensor, got ndarray$"),
        ({"impl": "cuda"}, ValueError, "^impl: expected 'auto', 'triton' or 'reference', got 'cuda'$"),
    ],
)
def test_wrong_arguments_are_refused(changes: dict, kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=message):
        call(**changes)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize(
    ("new_size", "vertical_first"), [((4, 6), False), ((4, 6), True), ((4, 4), False), ((2, 6), False)]
)
@pytest.mark.parametrize("far", [2, 3])
def test_pixels_more_than_2_to_the_31_bytes_apart(impl, new_size, vertical_first, far):
    """int32 offsets would overflow in an interleaved frame of more than 715 million pixels."""
    size, strides = ((3, 4), (2**30, 3)) if far == 2 else ((4, 3), (3, 2**30))
    memory = torch.empty(2**31 + 64, dtype=torch.uint8, device=DEVICE)  # only the pages of the frame are used
    frames = memory.as_strided((1, 3, *size), (1, 1, *strides))
    near = fill((1, 3, *size), "noise", 0)
    frames.copy_(near)
    kw = {
        "rule": "torch",
        "vertical_first": vertical_first,
        "patch_size": 2,
        "temporal_patch_size": 2,
        "merge_size": 1,
        "impl": impl,
    }
    found = ops.resize_patches(frames, *new_size, random_levels(), **kw)
    assert torch.equal(found, ops.resize_patches(near.to(DEVICE), *new_size, random_levels(), **kw))
