"""How attention on Hopper is launched: descriptors and counters, made once for tensors that come again.

Segment ends. Besides rows, heads and channels a descriptor has two dimensions that only move addresses, at coordinates
2³⁰ and `end` with strides of 2³⁴ - stride and stride elements. Modulo 2⁶⁴ bytes, they let row i of a segment that ends
at row `end` stand at coordinate 2³⁰ - length + i, so that the segment ends where the dimension of rows does, and TMA
itself reads zeros from there on: no neighbour's infinity ever comes in. (Triton's `tools/ragged_tma.py` does the same.)
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

COUNTERS = 2**14
"""Launches in CUDA graphs that have counters of their own; those captured later set theirs to zero themselves."""

_LAYOUTS = {64: gl.NVMMASharedLayout(128, 16, 5), 16: gl.NVMMASharedLayout(32, 16, 5)}
Layout = tuple[int, torch.Size, tuple[int, ...]]


class _Address:
    """A tensor as far as a launch asks for it."""

    __slots__ = ("address", "dtype")

    def __init__(self, address: int, dtype: torch.dtype) -> None:
        self.address = address
        self.dtype = dtype

    def data_ptr(self) -> int:
        return self.address


class _Rows(TensorDescriptor):
    """A descriptor without the checks, which take longer than all the rest of it."""

    def __init__(self, base: _Address, shape: list[int], strides: list[int], rows: int, channels: int) -> None:
        self.base, self.shape, self.strides = base, shape, strides
        self.block_shape, self.layout = [1, 1, 1, rows, channels], _LAYOUTS[channels]


def _descriptors(first: Layout, rest: Layout, rows: int, dtype: torch.dtype) -> tuple[_Rows, _Rows] | None:
    """Boxes of `rows` rows: of 64 channels, and of the rest, which begins where 64 end if both are one tensor's.

    Of 64 channels there is no rest, but a kernel's arguments are what they are.
    None if TMA cannot address them: addresses and strides have to be multiples of 16 bytes.
    """
    made = []
    for (address, (_, heads, channels), (row, head, _)), box in ((first, 64), (rest, 16)):
        if heads == 1:
            head = channels  # the stride of a single head may be anything
        if address % 16 or any(stride % 8 or not 0 < stride < 2**32 for stride in (row, head)):
            return None
        skipped = 64 if box == 16 and channels > 64 else 0
        width = min(channels, 64) if box == 64 else channels - skipped
        shape = [2**31 - 2**16, 2**31 - 2**16, heads, 2**30, width]
        base = _Address(address + 2 * skipped, dtype)
        made.append(_Rows(base, shape, [2**34 - row, row, head, row, 1], rows, box))
    return made[0], made[1]


Operand = Tensor | tuple[Tensor, Tensor]


def layout_key(x: Operand) -> tuple[Any, ...]:
    """What a launch depends on: a tensor's address, shape and strides, or those of both parts."""
    return (x.data_ptr(), x.shape, x.stride()) if isinstance(x, Tensor) else (layout_key(x[0]), layout_key(x[1]))


def contiguous_copy(x: Operand) -> Operand:
    """The same in memory that TMA can address."""
    if isinstance(x, Tensor):
        return x.clone(memory_format=torch.contiguous_format)
    return x[0].clone(memory_format=torch.contiguous_format), x[1].clone(memory_format=torch.contiguous_format)


class Counters:
    """Pairs of int32 on a device that are zero before and after each launch: tiles taken, and programs done.

    Launches of one stream follow one another and share a pair. Each launch in a CUDA graph has one to itself: a graph
    does not overlap with itself, but may with anything else.
    """

    def __init__(self, device: torch.device) -> None:
        self.pairs = torch.zeros(COUNTERS, 2, dtype=torch.int32, device=device)
        torch.cuda.current_stream(device).synchronize()  # once, for streams that do not wait for this one
        self.used = count()
        self.of_stream: dict[int, Tensor] = {}

    def take(self, stream: int, capturing: bool) -> Tensor:
        """For a launch on the stream, or one captured there."""
        found = None if capturing else self.of_stream.get(stream)
        if found is None:
            number = next(self.used)
            if number >= COUNTERS:
                return self.pairs.new_zeros(2)
            found = self.pairs[number]
            if not capturing:
                self.of_stream[stream] = found
        return found


_counters: dict[torch.device, Counters] = {}
_CREATING = threading.Lock()


def counter(device: torch.device, stream: int) -> Tensor:
    """Two zeros for one launch on a stream of the device."""
    capturing = device.type == "cuda" and torch.cuda.is_current_stream_capturing()
    if device not in _counters:
        if capturing or device.type != "cuda":
            return torch.zeros(2, dtype=torch.int32, device=device)
        with _CREATING:
            if device not in _counters:
                _counters[device] = Counters(device)
    return _counters[device].take(stream, capturing)


class Launch:
    """A launch but for its stream, output and counters, as triton's launcher in C takes it.

    That launcher is the one that triton's own calls after making each descriptor anew: 7 µs so, and 18 by triton's, on
    the machine of an H200. Known for triton 3.6 only: other versions launch as they please.
    """

    def __init__(
        self, device: torch.device, descriptors: list[TensorDescriptor], programs: int, scalars: tuple[Any, ...]
    ) -> None:
        self.device = device
        self.descriptors = descriptors
        self.programs = programs
        self.scalars = scalars
        self.kernel: Any = None
        self.in_c: Callable[..., None] | None = None

    def bind(self, kernel: Any) -> None:
        """Fix the compiled kernel."""
        run = kernel.run
        if triton.__version__.startswith("3.6.") and not run.global_scratch_size and not run.profile_scratch_size:
            from triton.backends.nvidia.driver import make_tensordesc_arg

            made = zip(self.descriptors, kernel.metadata.tensordesc_meta, strict=True)
            self.prepared = (
                kernel.function, run.launch_cooperative_grid, run.launch_pdl, None, None, kernel.packed_metadata,
                None, None, None, *(part for one, meta in made for part in make_tensordesc_arg(one, meta)),
            )  # fmt: skip
            self.in_c = inspect.getclosurevars(run.launch).nonlocals.get("launcher")
        self.kernel = kernel  # last, for other threads

    def arguments(self, out: Tensor, cu_seqlens: Tensor) -> tuple[Any, ...]:
        """As the kernel itself takes them."""
        stream = driver.active.get_current_stream(self.device.index)
        return *self.descriptors, out, cu_seqlens, counter(self.device, stream), *self.scalars

    def __call__(self, out: Tensor, cu_seqlens: Tensor) -> None:
        """Launch on the current stream."""
        runtime = knobs.runtime
        if self.in_c is None or runtime.launch_enter_hook.calls or runtime.launch_exit_hook.calls:
            self.kernel[self.programs, 1, 1](*self.arguments(out, cu_seqlens))
            return
        stream = driver.active.get_current_stream(self.device.index)
        addresses = out.data_ptr(), cu_seqlens.data_ptr(), counter(self.device, stream).data_ptr()
        self.in_c(self.programs, 1, 1, stream, *self.prepared, *addresses, *self.scalars)


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
    """The launch for operands of these forms; None if TMA cannot read them as they lie."""
    descriptors: list[TensorDescriptor] = []
    for operand, rows in ((q, 64), (k, 128), (v, 128)):
        first, rest = operand if isinstance(operand[0], tuple) else (operand, operand)
        pair = _descriptors(first, rest, rows, dtype)
        if pair is None:
            return None
        descriptors += pair
    return Launch(device, descriptors, programs, scalars)
