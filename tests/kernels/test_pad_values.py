"""Values with channels of ones beside them, against torch's padding, to the last bit."""

import pytest
import torch
import torch.nn.functional as F

from qwenvit.kernels.attention.pad_values import ROWS, pad_with_ones

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.mark.usefixtures("outputs_full_of_nan")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("tokens", "heads"), [(1, 1), (1, 16), (5, 16), (37, 3), (130, 16), (ROWS, 1), (0, 16)])
def test_values_of_a_packed_projection(tokens, heads, dtype):
    qkv = torch.randn(tokens, 3, heads, 72, device=DEVICE, dtype=dtype)
    values = qkv[:, 2, :, 64:]
    padded = pad_with_ones(values)
    assert padded.is_contiguous()
    assert torch.equal(padded, F.pad(values, (0, 8), value=1.0))


@pytest.mark.usefixtures("outputs_full_of_nan")
@pytest.mark.parametrize("offset", [0, 1, 8])
@pytest.mark.parametrize("width", [72, 73, 80, 96])
def test_any_strides_and_addresses(width, offset):
    memory = torch.randn(offset + 20 * 4 * width, device=DEVICE, dtype=torch.bfloat16)
    rows = memory[offset:].view(20, 4, width)
    for values in (rows[..., 64:72], rows.transpose(0, 1)[..., 64:72], rows[::3, 1:3, 3:11]):
        assert torch.equal(pad_with_ones(values), F.pad(values, (0, 8), value=1.0))


@pytest.mark.usefixtures("outputs_full_of_nan")
def test_no_other_number_is_taken_for_a_one():
    """Whatever is beside the values, infinity too, stays out of the channels of ones."""
    qkv = torch.full((20, 3, 2, 88), torch.inf, device=DEVICE, dtype=torch.bfloat16)
    qkv[:, 2, :, 64:72] = 3
    padded = pad_with_ones(qkv[:, 2, :, 64:72])
    assert padded[..., :8].eq(3).all()
    assert padded[..., 8:].eq(1).all()
