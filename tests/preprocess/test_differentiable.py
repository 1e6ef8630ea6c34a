"""Gradients from pixel values to images, against differences, and patches put together to images again."""

import numpy as np
import pytest
import torch
from PIL import Image

from qwenvit.preprocess.image_processor import ImageProcessor
from qwenvit.preprocess.video_processor import VideoProcessor

PROCESSOR = ImageProcessor(patch_size=4, min_pixels=1, image_mean=(0.4, 0.5, 0.6), image_std=(0.2, 0.3, 0.4))
BOUNDS = {"min_pixels": 1, "max_pixels": 10**6}


def floats(*shape, seed=0):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


def jacobian(image, **options):
    """Return `[pixel values, *image.shape]`: the response to each input alone, without autograd."""
    columns = []
    for position in range(image.numel()):
        low, high = image.clone(), image.clone()
        low.view(-1)[position], high.view(-1)[position] = 0, 1
        with_low, with_high = (PROCESSOR(one, do_rescale=False, **options)[0] for one in (low, high))
        columns.append((with_high - with_low).flatten().double())
    return torch.stack(columns, 1).unflatten(1, image.shape)


@pytest.mark.parametrize(
    ("shape", "options"),
    [
        ((3, 8, 16), {}),  # keeps its size
        ((3, 11, 6), {}),  # grows to 16 x 8 and shrinks
        ((3, 21, 19), {"max_pixels": 128}),
        ((9, 1, 3), {"channels": "last"}),  # one column
        ((7, 9), {}),
        ((1, 7, 9), {}),
        ((8, 6, 4), {"channels": "last"}),  # alpha, composited over white
    ],
)
def test_gradients_are_the_differences_of_the_pixel_values(shape, options):
    image = floats(*shape).requires_grad_()
    pixel_values, grid = PROCESSOR(image, differentiable=True, do_rescale=False, **options)
    expected, expected_grid = PROCESSOR(image, do_rescale=False, **options)
    assert not expected.requires_grad
    assert torch.equal(pixel_values, expected)
    assert torch.equal(grid, expected_grid)
    upstream = floats(pixel_values.numel(), seed=1) - 0.5
    (found,) = torch.autograd.grad(pixel_values.flatten() @ upstream, image)
    # The pixel values are linear in each input, so that a difference is the derivative, but for rounding.
    truth = torch.tensordot(upstream.double(), jacobian(image.detach(), **options), 1)
    torch.testing.assert_close(found.double(), truth, rtol=1e-4, atol=1e-5 * float(truth.abs().max()))


def test_several_images_of_which_some_require_gradients():
    first, second = floats(3, 20, 12).requires_grad_(), floats(3, 8, 30, seed=1)
    third = floats(16, 8, 3, seed=2).numpy()
    images = [first, second, third]
    pixel_values, grid = PROCESSOR(images, differentiable=True, do_rescale=False, dtype=torch.bfloat16)
    expected, expected_grid = PROCESSOR([first.detach(), second, third], do_rescale=False, dtype=torch.bfloat16)
    assert pixel_values.dtype == torch.bfloat16
    assert torch.equal(pixel_values, expected)
    assert torch.equal(grid, expected_grid)
    pixel_values, _ = PROCESSOR(images, differentiable=True, do_rescale=False)
    upstream = floats(*pixel_values.shape, seed=3)
    (pixel_values * upstream).sum().backward()
    alone = first.detach().requires_grad_()
    rows, _ = PROCESSOR(alone, differentiable=True, do_rescale=False)
    (rows * upstream[: len(rows)]).sum().backward()
    assert alone.grad.abs().min() > 0
    assert torch.equal(first.grad, alone.grad)
    with torch.no_grad():
        assert not PROCESSOR(first, differentiable=True, do_rescale=False)[0].requires_grad


def test_the_users_tensor_is_unchanged():
    image = floats(3, 8, 8).requires_grad_()
    before = image.detach().clone()
    PROCESSOR(image, differentiable=True, do_rescale=False)[0].sum().backward()
    assert torch.equal(image.detach(), before)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_gradients_reach_images_on_both_sides_of_a_gpu():
    image = floats(3, 50, 70)
    for source in ("cpu", "cuda"):
        leaf = image.to(source, copy=True).requires_grad_()
        pixel_values, grid = PROCESSOR(leaf, differentiable=True, do_rescale=False, device="cuda")
        expected, _ = PROCESSOR(leaf, do_rescale=False, device="cuda")
        assert pixel_values.is_cuda
        assert torch.equal(pixel_values, expected)
        pixel_values.square().sum().backward()
        assert leaf.grad.device == leaf.device
        host = image.clone().requires_grad_()
        PROCESSOR(host, differentiable=True, do_rescale=False)[0].square().sum().backward()
        # Either is off from fp64 by a few millionths of the largest.
        torch.testing.assert_close(leaf.grad.cpu(), host.grad, rtol=1e-4, atol=1e-5 * float(host.grad.abs().max()))
        assert PROCESSOR.unpatchify(pixel_values, grid)[0].is_cuda


@pytest.mark.parametrize(
    ("images", "options", "error", "message"),
    [
        (floats(3, 8, 8), {}, ValueError, "differentiable: expected float images and do_rescale=False"),
        (floats(3, 8, 8), {"do_rescale": False, "resize": "pillow"}, ValueError, "differentiable: .*resize='torch'"),
        (floats(3, 8, 8), {"do_rescale": False, "dtype": torch.float64}, ValueError, "dtype: expected float32"),
        (2 * floats(3, 8, 8), {"do_rescale": False}, ValueError, r"images\[0\]: expected values in \[0, 1\]"),
        (floats(3, 8, 8).double(), {"do_rescale": False}, TypeError, r"images\[0\]: expected float32"),
        (floats(2, 3, 8, 8), {"do_rescale": False}, ValueError, r"pass list\(images\)"),
        (Image.new("RGB", (8, 8)), {"do_rescale": False}, TypeError, "do_rescale=False is for float32"),
        ([], {"do_rescale": False}, ValueError, "images: expected at least one image"),
    ],
)
def test_what_has_no_gradients_is_refused(images, options, error, message):
    with pytest.raises(error, match=message):
        PROCESSOR(images, differentiable=True, **options)


@pytest.mark.parametrize("family", ["qwen2_vl", "qwen3_vl"])
@pytest.mark.parametrize("resize", ["torch", "pillow"])
def test_unpatchified_pixels_are_the_bytes_they_were_cut_from(family, resize):
    processor = ImageProcessor.for_family(family)
    side = processor.factor
    random = np.random.default_rng(0)
    images = [random.integers(0, 256, (rows * side, columns * side, 3), np.uint8) for rows, columns in ((2, 3), (4, 1))]
    pixel_values, grid = processor(images, resize=resize, **BOUNDS)
    found = processor.unpatchify(pixel_values, grid)
    assert len(found) == 2
    for image, one in zip(images, found, strict=True):
        assert one.dtype == torch.float32
        assert np.array_equal((one * 255).round().byte().permute(1, 2, 0).numpy(), image)
        torch.testing.assert_close(one, torch.from_numpy(image).permute(2, 0, 1) / 255, rtol=0, atol=1e-6)


def test_unpatchify_puts_any_values_in_place():
    """Without denormalising: each value of the patches is found where brute force says, and copies are averaged."""
    grid = [[1, 4, 2], [1, 2, 6]]
    values = floats(20, PROCESSOR.patch_dim)
    found = PROCESSOR.unpatchify(values, grid, denormalize=False)
    row = 0
    for image, (_, rows, columns) in zip(found, grid, strict=True):
        assert image.shape == (3, 4 * rows, 4 * columns)
        for top in range(0, rows, 2):
            for left in range(0, columns, 2):
                for down in range(2):
                    for right in range(2):
                        y, x = 4 * (top + down), 4 * (left + right)
                        patch = values[row].view(3, 2, 4, 4)
                        expected = (patch[:, 0] + patch[:, 1]) / 2
                        torch.testing.assert_close(image[:, y : y + 4, x : x + 4], expected)
                        row += 1
    assert row == 20


def test_gradients_flow_through_unpatchify():
    values = floats(8, PROCESSOR.patch_dim).requires_grad_()
    PROCESSOR.unpatchify(values, [[1, 2, 4]])[0].sum().backward()
    expected = torch.tensor([0.2, 0.3, 0.4]).repeat_interleave(32) / 2  # the deviation, shared by two copies
    torch.testing.assert_close(values.grad, expected.expand(8, -1))


def test_a_videos_frames_are_put_together():
    processor = VideoProcessor.for_family("qwen2_vl")
    frames = np.random.default_rng(0).integers(0, 256, (5, 56, 84, 3), np.uint8)
    pixel_values, grid = processor(frames, **BOUNDS)
    assert grid.tolist() == [[3, 4, 6]]
    (found,) = processor.unpatchify(pixel_values, grid)
    restored = (found * 255).round().byte().permute(0, 2, 3, 1).numpy()
    assert np.array_equal(restored[:5], frames)
    assert np.array_equal(restored[5], frames[4])  # repeated to fill the last group
    with pytest.raises(ValueError, match="grid_thw: expected one group of frames for each image"):
        ImageProcessor.for_family("qwen2_vl").unpatchify(pixel_values, grid)


@pytest.mark.parametrize(
    ("values", "grid", "error", "message"),
    [
        (
            torch.zeros(8, 96),
            [[1, 2, 2]],
            ValueError,
            r"expected \[4, 96\] for these grids, got \[8, 96\]",
        ),
        (torch.zeros(4, 95), [[1, 2, 2]], ValueError, r"pixel_values: expected \[4, 96\]"),
        (torch.zeros(4, 96).int(), [[1, 2, 2]], TypeError, "pixel_values: expected a float32"),
        (
            torch.zeros(6, 96),
            [[1, 2, 3]],
            ValueError,
            "grid_thw: expected positive sizes, .* multiples of 2",
        ),
    ],
)
def test_patches_that_fit_no_grid_are_refused(values, grid, error, message):
    with pytest.raises(error, match=message):
        PROCESSOR.unpatchify(values, grid)
