"""Images that travel as RGB bytes to a tower in vLLM: their pixel values must be transformers', bit by bit."""

from copy import deepcopy

import pytest
import torch
from PIL import Image
from transformers import LlavaOnevisionImageProcessor, Qwen2VLImageProcessor
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from qwenvit.integrations.vllm.pixel_images import returning_bytes
from qwenvit.integrations.vllm.pixel_model import PixelModel
from qwenvit.integrations.vllm.pixel_rule import RGB, RGB_SIZE, read_rule
from support.vllm_pictures import noise, picture

HALF = [0.5, 0.5, 0.5]
QWEN3 = {
    "patch_size": 16,
    "image_mean": HALF,
    "image_std": HALF,
    "size": {"shortest_edge": 65536, "longest_edge": 16777216},
}
OFF = {"do_rescale": False, "do_normalize": False}
"""What vLLM passes where its tower normalises."""
IMAGES = [
    picture(300, 411),
    picture(90, 71, "RGBA"),
    picture(1, 1),
    picture(640, 853),
    picture(90, 71, "P"),
    noise(90, 71, 3),
]


@pytest.fixture(params=[Qwen2VLImageProcessor, Qwen2VLImageProcessorPil])
def kind(request):
    return request.param


class Processor:
    """In place of transformers' whole processor."""

    def __init__(self, image_processor):
        self.image_processor = image_processor


def bytes_of(image_processor, dtype=torch.float32):
    """Return the image processor that returns bytes, and the rule of its pixel values."""
    rule = read_rule(image_processor, dtype)
    return returning_bytes(Processor(image_processor), rule).image_processor, rule


@pytest.mark.parametrize("settings", [{}, QWEN3], ids=["qwen2_5_vl", "qwen3_vl"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.uint8])
@pytest.mark.parametrize(
    "bounds", [{}, {"size": {"shortest_edge": 20_000, "longest_edge": 400_000}}], ids=["own", "size"]
)
def test_pixel_values_are_transformers(kind, settings, dtype, bounds):
    theirs = kind(**settings)
    ours, rule = bytes_of(theirs, dtype)
    options = bounds | (OFF if dtype == torch.uint8 else {})
    expected = theirs(IMAGES, return_tensors="pt", **options)
    found = ours(IMAGES, return_tensors="pt", **options)
    assert set(found) == {RGB, RGB_SIZE, "image_grid_thw"}
    assert found[RGB].dtype == torch.uint8
    assert torch.equal(found["image_grid_thw"], expected["image_grid_thw"])
    values = rule.pixel_values(found[RGB], found[RGB_SIZE], found["image_grid_thw"].tolist())
    assert values.dtype == dtype
    assert torch.equal(values, expected["pixel_values"].to(dtype))


@pytest.mark.parametrize(
    ("images", "options"),
    [
        ([torch.from_numpy(noise(3, 90, 71)) / 255], {"do_rescale": False}),
        ([picture(224, 224)], {"do_resize": False}),
        ([picture(90, 71)], {"image_mean": [0.1, 0.2, 0.3]}),
        ([picture(90, 71)], {"image_std": HALF}),
        ([picture(90, 71)], {"do_normalize": False}),
        ([picture(90, 71)], {"rescale_factor": 1 / 127}),
        ([picture(90, 71)], {"resample": Image.Resampling.BILINEAR}),
        ([picture(90, 71)], {"merge_size": 1}),
        ([picture(90, 71)], OFF),
        ([picture(90, 71), picture(640, 853)], {"size": {"shortest_edge": 20_000, "longest_edge": 60_000}}),
    ],
)
def test_other_pixel_values_are_computed_by_transformers(kind, images, options):
    theirs = kind()
    ours, _ = bytes_of(theirs)
    if kind is Qwen2VLImageProcessorPil:
        images = [image.numpy() if isinstance(image, torch.Tensor) else image for image in images]
    expected, found = (one(images, return_tensors="pt", **options) for one in (theirs, ours))
    assert set(found) == {"pixel_values", "image_grid_thw"}
    assert torch.equal(found["pixel_values"], expected["pixel_values"])


@pytest.mark.parametrize(("dtype", "least"), [(torch.float32, 144), (torch.bfloat16, 208), (torch.uint8, 288)])
def test_no_more_bytes_travel_than_those_of_the_pixel_values(kind, dtype, least):
    """vLLM bounds pixel values, of 2·3 numbers for each pixel after resizing; an image may be any size before."""
    for side, area, expected in ((400, least**2, RGB), (400, least**2 - 1, "pixel_values")):
        bounds = {"size": {"shortest_edge": 784, "longest_edge": area}}
        ours, _ = bytes_of(kind(patch_size=8, **bounds), dtype)
        found = ours([picture(side, side)], return_tensors="pt", **(OFF if dtype == torch.uint8 else {}))
        assert expected in found


@pytest.mark.parametrize(
    "image", [noise(90, 71, 3), noise(3, 90, 71), torch.from_numpy(noise(90, 71, 3)).permute(2, 0, 1)]
)
def test_the_callers_memory_is_copied(kind, image):
    image = deepcopy(image)  # the next test needs it as it was
    if kind is Qwen2VLImageProcessorPil and isinstance(image, torch.Tensor):
        image = image.numpy()
    found = bytes_of(kind())[0](image)[RGB]
    before = found.clone()
    image[:] = 0
    assert torch.equal(found, before)


def test_what_else_transformers_asks_of_the_processor(kind):
    theirs = kind(**QWEN3)
    ours, _ = bytes_of(theirs)
    assert isinstance(ours, kind)
    described, expected = ours.to_dict(), theirs.to_dict()
    assert {**described, "image_processor_type": expected["image_processor_type"]} == expected
    assert str(ours)
    assert (ours.size, ours.merge_size, ours.model_input_names) == (
        theirs.size,
        theirs.merge_size,
        theirs.model_input_names,
    )
    assert ours.get_number_of_image_patches(300, 411) == theirs.get_number_of_image_patches(300, 411)


@pytest.mark.parametrize(
    ("image_processor", "message"),
    [
        (Qwen2VLImageProcessor(do_resize=False), "do_resize: only True"),
        (Qwen2VLImageProcessor(do_normalize=False), "do_normalize: only True"),
        (Qwen2VLImageProcessor(resample=2), "resample: only 3"),
        (LlavaOnevisionImageProcessor(), "image processor: expected .*Qwen2VLImageProcessor.*, got .*LlavaOnevision"),
        (type("Qwen2VLImageProcessor", (Qwen2VLImageProcessor,), {})(), "image processor: expected"),
    ],
)
def test_processors_that_are_not_reproduced(image_processor, message):
    with pytest.raises(ValueError, match=message):
        read_rule(image_processor, torch.float32)


class Model:
    def embed_multimodal(self, **kwargs):
        return kwargs

    def select_encoder_cudagraph_items(self, mm_kwargs, indices):
        return {"own": mm_kwargs, "indices": indices}


class Ours(PixelModel, Model):
    pass


@pytest.fixture
def batch():
    theirs = Qwen2VLImageProcessor()
    ours, rule = bytes_of(theirs)
    images = IMAGES[:3]
    model = Ours()
    model.qwenvit_pixels = rule
    return model, ours(images, return_tensors="pt"), theirs(images, return_tensors="pt")


def test_a_model_gets_pixel_values(batch):
    model, found, expected = batch
    answer = model.embed_multimodal(video_embeds=1, **found, pixel_values_videos=2)
    # vLLM embeds modalities in the order of the keys.
    assert [key for key in answer if key != "image_grid_thw"] == ["video_embeds", "pixel_values", "pixel_values_videos"]
    assert torch.equal(answer["pixel_values"], expected["pixel_values"])
    assert torch.equal(answer["image_grid_thw"], expected["image_grid_thw"])
    assert model.embed_multimodal(**expected).keys() == expected.keys()


@pytest.mark.parametrize("indices", [[0, 1, 2], [2, 0], [1], []])
def test_items_for_encoder_cudagraphs(batch, indices):
    model, found, expected = batch
    chosen = model.select_encoder_cudagraph_items(dict(found), indices)
    grids = expected["image_grid_thw"]
    parts = expected["pixel_values"].split(grids.prod(1).tolist())
    assert chosen["image_grid_thw"] == [grids[index].tolist() for index in indices]
    assert torch.equal(chosen["pixel_values"], torch.cat([parts[0][:0], *(parts[index] for index in indices)]))
    assert model.select_encoder_cudagraph_items({"pixel_values": 1}, indices) == {
        "own": {"pixel_values": 1},
        "indices": indices,
    }


def test_bytes_without_a_rule_are_refused(batch):
    _, found, _ = batch
    with pytest.raises(ValueError, match="image_rgb: expected pixel values"):
        Ours().embed_multimodal(**found)
