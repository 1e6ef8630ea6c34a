"""Arrays and tensors that are no block of values in memory: refused by name, or opened as what they mean."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from qwenvit.preprocess.decode import each_image, open_image, snapshot
from qwenvit.preprocess.image_processor import ImageProcessor
from qwenvit.preprocess.video_frames import sized_frames
from support.pictures import noise

BYTES, FLOATS = torch.from_numpy(noise(3, 20, 30)), torch.rand(3, 20, 30)


def nested(layout: torch.layout) -> torch.Tensor:
    return torch.nested.nested_tensor([FLOATS[0], FLOATS[1, :10]], layout=layout)


UNUSABLE: dict[str, tuple[Callable[[], torch.Tensor], type[Exception], str]] = {
    "meta": (lambda: BYTES.to("meta"), ValueError, "expected a tensor with values, got one on the meta device"),
    "meta-floats": (lambda: FLOATS.to("meta"), ValueError, "got one on the meta device"),
    "sparse": (BYTES.to_sparse, TypeError, "expected a dense tensor, got a tensor that is torch.sparse_coo"),
    "rows": (BYTES[0].to_sparse_csr, TypeError, "expected a dense tensor, got a tensor that is torch.sparse_csr"),
    "blocked": (FLOATS.to_mkldnn, TypeError, "expected a dense tensor, got a tensor that is torch._mkldnn"),
    "nested": (lambda: nested(torch.strided), TypeError, "expected a dense tensor, got a tensor that is nested"),
    "jagged": (lambda: nested(torch.jagged), TypeError, "expected a dense tensor, got a tensor that is nested"),
    "quantised": (
        lambda: torch.quantize_per_tensor(FLOATS, 1 / 255, 0, torch.quint8),
        TypeError,
        "expected a dense tensor, got a tensor that is quantised",
    ),
    "complex": (lambda: FLOATS.to(torch.complex64), TypeError, "got complex64"),
    "giant": (lambda: BYTES[:, :1, :1].expand(3, 10**6, 10**6), ValueError, r"expected an array in memory of its own"),
    "giant-grey": (
        lambda: BYTES[0, :1, :1].expand(10**6, 10**6),
        ValueError,
        r"got shape \[1000000, 1000000\] in 1 by",
    ),
    "overlapping": (
        lambda: torch.zeros(10**6, dtype=torch.uint8).as_strided((3, 10**5, 10**5), (0, 1, 1)),
        ValueError,
        r"got shape \[3, 100000, 100000\] in 199999 bytes",
    ),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("do_rescale", [True, False])
@pytest.mark.parametrize("copy", [lambda image: image, snapshot], ids=["given", "copied"])
@pytest.mark.parametrize("case", UNUSABLE)
def test_unusable_tensors_are_refused_by_name(case: str, copy: Callable, do_rescale: bool) -> None:
    make, kind, message = UNUSABLE[case]
    with pytest.raises(kind, match=rf"^images\[7\]: .*{message}"):
        open_image(copy(make()), do_rescale=do_rescale, channels="first", name="images[7]")


@pytest.mark.parametrize("shape", [(10**5, 10**5), (10**5, 10**5, 3), (3, 10**5, 10**5)])
@pytest.mark.parametrize("copy", [lambda image: image, snapshot], ids=["given", "copied"])
def test_giants_of_numpy_are_refused_by_name(shape: tuple[int, ...], copy: Callable) -> None:
    giant = np.broadcast_to(np.uint8(3), shape)
    with pytest.raises(ValueError, match=r"^x: expected an array in memory of its own, or of at most \d+ pixels"):
        open_image(copy(giant), name="x")


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("case", ["meta", "sparse"])
def test_several_in_one_unusable_tensor_are_refused_by_name(case: str) -> None:
    make, kind, message = UNUSABLE[case]
    images = torch.stack([make(), make()])
    with pytest.raises(kind, match=rf"^images: {message}"):
        list(each_image(images))
    with pytest.raises(kind, match=rf"^frames: {message}"):
        sized_frames(images)


@pytest.mark.parametrize("layout", [torch.strided, torch.jagged])
def test_images_of_several_sizes_in_one_tensor_are_refused_by_name(layout: torch.layout) -> None:
    images = torch.nested.nested_tensor([FLOATS, FLOATS[:, :10]], layout=layout)
    with pytest.raises(TypeError, match=r"^images: expected a dense tensor, got a tensor that is nested"):
        list(each_image(images))
    with pytest.raises(TypeError, match=r"^frames: expected a dense tensor, got a tensor that is nested"):
        sized_frames(images)


@settings(max_examples=100, deadline=None)
@given(st.data())
def test_views_are_opened_as_their_copies(data: st.DataObject) -> None:
    base = noise(6, 12, 12)
    side = st.integers(1, 12)
    height, width = data.draw(side), data.draw(side)
    steps = data.draw(
        st.tuples(st.sampled_from([0, 1, 2, 36]), st.sampled_from([0, 1, 3, 12]), st.sampled_from([0, 1]))
    )
    view = torch.from_numpy(base).view(-1).as_strided((3, height, width), steps)
    expected = view.clone(memory_format=torch.contiguous_format)
    for one in (view, view.numpy()):
        assert torch.equal(open_image(one, channels="first"), expected)
        assert torch.equal(open_image(snapshot(one), channels="first"), expected)


def test_what_a_tensor_means_is_opened() -> None:
    imaginary = torch.complex(FLOATS, -FLOATS).conj().imag  # stored as its negative
    assert imaginary.is_neg()
    for tensor in (FLOATS.clone().requires_grad_(), torch.nn.Parameter(FLOATS), imaginary):
        opened = open_image(tensor, do_rescale=False)
        assert torch.equal(opened, FLOATS)
        assert not opened.requires_grad
    prepare = ImageProcessor.for_family("qwen2_vl")
    for processed, expected in zip(
        prepare(imaginary, do_rescale=False), prepare(FLOATS, do_rescale=False), strict=True
    ):
        assert torch.equal(processed, expected)


def test_a_still_may_be_repeated_as_a_video() -> None:
    frames = np.broadcast_to(noise(100, 100, 3), (10**6, 100, 100, 3))
    assert sized_frames(frames) is frames


def test_the_limit_of_giants_is_pillows(monkeypatch: pytest.MonkeyPatch) -> None:
    view = BYTES[0, :1, :1].expand(3, 20, 30)
    assert torch.equal(open_image(view), view)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 599)
    with pytest.raises(ValueError, match="or of at most 599 pixels"):
        open_image(view)
    assert torch.equal(open_image(view.contiguous()), view)  # in memory already
    assert torch.equal(open_image(BYTES[:1].expand(3, 20, 30)), BYTES[:1].expand(3, 20, 30))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)
    assert torch.equal(open_image(view), view)
