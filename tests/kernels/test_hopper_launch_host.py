"""Launches of attention on Hopper without a GPU: addresses of TMA descriptors, and counters that no launches share."""

from types import SimpleNamespace

import pytest
import torch

from qwenvit.kernels.attention import hopper_launch
from qwenvit.kernels.attention.hopper_launch import cached_launch, contiguous_copy, operand_key
from support.rope_attention_cases import HEAD_DIMS, packed

CPU = torch.device("cpu")


def launch(*operands):
    return cached_launch(*map(operand_key, operands), CPU, torch.bfloat16, 1, ())


def unaligned(x, offset=0, row=0, head=0):
    """Return a copy of `x` `[S, H, D]` whose address is off by `offset` elements, and whose strides are by others."""
    rows, heads, channels = x.shape
    head_stride = channels + head
    row_stride = heads * head_stride + row
    copy = x.new_empty(rows * row_stride + 8)[offset:].as_strided(x.shape, (row_stride, head_stride, 1))
    return copy.copy_(x)


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_descriptors_address_each_row_of_a_segment_and_no_row_past_its_end(head_dim):
    """The coordinates are those of `hopper_producer._copy_rows`; addresses are modulo 2⁶⁴, as the hardware's are.

    TMA reads zeros outside a dimension's size, and the coordinate 2³⁰ is that of the row after the segment.
    """
    operands = packed(40, 3, head_dim, torch.bfloat16, "cpu")
    descriptors = launch(*operands).descriptors
    assert len(descriptors) == 6
    length, end = 7, 30
    for i_operand, x in enumerate(operands):
        parts = zip(descriptors[2 * i_operand :][:2], (0, 64), (64, head_dim - 64), strict=True)
        for descriptor, first_channel, channels in parts:
            if channels == 0:  # with head_dim 64 the kernel does not read it
                continue
            assert descriptor.shape[2:] == [3, 2**30, channels]
            for i_row in (0, length - 1):
                at = (2**30, end, 2, 2**30 - length + i_row, channels - 1)
                elements = sum(index * stride for index, stride in zip(at, descriptor.strides, strict=True))
                last = x[end - length + i_row, 2, first_channel + channels - 1]
                assert (descriptor.base.data_ptr() + 2 * elements) % 2**64 == last.data_ptr()


@pytest.mark.parametrize("wrong", [{"offset": 1}, {"row": 4}, {"head": 4}, {"row": 8, "head": 2}], ids=str)
@pytest.mark.parametrize("operand", range(3), ids="qkv")
def test_what_tma_cannot_address_is_copied_first(wrong, operand):
    operands = list(packed(20, 2, 72, torch.bfloat16, "cpu"))
    assert launch(*operands) is not None
    operands[operand] = unaligned(operands[operand], **wrong)
    assert launch(*operands) is None
    copies = [contiguous_copy(x) for x in operands]
    assert launch(*copies) is not None
    assert all(map(torch.equal, copies, operands))


@pytest.mark.parametrize("part", range(2))
def test_both_parts_of_an_operand_must_be_aligned(part):
    x = torch.randn(20, 2, 80).bfloat16()
    parts = [x[..., :64].contiguous(), x[..., 64:].contiguous()]
    aligned = tuple(parts)
    parts[part] = unaligned(parts[part], row=4)
    assert launch(aligned, aligned, aligned) is not None
    for i in range(3):
        operands = [aligned] * 3
        operands[i] = tuple(parts)
        assert launch(*operands) is None
        copy = contiguous_copy(operands[i])
        assert all(map(torch.equal, copy, operands[i]))
        assert launch(*[copy] * 3) is not None


def test_a_stride_of_zero_or_of_two_to_the_32_is_copied_first():
    for row, head in ((0, 64), (128, 0), (2**32, 64), (128, 2**32)):
        key = (0, torch.Size((20, 2, 64)), (row, head, 1))
        assert cached_launch(key, key, key, CPU, torch.bfloat16, 1, ()) is None
    single_head = (0, torch.Size((20, 1, 64)), (128, 3, 1))  # the stride of one head is never used
    assert cached_launch(single_head, single_head, single_head, CPU, torch.bfloat16, 1, ()) is not None


@pytest.fixture
def make_pool(monkeypatch):
    """Return a function that makes a pool of a number of pairs."""
    monkeypatch.setattr(torch.cuda, "current_stream", lambda _: SimpleNamespace(synchronize=lambda: None))

    def make(pairs):
        monkeypatch.setattr(hopper_launch, "COUNTER_PAIRS", pairs)
        return hopper_launch.TileCounterPool(CPU)

    return make


def test_a_stream_keeps_its_counters_and_a_captured_launch_shares_none(make_pool):
    """A graph may run beside the stream on which it was captured, and beside other graphs."""
    pool = make_pool(8)
    launches = [(1, False), (1, True), (1, False), (1, True), (2, True), (2, False), (2, False), (1, False)]
    addresses = [pool.pair(stream, capturing).data_ptr() for stream, capturing in launches]
    own = [addresses[i] for i in (0, 1, 3, 4, 5)]
    assert len(set(own)) == len(own)
    assert [addresses[i] for i in (2, 6, 7)] == [addresses[i] for i in (0, 5, 0)]


@pytest.mark.parametrize("capturing", [True, False])
@pytest.mark.parametrize("pairs", [1, 3])
def test_all_pairs_of_the_pool_are_used_and_then_others(make_pool, pairs, capturing):
    pool = make_pool(pairs)
    in_pool = {pool.pairs.data_ptr() + 8 * i for i in range(pairs)}
    kept = [pool.pair(stream, capturing) for stream in range(pairs + 2)]
    addresses = [pair.data_ptr() for pair in kept]
    assert len(set(addresses)) == pairs + 2
    assert set(addresses[:pairs]) == in_pool
    assert all(pair.tolist() == [0, 0] and pair.dtype == torch.int32 for pair in kept)
