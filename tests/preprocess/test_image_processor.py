"""The image processor against transformers' two, with the same inputs and options."""

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image
from transformers import Qwen2VLImageProcessor, Qwen2VLImageProcessorPil
from transformers.models.qwen2_vl.image_processing_qwen2_vl import smart_resize as hf_smart_resize

from qwenvit.config.families import FAMILIES
from qwenvit.ops.reference import cut_patches
from qwenvit.preprocess.image_processor import ImageProcessor
from qwenvit.preprocess.resize import pillow_resizes_height_first, smart_resize
from support.pinned import needs_pinned_transformers

HF_PROCESSORS = {"pillow": Qwen2VLImageProcessorPil, "torch": Qwen2VLImageProcessor}
BACKENDS = sorted(HF_PROCESSORS)
SIDES = st.integers(1, 130)


def pixels(height: int, width: int, channels: int = 3, seed: int = 0) -> np.ndarray:
    """Noise over a gradient: sharp edges make bicubic interpolation overshoot."""
    random = np.random.default_rng(seed).integers(0, 256, (height, width, channels))
    ramp = np.linspace(0, 255, width)[None, :, None]
    return np.where(random > 128, random, ramp).astype(np.uint8)


def hf_process(processor: ImageProcessor, images: list, backend: str, **options) -> tuple[torch.Tensor, torch.Tensor]:
    out = HF_PROCESSORS[backend].from_dict(processor.to_hf())(images, return_tensors="pt", **options)
    return out["pixel_values"], out["image_grid_thw"]


def assert_equal(ours: tuple, expected: tuple) -> None:
    for our_tensor, hf_tensor in zip(ours, expected, strict=True):
        assert our_tensor.dtype == hf_tensor.dtype
        assert torch.equal(our_tensor, hf_tensor)


@settings(max_examples=500)
@given(
    st.integers(1, 5000),
    st.integers(1, 5000),
    st.sampled_from([28, 32]),
    st.integers(1, 10**6),
    st.integers(1, 10**7),
)
@example(70, 98, 28, 1, 10**7)  # 2.5 and 3.5 tokens: halves go to even
@example(1, 200, 28, 1, 10**7)
@example(1, 201, 28, 1, 10**7)
def test_smart_resize_is_as_in_transformers(height: int, width: int, factor: int, low: int, high: int) -> None:
    low, high = min(low, high), max(low, high)
    try:
        expected = hf_smart_resize(height, width, factor, low, high)
    except ValueError:
        with pytest.raises(ValueError, match="aspect ratio of at most 200"):
            smart_resize(height, width, factor, low, high)
        return
    assert smart_resize(height, width, factor, low, high) == expected


@settings(max_examples=200)
@given(
    st.integers(20, 600), st.integers(20, 600), st.sampled_from([28, 32]), st.sampled_from([-1, 0, 1]), st.booleans()
)
@example(100, 130, 28, 0, True)  # 4 x 5 tokens, of 15,680 pixels
@example(100, 130, 28, 0, False)
def test_an_area_at_a_bound_is_resized_as_in_transformers(
    height: int, width: int, factor: int, beyond: int, upper: bool
) -> None:
    area = round(height / factor) * round(width / factor) * factor**2
    bounds = (1, area + beyond) if upper else (area + beyond, 10**7)
    assert smart_resize(height, width, factor, *bounds) == hf_smart_resize(height, width, factor, *bounds)


def test_smart_resize_has_the_same_defaults() -> None:
    for size in ((10, 20), (300, 500), (3000, 2000)):
        assert smart_resize(*size) == hf_smart_resize(*size)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("family", ["qwen2_5_vl", "qwen3_vl"])
@settings(max_examples=25, deadline=None)
@given(height=SIDES, width=SIDES, seed=st.integers(0, 99))
def test_one_image_is_as_in_transformers(backend: str, family: str, height: int, width: int, seed: int) -> None:
    processor = ImageProcessor.for_family(family)
    image = Image.fromarray(pixels(height, width, seed=seed))
    assert_equal(processor(image, resize=backend), hf_process(processor, [image], backend))


@pytest.mark.parametrize("backend", BACKENDS)
def test_several_images_are_as_in_transformers(backend: str) -> None:
    processor = ImageProcessor.for_family("qwen2_vl")
    images = [Image.fromarray(pixels(*size, seed=seed)) for seed, size in enumerate([(60, 90), (84, 56), (60, 90)])]
    assert_equal(processor(images, resize=backend), hf_process(processor, images, backend))
    assert_equal(processor(iter(images), resize=backend), hf_process(processor, images, backend))


@pytest.mark.parametrize("backend", BACKENDS)
def test_every_byte_value_is_normalised_as_in_transformers(backend: str) -> None:
    processor = ImageProcessor.for_family("qwen2_vl")
    image = np.arange(56 * 56, dtype=np.uint8).reshape(56, 56, 1).repeat(3, axis=2)  # a size that is not resized
    ours, _ = processor(image, resize=backend)
    assert ours.unique().numel() == 256 * 3
    assert_equal((ours,), hf_process(processor, [image], backend)[:1])


def brute_force_patches(frames: torch.Tensor, p: ImageProcessor) -> list[torch.Tensor]:
    _, _, height, width = frames.shape
    found = []
    for block_row in range(height // p.factor):
        for block_column in range(width // p.factor):
            for row in range(p.merge_size):
                for column in range(p.merge_size):
                    top = block_row * p.factor + row * p.patch_size
                    left = block_column * p.factor + column * p.patch_size
                    patch = frames[:, :, top : top + p.patch_size, left : left + p.patch_size]
                    found.append(patch.transpose(0, 1).reshape(3, -1))
    return found


@pytest.mark.parametrize(("patch", "merge", "group"), [(14, 2, 2), (3, 3, 1), (4, 1, 3)])
def test_cut_patches_equals_its_definition(patch: int, merge: int, group: int) -> None:
    processor = ImageProcessor(patch_size=patch, merge_size=merge, temporal_patch_size=group)
    frames = torch.rand(2 * group, 3, 2 * patch * merge, 3 * patch * merge)
    expected = [row for part in frames.split(group) for row in brute_force_patches(part, processor)]
    assert torch.equal(cut_patches(frames, patch, group, merge), torch.stack(expected))


@pytest.mark.parametrize("backend", BACKENDS)
@settings(max_examples=25, deadline=None)
@given(height=SIDES, width=SIDES, seed=st.integers(0, 99))
def test_scaled_floats_are_as_in_transformers(backend: str, height: int, width: int, seed: int) -> None:
    image = np.random.default_rng(seed).random((height, width, 3), np.float32)
    processor = ImageProcessor.for_family("qwen2_vl")
    ours = processor(image, do_rescale=False, resize=backend, channels="last")
    assert_equal(ours, hf_process(processor, [image], backend, do_rescale=False, input_data_format="channels_last"))


def test_the_users_array_is_unchanged() -> None:
    image = torch.rand(3, 14, 14)
    before = image.clone()
    ImageProcessor(temporal_patch_size=1, merge_size=1, min_pixels=1)(image, do_rescale=False, resize="torch")
    assert torch.equal(image, before)


def test_black_and_white_floats_equal_their_bytes() -> None:
    """transformers' Pillow processor differs: it takes floats that are all 0 or 1 for the bytes 0 and 1."""
    black_and_white = np.where(pixels(64, 64) > 128, 255, 0).astype(np.uint8)
    processor = ImageProcessor.for_family("qwen2_vl")
    scaled, _ = processor((black_and_white / 255).astype(np.float32), do_rescale=False, resize="pillow")
    plain, _ = processor(black_and_white, resize="pillow")
    assert torch.equal(scaled, plain)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("low", "high"), [(3136, 5000), (40_000, 50_000)])
def test_bounds_are_as_in_transformers(backend: str, low: int, high: int) -> None:
    image = Image.fromarray(pixels(90, 130))
    processor = ImageProcessor.for_family("qwen2_vl")
    size = {"shortest_edge": low, "longest_edge": high}
    expected = hf_process(processor, [image], backend, size=size)
    assert_equal(processor(image, min_pixels=low, max_pixels=high, resize=backend), expected)
    assert_equal(processor(image, size=size, resize=backend), expected)
    assert_equal(processor(image, size=size, max_pixels=high, resize=backend), expected)


def test_one_bound_leaves_the_other_unchanged() -> None:
    processor = ImageProcessor.for_family("qwen2_vl")
    image = Image.fromarray(pixels(90, 130))
    for options in ({"max_pixels": 5000}, {"size": {"longest_edge": 5000}}, {"size": {"max_pixels": 5000}}):
        expected = hf_process(processor, [image], "torch", size={"shortest_edge": 3136, "longest_edge": 5000})
        assert_equal(processor(image, **options), expected)
    expected = hf_process(processor, [image], "torch", size={"shortest_edge": 40_000, "longest_edge": 12_845_056})
    assert_equal(processor(image, min_pixels=40_000), expected)


@pytest.mark.parametrize("options", [{"max_pixels": 50_000}, {"size": {"longest_edge": 50_000}}])
def test_an_upper_bound_below_the_lower_one_lowers_it(options: dict) -> None:
    processor = ImageProcessor.for_family("qwen3_vl")
    image = Image.fromarray(pixels(300, 400))
    expected = hf_process(processor, [image], "torch", size={"shortest_edge": 50_000, "longest_edge": 50_000})
    assert_equal(processor(image, **options), expected)


@pytest.mark.parametrize("family", ["qwen2_5_vl", "qwen3_vl"])
@settings(max_examples=500)
@given(st.integers(1, 4000), st.integers(1, 4000), st.one_of(st.integers(1, 40), st.integers(1, 3000)))
@example(1000, 1500, 64)  # Qwen3's least area is 64 tokens: enlarging to it would give 70
@example(1, 9, 9)
def test_an_image_has_at_most_max_tokens(family: str, height: int, width: int, max_tokens: int) -> None:
    if (ratio := max(height, width) / min(height, width)) > 200:
        return
    processor = ImageProcessor.for_family(family)
    bounded = processor.with_bounds(max_tokens=max_tokens)
    assert bounded.max_pixels == max_tokens * processor.factor**2
    sides = hf_smart_resize(height, width, processor.factor, bounded.min_pixels, bounded.max_pixels)
    rows, columns = (side // processor.factor for side in sides)
    assert processor.grid_for(height, width, max_tokens=max_tokens) == (1, 2 * rows, 2 * columns)
    if ratio <= max_tokens:
        assert rows * columns <= max_tokens
    elif rows * columns > max_tokens:
        assert min(rows, columns) == 1


def test_max_tokens_changes_no_lower_bound_that_it_need_not() -> None:
    processor = ImageProcessor.for_family("qwen3_vl")
    assert processor.with_bounds(max_tokens=256) == processor.with_bounds(max_pixels=256 * 32 * 32)
    both = processor.with_bounds(min_pixels=90_000, max_tokens=np.int64(100))
    assert (both.min_pixels, both.max_pixels) == (90_000, 102_400)
    assert processor.with_bounds(size={"shortest_edge": 90_000}, max_tokens=100) == both
    assert type(both.max_pixels) is int


def test_max_tokens_bounds_the_images_of_a_call() -> None:
    image = pixels(300, 400)
    processor = ImageProcessor.for_family("qwen3_vl")
    expected = hf_process(processor, [image], "torch", size={"shortest_edge": 10_240, "longest_edge": 40_960})
    assert len(expected[0]) <= 4 * 40
    assert_equal(processor(image, max_tokens=40), expected)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"min_pixels": 20_000_000}, "min_pixels=20000000 is above max_pixels=12845056; pass both"),
        ({"min_pixels": 3136, "max_pixels": 100}, "min_pixels=3136 is above max_pixels=100"),
        ({"min_pixels": 10_000, "max_tokens": 2}, "min_pixels=10000 is above max_pixels=1568"),
        ({"max_tokens": 9, "max_pixels": 5000}, "max_tokens: got 9 and max_pixels 5000; pass only one"),
        (
            {"max_tokens": 9, "size": {"longest_edge": 5000}},
            "max_tokens: got 9 and size's longest_edge 5000; pass only",
        ),
        ({"max_tokens": 0}, "max_tokens: expected a positive integer, got 0"),
        ({"max_tokens": 9.0}, "max_tokens: expected a positive integer, got 9.0"),
        ({"max_tokens": True}, "max_tokens: expected a positive integer, got True"),
        ({"max_pixels": 0}, "max_pixels: expected a positive integer, got 0"),
        ({"max_pixels": 5000, "size": {"longest_edge": 6000}}, "max_pixels: expected what size says, 6000, got 5000"),
        ({"size": {"height": 28}}, "size: expected keys among .* got 'height'"),
        ({"size": {"longest_edge": 9000, "max_pixels": 8000}}, "two names"),
        ({"size": 28}, "size: expected a mapping"),
        ({"max_pixels": 1e6}, "max_pixels: expected a positive integer, got 1000000.0"),
        ({"min_pixels": 0}, "min_pixels: expected a positive integer, got 0"),
        ({"resize": "cubic"}, "resize: expected 'pillow' or 'torch', got 'cubic'"),
    ],
)
def test_contradicting_options_are_refused(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ImageProcessor.for_family("qwen2_vl")(pixels(30, 30), **options)


def test_an_unknown_option_is_refused_before_an_image_is_opened() -> None:
    known = "min_pixels, max_pixels, max_tokens, size, resize, do_rescale, channels"
    processor = ImageProcessor.for_family("qwen2_vl")
    for call in (
        lambda **options: processor("no/such/file.png", **options),
        lambda **options: processor.preparer(torch.device("cpu"), **options),
    ):
        with pytest.raises(TypeError, match=f"^options: expected only {known}, got max_pixel$"):
            call(max_pixel=3, size=None)


@needs_pinned_transformers  # pictures with transparency
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@settings(max_examples=15, deadline=None)
@given(height=SIDES, width=SIDES, seed=st.integers(0, 99))
def test_other_dtypes_are_float32_converted(
    backend: str, dtype: torch.dtype, height: int, width: int, seed: int
) -> None:
    processor = ImageProcessor.for_family("qwen2_5_vl")
    images = [pixels(height, width, seed=seed), np.random.default_rng(seed).integers(0, 256, (70, 90, 4), np.uint8)]
    expected, expected_grids = hf_process(processor, [Image.fromarray(image) for image in images], backend)
    ours = processor([Image.fromarray(image) for image in images], device="cpu", dtype=dtype, resize=backend)
    assert_equal(ours, (expected.to(dtype), expected_grids))


@pytest.mark.parametrize("backend", BACKENDS)
def test_floats_in_another_dtype_are_float32_converted(backend: str) -> None:
    image = np.random.default_rng(0).random((70, 90, 3), np.float32)
    processor = ImageProcessor.for_family("qwen3_vl")
    expected, _ = hf_process(processor, [image], backend, do_rescale=False)
    ours, _ = processor(image, do_rescale=False, resize=backend, device=torch.device("cpu"), dtype=torch.bfloat16)
    assert_equal((ours,), (expected.bfloat16(),))


@settings(max_examples=500, deadline=None)
@given(*[st.one_of(st.integers(1, 16), st.integers(1, 90)) for _ in range(4)], st.integers(0, 99))
@example(48, 64, 47, 64, 0)  # the width does not shrink
@example(50, 50, 46, 48, 0)  # the height shrinks by twice as many pixels
@example(50, 50, 45, 48, 0)  # and by one more
@example(50, 50, 50, 70, 0)  # the height does not shrink
@example(201, 2, 190, 40, 0)  # very tall: older versions of Pillow have another rule
@example(200, 2, 190, 40, 0)
def test_the_order_of_pillows_passes(height: int, width: int, new_height: int, new_width: int, seed: int) -> None:
    noise = Image.fromarray(np.random.default_rng(seed).integers(0, 2, (height, width, 3), np.uint8) * np.uint8(255))

    def resize(*sizes: tuple[int, int]) -> bytes:
        resized = noise
        for size in sizes:
            resized = resized.resize(size, Image.Resampling.BICUBIC)
        return resized.tobytes()

    by_height_first = {
        True: resize((width, new_height), (new_width, new_height)),
        False: resize((new_width, height), (new_width, new_height)),
    }
    predicted = pillow_resizes_height_first((height, width), (new_height, new_width))
    assert resize((new_width, new_height)) == by_height_first[predicted]


def test_a_refused_image_is_named_by_its_index() -> None:
    good, stripe = pixels(30, 30), pixels(2, 402)
    with pytest.raises(ValueError, match=r"images\[1\]: expected an aspect ratio of at most 200, got 201"):
        ImageProcessor.for_family("qwen2_vl")([good, stripe])


@given(st.sampled_from(sorted(FAMILIES)), st.integers(1, 3000), st.integers(15, 3000))
def test_grid_for_counts_the_patches_that_transformers_counts(family: str, height: int, width: int) -> None:
    processor = ImageProcessor.for_family(family)
    if max(height, width) / min(height, width) > 200:
        return
    time, rows, columns = processor.grid_for(height, width)
    assert time * rows * columns == Qwen2VLImageProcessorPil.from_dict(processor.to_hf()).get_number_of_image_patches(
        height, width
    )


def test_bounds_may_be_numpy_integers():
    processor = ImageProcessor.for_family("qwen2_vl").with_bounds(max_pixels=np.int64(100_000))
    assert processor == ImageProcessor.for_family("qwen2_vl").with_bounds(max_pixels=100_000)
    assert type(processor.max_pixels) is int  # JSON has no NumPy integers
