"""Launches of attention on Hopper: TMA descriptors cached by the tensors' addresses, and the tile scheduler's counters.

Segment ends: rows past a segment's end must read as zeros, or a neighbour's infinity would enter the sums. TMA reads
zeros past the end of a dimension only. So a descriptor has, besides rows, heads and channels, two dimensions that only
shift the address, at coordinates 2³⁰ and `end` with strides of 2³⁴ - stride and stride elements. Modulo 2⁶⁴ bytes they
put row i of a segment that ends at row `end` at coordinate 2³⁰ - length + i, and the dimension of rows ends at 2³⁰, as
the segment does. Triton's `tools/ragged_tma.py` does the same.
"""

import inspect
import threading
from collections.abc import Callable
from functools import lru_cache
from itertools import count
from typing import Any

import torch
import triton
from torch import Tensor
from triton import knobs
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor
from triton.runtime import driver

COUNTER_PAIRS = 2**14
"""Pairs of counters in a device's pool. Launches captured when it is used up allocate and zero their own."""

_LAYOUTS = {64: gl.NVMMASharedLayout(128, 16, 5), 16: gl.NVMMASharedLayout(32, 16, 5)}
TensorKey = tuple[int, torch.Size, tuple[int, ...]]
"""A tensor's address, shape and strides."""


class _TensorStandIn:
    """The part of a tensor that Triton's launcher reads from a descriptor: its address and dtype."""

    __slots__ = ("address", "dtype")

    def __init__(self, address: int, dtype: torch.dtype) -> None:
        self.address = address
        self.dtype = dtype

    def data_ptr(self) -> int:
        return self.address


class _UncheckedDescriptor(TensorDescriptor):
    """A descriptor whose constructor skips Triton's checks, which take most of its time."""

    def __init__(self, base: _TensorStandIn, shape: list[int], strides: list[int], rows: int, channels: int) -> None:
        self.base, self.shape, self.strides = base, shape, strides
        self.block_shape, self.layout = [1, 1, 1, rows, channels], _LAYOUTS[channels]


def _descriptors(
    first: TensorKey, rest: TensorKey, box_rows: int, dtype: torch.dtype
) -> tuple[_UncheckedDescriptor, _UncheckedDescriptor] | None:
    """Return descriptors of boxes of `box_rows` rows: of the first 64 channels, and of the 16 or fewer beyond.

    `first` and `rest` may be the same tensor of more than 64 channels; `rest` then starts at its channel 64. With
    head_dim 64 the kernel takes the second descriptor too and does not read it. Return None if TMA cannot address the
    tensors: addresses and strides must be multiples of 16 bytes, and strides positive and below 2³² elements.
    """
    descriptors = []
    for (address, (_, heads, channels), (row_stride, head_stride, _)), box_channels in ((first, 64), (rest, 16)):
        if heads == 1:
            head_stride = channels  # the stride of a single head may be anything
        if address % 16 or any(stride % 8 or not 0 < stride < 2**32 for stride in (row_stride, head_stride)):
            return None
        first_channel = 64 if box_channels == 16 and channels > 64 else 0
        width = min(channels, 64) if box_channels == 64 else channels - first_channel
        shape = [2**31 - 2**16, 2**31 - 2**16, heads, 2**30, width]
        strides = [2**34 - row_stride, row_stride, head_stride, row_stride, 1]
        base = _TensorStandIn(address + 2 * first_channel, dtype)
        descriptors.append(_UncheckedDescriptor(base, shape, strides, box_rows, box_channels))
    return descriptors[0], descriptors[1]


Operand = Tensor | tuple[Tensor, Tensor]
"""Queries, keys or values `[S, H, D]`, or their first 64 channels and the others."""


def operand_key(x: Operand) -> tuple[Any, ...]:
    """Return a tensor's address, shape and strides, or those of both parts: all that a launch depends on."""
    return (x.data_ptr(), x.shape, x.stride()) if isinstance(x, Tensor) else (operand_key(x[0]), operand_key(x[1]))


def contiguous_copy(x: Operand) -> Operand:
    """Copy an operand to contiguous memory, which TMA can address."""
    if isinstance(x, Tensor):
        return x.clone(memory_format=torch.contiguous_format)
    return x[0].clone(memory_format=torch.contiguous_format), x[1].clone(memory_format=torch.contiguous_format)


class TileCounterPool:
    """Pairs of int32 counters on a device, zero before and after each launch: tiles taken, and finished programs.

    Launches of one stream run one after another and share a pair. Each launch captured in a CUDA graph has its own: a
    graph does not overlap with itself, but may with anything else.
    """

    def __init__(self, device: torch.device) -> None:
        self.pairs = torch.zeros(COUNTER_PAIRS, 2, dtype=torch.int32, device=device)
        torch.cuda.current_stream(device).synchronize()  # other streams may use the pairs and do not wait for this one
        self.numbers = count()
        self.pair_of_stream: dict[int, Tensor] = {}

    def pair(self, stream: int, capturing: bool) -> Tensor:
        """Return the pair of a stream, or a new one for a launch that is being captured."""
        pair = None if capturing else self.pair_of_stream.get(stream)
        if pair is None:
            number = next(self.numbers)
            if number >= COUNTER_PAIRS:
                return self.pairs.new_zeros(2)
            pair = self.pairs[number]
            if not capturing:
                self.pair_of_stream[stream] = pair
        return pair


_pools: dict[torch.device, TileCounterPool] = {}
_pools_lock = threading.Lock()


def tile_counters(device: torch.device, stream: int) -> Tensor:
    """Return two int32 zeros for one launch on a stream of the device."""
    capturing = device.type == "cuda" and torch.cuda.is_current_stream_capturing()
    if device not in _pools:
        if capturing or device.type != "cuda":
            return torch.zeros(2, dtype=torch.int32, device=device)
        with _pools_lock:
            if device not in _pools:
                _pools[device] = TileCounterPool(device)
    return _pools[device].pair(stream, capturing)


class Launch:
    """A launch whose operands are fixed, while its stream, output, cu_seqlens and counters are given each time.

    With triton 3.6 it calls the compiled launcher that Triton's Python launcher ends in, and so does not encode the
    descriptors again (TUNING.md). With other versions, whose launchers differ, it calls Triton's Python launcher.
    """

    def __init__(
        self, device: torch.device, descriptors: list[TensorDescriptor], programs: int, scalars: tuple[Any, ...]
    ) -> None:
        self.device = device
        self.descriptors = descriptors
        self.programs = programs
        self.scalars = scalars
        self.kernel: Any = None
        self.native_launcher: Callable[..., None] | None = None

    def set_kernel(self, kernel: Any) -> None:
        """Set the compiled kernel, and prepare the arguments of the native launcher."""
        run = kernel.run
        if triton.__version__.startswith("3.6.") and not run.global_scratch_size and not run.profile_scratch_size:
            from triton.backends.nvidia.driver import make_tensordesc_arg

            descriptors = zip(self.descriptors, kernel.metadata.tensordesc_meta, strict=True)
            self.native_arguments = (
                kernel.function, run.launch_cooperative_grid, run.launch_pdl, None, None, kernel.packed_metadata,
                None, None, None, *(part for x, meta in descriptors for part in make_tensordesc_arg(x, meta)),
            )  # fmt: skip
            self.native_launcher = inspect.getclosurevars(run.launch).nonlocals.get("launcher")
        self.kernel = kernel  # last: other threads launch as soon as it is set

    def arguments(self, out: Tensor, cu_seqlens: Tensor) -> tuple[Any, ...]:
        """Return the kernel's arguments for a launch on the current stream."""
        stream = driver.active.get_current_stream(self.device.index)
        return *self.descriptors, out, cu_seqlens, tile_counters(self.device, stream), *self.scalars

    def __call__(self, out: Tensor, cu_seqlens: Tensor) -> None:
        """Launch on the current stream, with Triton's hooks if any are set."""
        runtime = knobs.runtime
        if self.native_launcher is None or runtime.launch_enter_hook.calls or runtime.launch_exit_hook.calls:
            self.kernel[self.programs, 1, 1](*self.arguments(out, cu_seqlens))
            return
        stream = driver.active.get_current_stream(self.device.index)
        addresses = out.data_ptr(), cu_seqlens.data_ptr(), tile_counters(self.device, stream).data_ptr()
        self.native_launcher(self.programs, 1, 1, stream, *self.native_arguments, *addresses, *self.scalars)


@lru_cache(1024)
def cached_launch(
    q: tuple[Any, ...],
    k: tuple[Any, ...],
    v: tuple[Any, ...],
    device: torch.device,
    dtype: torch.dtype,
    programs: int,
    scalars: tuple[Any, ...],
) -> Launch | None:
    """Return the launch for operands given by `operand_key`; None if TMA cannot address them without a copy."""
    descriptors: list[TensorDescriptor] = []
    for operand, rows in ((q, 64), (k, 128), (v, 128)):
        first, rest = operand if isinstance(operand[0], tuple) else (operand, operand)
        pair = _descriptors(first, rest, rows, dtype)
        if pair is None:
            return None
        descriptors += pair
    return Launch(device, descriptors, programs, scalars)
