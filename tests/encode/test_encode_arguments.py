"""Arguments of `encode` and `iter_encode`: refused at the call, by name, and passed on by the default encoder."""

import pytest
import torch

import qwenvit
from support.image_streams import noise


@pytest.mark.parametrize("nothing", [[], (), iter([]), (image for image in ())])
def test_no_image_at_all(demo, nothing):
    with pytest.raises(ValueError, match=r"^images: expected at least one image, got none$"):
        demo.encode(nothing)
    with pytest.raises(ValueError, match=r"^images: expected at least one image, got none$"):
        list(demo.iter_encode(iter(())))


BAD_ARGUMENTS = [
    ({"num_workers": -1}, ValueError, "num_workers: expected None or an integer of at least 0, got -1"),
    ({"num_workers": True}, ValueError, "num_workers: expected None or an integer of at least 0, got True"),
    ({"on_error": "ignore"}, ValueError, "on_error: expected 'raise' or 'skip', got 'ignore'"),
    ({"decode": "x"}, ValueError, "decode: expected 'pillow' or 'nvjpeg', got 'x'"),
    ({"decode": "nvjpeg"}, ValueError, "decode: 'nvjpeg' needs a tower on a GPU, got one on cpu"),
    ({"max_token": 3}, TypeError, "options: expected only .*, got max_token"),
    ({"min_pixels": 10**6, "max_pixels": 10**5}, ValueError, "min_pixels=1000000 is above max_pixels=100000"),
    ({"resize": "nearest"}, ValueError, "resize: expected 'pillow' or 'torch', got 'nearest'"),
]


@pytest.mark.parametrize(("arguments", "error", "message"), BAD_ARGUMENTS)
def test_bad_arguments_are_refused_at_the_call(demo, arguments, error, message):
    images = iter([noise(32, 64)])
    for encode in (demo.encode, demo.iter_encode):
        with pytest.raises(error, match=f"^{message}"):
            encode(images, **arguments)
    assert len(list(images)) == 1  # none was drawn


@pytest.mark.filterwarnings("ignore:model='demo'")
def test_the_default_encoder_passes_everything_on(capsys):
    images = [noise(32, 64), b"no image", noise(64, 32)]
    options = {"model": "demo", "device": "cpu", "on_error": "skip", "num_workers": 2, "max_tokens": 4}
    with pytest.warns(UserWarning, match=r"skipped images\[1\]"):
        out = qwenvit.encode(images, **options, progress=True)
    assert [item and len(item.tokens) for item in out] == [2, None, 2]
    assert "3/3" in capsys.readouterr().err


@pytest.mark.parametrize(("arguments", "error", "message"), BAD_ARGUMENTS[:6])
def test_the_default_encoder_refuses_bad_arguments_before_the_model_is_loaded(arguments, error, message):
    with pytest.raises(error, match=f"^{message}"):
        qwenvit.encode(noise(32, 64), model="no-such-model", device="cpu", **arguments)


def test_an_unknown_option_is_named(demo):
    with pytest.raises(TypeError, match="got device"):
        demo.encode(noise(32, 64), device="cpu")


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int64, torch.complex64, torch.float64])
def test_pixel_values_have_a_dtype_of_towers(demo, dtype):
    for processor, images in ((demo.image_processor, noise(32, 64)), (demo.video_processor, [noise(32, 64)] * 2)):
        with pytest.raises(ValueError, match="dtype: expected float32, bfloat16 or float16"):
            processor(images, dtype=dtype)
