"""Pixel values computed on a GPU equal those computed on the CPU, to the last bit.

Without a GPU, the same processors run the operation's plain torch on the CPU instead of their resizing there.
"""

from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from transformers import Qwen2VLImageProcessor
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from qwenvit import ops
from qwenvit.config.families import FAMILIES
from qwenvit.ops.reference import cut_patches
from qwenvit.preprocess.decode import open_image
from qwenvit.preprocess.image_processor import ImageProcessor

GPU = torch.cuda.is_available()
needs_gpu = pytest.mark.skipif(not GPU, reason="needs a GPU")
BACKENDS = ["pillow", "torch"]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
PIL_KINDS = ["RGB", "RGBA", "LA", "L", "1", "P", "P, one transparent", "P, all translucent", "CMYK"]
ARRAY_KINDS = [
    f"{wrap}, {layout}, {count}" for wrap in ("array", "tensor") for layout in ("CHW", "HWC") for count in (1, 3, 4)
]
KINDS = [*PIL_KINDS, *ARRAY_KINDS, "array, HW, 1"]


def sides(limit: int) -> st.SearchStrategy[int]:
    """Return sides up to a limit, as many between 1 and 2 pixels as between 1,000 and 2,000."""
    octaves = st.integers(0, limit.bit_length() - 1)
    return octaves.flatmap(lambda octave: st.integers(2**octave, min(2 ** (octave + 1) - 1, limit)))


def sizes(limit: int) -> st.SearchStrategy[tuple[int, int]]:
    """Return heights and widths, one at most 200 times the other."""
    pairs = st.tuples(sides(limit), sides(limit))
    return pairs.map(lambda size: tuple(max(side, -(-max(size) // 200)) for side in size))


def noise(*shape: int, seed: int = 0) -> np.ndarray:
    """Return noise of all levels, in its lower half of black and white: bicubic interpolation overshoots there."""
    values = np.frombuffer(np.random.default_rng(seed).bytes(int(np.prod(shape))), np.uint8).reshape(shape).copy()
    half = values[shape[0] // 2 :]
    half[:] = half // 128 * 255
    return values


def picture(kind: str, height: int, width: int, seed: int) -> Image.Image:
    mode, _, transparency = kind.partition(", ")
    if mode == "P":
        image = Image.fromarray(noise(height, width, seed=seed), "P")
        image.putpalette(noise(768, seed=seed).tobytes())
        if transparency:
            image.info["transparency"] = 3 if transparency == "one transparent" else bytes(range(256))
        return image
    if mode == "1":
        return Image.fromarray(noise(height, width, seed=seed)).convert("1")
    bands = noise(height, width, len(Image.new(mode, (1, 1)).getbands()), seed=seed)
    return Image.frombytes(mode, (width, height), bands.tobytes())


def make_image(kind: str, height: int, width: int, seed: int) -> tuple[object, dict]:
    """Return an image of one of `KINDS` and the options to pass for it."""
    if kind in PIL_KINDS:
        return picture(kind, height, width, seed), {}
    wrap, layout, count = kind.split(", ")
    shape = {"HWC": (height, width, int(count)), "CHW": (int(count), height, width), "HW": (height, width)}[layout]
    array = noise(*shape, seed=seed)
    options = {} if layout == "HW" else {"channels": "first" if layout == "CHW" else "last"}
    return (torch.from_numpy(array) if wrap == "tensor" else array), options


@st.composite
def cases(draw: st.DrawFn, limit: int) -> dict:
    return {
        "size": draw(
            sizes(min(limit, draw(st.sampled_from([60, 400, 4000]))))
        ),  # the CPU takes a second for a large one
        "kind": draw(st.sampled_from(KINDS)),
        "family": draw(st.sampled_from(sorted(FAMILIES))),
        "backend": draw(st.sampled_from(BACKENDS)),
        "dtype": draw(st.sampled_from(DTYPES)),
        "bounds": draw(st.sampled_from([{}, {}, {"max_pixels": 20_000}, {"max_tokens": 9}, {"min_pixels": 90_000}])),
        "seed": draw(st.integers(0, 99)),
    }


class ClaimsGPU(torch.Tensor):
    """A tensor on the CPU that claims to be on a GPU, so that a processor computes as it does there."""

    is_cuda = True


def run_as_on_gpu(processor: ImageProcessor, image: object, dtype: torch.dtype, channels: str | None) -> torch.Tensor:
    """Return `pixel_values` by the operation in plain torch, and see that the processor called it."""
    frames = open_image(image, channels=channels, backend=processor.resize)[None]
    grid = processor.grid_for(*frames.shape[2:])
    out = torch.full(
        (int(np.prod(grid)), processor.patch_dim), torch.nan if dtype.is_floating_point else 77, dtype=dtype
    )
    calls = []

    def resize_patches(frames: torch.Tensor, *sizes: object, **options: object) -> torch.Tensor:
        calls.append(options["rule"])
        return original(frames.as_subclass(torch.Tensor), *sizes, **options)

    original = partial(ops.resize_patches, impl="reference")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ops, "resize_patches", resize_patches)
        processor.write_patches(frames.as_subclass(ClaimsGPU), grid, processor.resize, out)
    assert calls == [processor.resize]
    return out


def check(
    size: tuple[int, int], kind: str, family: str, backend: str, dtype: torch.dtype, bounds: dict, seed: int
) -> None:
    processor = ImageProcessor.for_family(family)
    image, options = make_image(kind, *size, seed)
    expected, expected_grids = processor(image, resize=backend, **bounds, **options)
    if not GPU:
        bounded = ImageProcessor(**vars(processor.with_bounds(**bounds)) | {"resize": backend})
        found = run_as_on_gpu(bounded, image, dtype, options.get("channels"))
        assert torch.equal(found, expected.to(dtype))
        return
    images = [image]
    if isinstance(image, torch.Tensor):
        images.append(image.cuda())
    for one in images:
        found, grids = processor(one, device="cuda", dtype=dtype, resize=backend, **bounds, **options)
        assert (found.is_cuda, grids.is_cuda, found.dtype) == (True, False, dtype)
        assert torch.equal(grids, expected_grids)
        assert torch.equal(found.cpu(), expected.to(dtype))


@settings(max_examples=2000 if GPU else 100, deadline=None)
@given(case=cases(4000 if GPU else 200))
def test_pictures_of_any_kind_and_size(case: dict) -> None:
    check(**case)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_image(kind: str, backend: str) -> None:
    for dtype in DTYPES:
        check((75, 110), kind, "qwen3_vl", backend, dtype, {"max_pixels": 9000}, 0)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("family", sorted(FAMILIES))
@pytest.mark.parametrize("size", [(480, 640), (640, 480), (1, 200), (200, 1), (1, 1), (56, 64)])
def test_processors_of_every_family(family: str, backend: str, size: tuple[int, int]) -> None:
    check(size, "RGB", family, backend, torch.bfloat16, {}, 0)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("family", ["qwen2_5_vl", "qwen3_vl"])
def test_every_byte_value(family: str, dtype: torch.dtype, backend: str) -> None:
    processor = ImageProcessor.for_family(family).with_bounds(min_pixels=1)
    side = 2 * processor.factor
    image = np.arange(side * side * 3, dtype=np.uint8).reshape(side, side, 3)  # 3 and 256 have no common factor
    expected, _ = processor(image, resize=backend)
    assert expected.unique().numel() == (256 if family == "qwen3_vl" else 3 * 256)
    if GPU:
        found, _ = processor(image, resize=backend, device="cuda", dtype=dtype)
    else:
        found = run_as_on_gpu(ImageProcessor(**vars(processor) | {"resize": backend}), image, dtype, None)
    assert torch.equal(found.cpu(), expected.to(dtype))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("size", [(75, 110), (480, 640), (640, 480), (112, 112), (1, 1)])
def test_bytes_that_something_else_normalises(size: tuple[int, int], backend: str) -> None:
    theirs = {"torch": Qwen2VLImageProcessor, "pillow": Qwen2VLImageProcessorPil}[backend]()
    image = picture("RGB", *size, 0)
    expected = theirs(image, do_rescale=False, do_normalize=False, return_tensors="pt")["pixel_values"]
    processor = ImageProcessor.from_hf(theirs.to_dict() | {"image_processor_type": type(theirs).__name__})
    frames = open_image(image)[None]
    out = torch.full(expected.shape, 77, dtype=torch.uint8)
    processor.write_patches(frames, processor.grid_for(*size), backend, out)
    assert torch.equal(out, expected.to(torch.uint8))
    if GPU:
        found = torch.full_like(out, 77, device="cuda")
        processor.write_patches(frames.cuda(), processor.grid_for(*size), backend, found)
    else:
        found = run_as_on_gpu(processor, image, torch.uint8, None)
    assert torch.equal(found.cpu(), out)


@needs_gpu
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_call_with_images_of_every_kind(backend: str) -> None:
    processor = ImageProcessor.for_family("qwen2_5_vl")
    images = [picture(kind, 60 + 9 * index, 150, index) for index, kind in enumerate(PIL_KINDS)]
    images += [noise(70, 80, 4), torch.from_numpy(noise(3, 50, 90)), torch.from_numpy(noise(90, 50, 1))]
    expected, expected_grids = processor(images, resize=backend)
    images[-2:] = [image.cuda() for image in images[-2:]]
    found, grids = processor(iter(images), resize=backend, device="cuda", dtype=torch.bfloat16)
    assert torch.equal(grids, expected_grids)
    assert torch.equal(found.cpu(), expected.bfloat16())


@needs_gpu
@pytest.mark.parametrize("backend", BACKENDS)
@settings(max_examples=50, deadline=None)
@given(size=sizes(1000), channels=st.sampled_from([1, 3, 4]), seed=st.integers(0, 99))
def test_floats_on_the_cpu(backend: str, size: tuple[int, int], channels: int, seed: int) -> None:
    """They are resized on the CPU: the GPU's sums would round differently."""
    processor = ImageProcessor.for_family("qwen3_vl")
    image = np.random.default_rng(seed).random((*size, channels), np.float32)
    options = {"do_rescale": False, "resize": backend, "channels": "last"}
    expected, _ = processor(image, **options)
    for one in (image, torch.from_numpy(image)):
        found, _ = processor(one, device="cuda", dtype=torch.float16, **options)
        assert torch.equal(found.cpu(), expected.half())


@needs_gpu
@settings(max_examples=50, deadline=None)
@given(size=sizes(1000), channels=st.sampled_from([1, 3, 4]), seed=st.integers(0, 99))
def test_floats_on_the_gpu_by_pillows_rule(size: tuple[int, int], channels: int, seed: int) -> None:
    processor = ImageProcessor.for_family("qwen3_vl")
    image = torch.from_numpy(np.random.default_rng(seed).random((channels, *size), np.float32))
    options = {"do_rescale": False, "resize": "pillow", "channels": "first"}
    expected, _ = processor(image, **options)
    found, _ = processor(image.cuda(), device="cuda", **options)
    assert torch.equal(found.cpu(), expected)


@needs_gpu
@settings(max_examples=50, deadline=None)
@given(size=sizes(1000), seed=st.integers(0, 99))
def test_floats_on_the_gpu_by_torchs_rule(size: tuple[int, int], seed: int) -> None:
    processor = ImageProcessor.for_family("qwen2_5_vl")
    image = torch.from_numpy(np.random.default_rng(seed).random((3, *size), np.float32)).cuda()
    found, grids = processor(image, device="cuda", do_rescale=False, resize="torch", channels="first")
    new_size = [side * processor.patch_size for side in grids[0, 1:].tolist()]
    resized = F.interpolate(image[None], new_size, mode="bicubic", antialias=True)
    mean, std = (image.new_tensor(values)[:, None, None] for values in (processor.image_mean, processor.image_std))
    normalised = ((resized - mean) / std).expand(processor.temporal_patch_size, -1, -1, -1)
    expected = cut_patches(normalised, processor.patch_size, processor.temporal_patch_size, processor.merge_size)
    torch.testing.assert_close(found, expected.flatten(1), rtol=1e-5, atol=1e-5)
