"""`to_transformers`: a language model that gets our embeddings says what it says to the pixels."""

import numpy as np
import pytest
import torch
from PIL import Image

from qwenvit.outputs import Embeddings
from support.pinned import needs_pinned_transformers
from support.tiny_models import IMAGE, VIDEO
from support.whole_models import VISION_CHANGES, encoder_of, prompt, whole_model

BOUNDS = {"min_pixels": 56 * 56, "max_pixels": 160 * 160}


@pytest.fixture(scope="module", params=VISION_CHANGES)
def model(request):
    return whole_model(request.param)


@pytest.fixture(scope="module")
def encoder(model):
    return encoder_of(model)


def noise(height, width, seed):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


IMAGES = [noise(64, 100, 0), noise(130, 90, 1), noise(70, 70, 2)]
FRAMES = [noise(96, 64, seed) for seed in range(10, 14)]


def video_parts(item):
    """A video's placeholders: timestamps separate the frame groups of Qwen3 and later."""
    frames, rows, columns = item.grid
    if item.config.traits.video_times != "text":
        return [(len(item.tokens), VIDEO)]
    return [part for _ in range(frames) for part in ((rows * columns, VIDEO), 2)]


def stacked(*prompts):
    return {key: torch.cat([one[key] for one in prompts]) for key in prompts[0]}


def cases(encoder):
    """Yield a prompt, pixel values by the processors, and embeddings: images in two padded rows, a video, both."""
    images, video = encoder.encode(IMAGES, **BOUNDS), encoder.encode_video(FRAMES, frame_times=[0, 0.5, 1, 1.5])
    pixel_values, image_grid = encoder.image_processor(IMAGES, **BOUNDS)
    videos, video_grid = encoder.video_processor(FRAMES)
    of_images = {"pixel_values": pixel_values}, {"image_grid_thw": image_grid}
    of_video = {"pixel_values_videos": videos}, {"video_grid_thw": video_grid}
    if encoder.config.traits.video_times == "positions":
        of_video[1]["second_per_grid_ts"] = torch.tensor([video[0].times.second_per_grid])
    a, b, c = (len(item.tokens) for item in images)
    rows = [(3, (a, IMAGE), 4, (b, IMAGE), 5), (6, (c, IMAGE), 2)]
    length = prompt(*rows[0])["input_ids"].shape[1]
    yield stacked(*(prompt(*row, length=length) for row in rows)), *of_images, images
    yield prompt(3, *video_parts(video[0]), 4), *of_video, video
    both = Embeddings.concatenate([images, video])
    parts = (2, (a, IMAGE), 3, *video_parts(video[0]), 4, (b, IMAGE), 1, (c, IMAGE), 2)
    yield prompt(*parts), of_images[0] | of_video[0], of_images[1] | of_video[1], both


@needs_pinned_transformers
@pytest.mark.parametrize("case", range(3), ids=["images", "a video", "both"])
def test_the_model_says_the_same_as_to_pixels(model, encoder, case):
    inputs, pixels, grids, embeddings = list(cases(encoder))[case]
    embeddings.check_receiver(model.config, inputs["input_ids"])
    for options in ({}, {"num_beams": 3}):
        options |= {"max_new_tokens": 8, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
        expected = model.generate(**inputs, **grids, **pixels, **options)
        found = model.generate(**inputs, **grids, mm_encoder_outputs=embeddings.to_transformers(), **options)
        assert torch.equal(found.sequences, expected.sequences)
        assert len(set(found.sequences[0, -8:].tolist())) > 2  # the model does not repeat one token
        for ours, theirs in zip(found.logits, expected.logits, strict=True):
            torch.testing.assert_close(ours.log_softmax(-1), theirs.log_softmax(-1), rtol=0, atol=1e-4)
    model.model.rope_deltas = None
    spoiled = embeddings.to_transformers()
    for output in spoiled.values():
        output.pooler_output = tuple(tokens * 1.01 for tokens in output.pooler_output)
    wrong = model.generate(**inputs, **grids, mm_encoder_outputs=spoiled, **(options | {"num_beams": 1}))
    right = model.generate(**inputs, **grids, **pixels, **(options | {"num_beams": 1}))
    assert (wrong.logits[0].log_softmax(-1) - right.logits[0].log_softmax(-1)).abs().max() > 1e-4


@needs_pinned_transformers
def test_the_output_has_the_form_of_the_models_own(model, encoder):
    images = encoder.encode(IMAGES, **BOUNDS)
    pixel_values, grid = encoder.image_processor(IMAGES, **BOUNDS)
    with torch.no_grad():
        expected = model.get_image_features(pixel_values, grid, return_dict=True)
    (found,) = images.to_transformers().values()
    assert isinstance(found.pooler_output, tuple)
    torch.testing.assert_close(found.pooler_output, tuple(expected.pooler_output), rtol=1e-4, atol=1e-4)
    if "deepstack_features" in expected:
        assert len(found.deepstack_features) == 2
        for ours, theirs in zip(found.deepstack_features, expected.deepstack_features, strict=True):
            torch.testing.assert_close(ours, tuple(theirs), rtol=1e-4, atol=1e-4)
    else:
        assert not hasattr(found, "deepstack_features")
    (alone,) = images[1].to_transformers().values()
    assert torch.equal(alone.pooler_output[0], images[1].tokens)
