"""How attention on Hopper is launched: descriptors and counters, made once for tensors that come again.

Segment ends. Besides rows, heads and channels a descriptor has two dimensions that only move addresses, at coordinates
2³⁰ and `end` with strides of 2³⁴ - stride and stride elements. Modulo 2⁶⁴ bytes, they let row i of a segment that ends
at row `end` stand at coordinate 2³⁰ - length + i, so that the segment ends where the dimension of rows does, and TMA
itself reads zeros from there on: no neighbour's infinity ever comes in. (Triton's `tools/ragged_tma.py` does the same.)
"""

import inspect
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

COUNTERS = 2**14
"""Launches in CUDA graphs that have counters of their own; those captured later set theirs to zero themselves."""

_LAYOUTS = {64: gl.NVMMASharedLayout(128, 16, 5), 16: gl.NVMMASharedLayout(32, 16, 5)}
Form = tuple[int, torch.Size, tuple[int, ...]]
"""A tensor's address, shape and strides."""


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


def _descriptors(first: Form, rest: Form, rows: int, dtype: torch.dtype) -> tuple[_Rows, _Rows] | None:
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
        width = (
            min(channels, 64) if box == 64 else channels - skipped
        )  # of 64 channels there is no rest, but one is passed
        shape = [2**31 - 2**16, 2**31 - 2**16, heads, 2**30, width]
        base = _Address(address + 2 * skipped, dtype)
        made.append(_Rows(base, shape, [2**34 - row, row, head, row, 1], rows, box))
    return made[0], made[1]


class Maps:
    """Descriptors of queries, keys and values, and what triton makes of them for a launch, once it has."""

    __slots__ = ("descriptors", "flat")

    def __init__(self, descriptors: tuple[_Rows, ...]) -> None:
        self.descriptors = descriptors
        self.flat: list[Any] | None = None


@lru_cache(1024)
def _maps(q: Form, q_rest: Form, k: Form, k_rest: Form, v: Form, v_rest: Form, dtype: torch.dtype) -> Maps | None:
    pairs = [_descriptors(*forms, dtype) for forms in ((q, q_rest, 64), (k, k_rest, 128), (v, v_rest, 128))]
    made = [one for pair in pairs if pair is not None for one in pair]
    return Maps(tuple(made)) if len(made) == 6 else None


Pair = tuple[Tensor, Tensor]


def maps(q: Pair, k: Pair, v: Pair) -> Maps | None:
    """For `[S, H, D]` each, given as twice the same or as two parts; None if TMA cannot read them as they lie."""
    forms = []
    for first, rest in (q, k, v):
        form = first.data_ptr(), first.shape, first.stride()
        forms += form, form if rest is first else (rest.data_ptr(), rest.shape, rest.stride())
    return _maps(*forms, q[0].dtype)


def copied(pair: Pair) -> Pair:
    """The same in memory that TMA can address."""
    first, rest = (x.clone(memory_format=torch.contiguous_format) for x in pair)
    return (first, first) if pair[1] is pair[0] else (first, rest)


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


def counter(device: torch.device, stream: int) -> Tensor:
    """Two zeros for one launch on a stream of the device."""
    capturing = device.type == "cuda" and torch.cuda.is_current_stream_capturing()
    if device not in _counters:
        if capturing or device.type != "cuda":
            return torch.zeros(2, dtype=torch.int32, device=device)
        _counters[device] = Counters(device)
    return _counters[device].take(stream, capturing)


def _launcher_in_c(kernel: Any) -> Callable[..., None] | None:
    """What triton's own launcher calls in the end, which takes descriptors ready made. None if it is not as known."""
    if not triton.__version__.startswith("3.6.") or kernel.run.global_scratch_size or kernel.run.profile_scratch_size:
        return None
    return inspect.getclosurevars(kernel.run.launch).nonlocals.get("launcher")


class Launch:
    """A compiled kernel: looking one up here takes a fraction of what triton needs for it.

    With triton 3.6 descriptors are passed as `Maps` keeps them; other versions make them anew for each launch.
    """

    def __init__(self, kernel: Any) -> None:
        self.kernel = kernel
        self.launch = _launcher_in_c(kernel)

    def __call__(self, programs: int, stream: int, maps: Maps, out: Tensor, *others: Any) -> None:
        """`others` as the kernel takes them."""
        runtime = knobs.runtime
        if self.launch is None or runtime.launch_enter_hook.calls or runtime.launch_exit_hook.calls:
            self.kernel[programs, 1, 1](*maps.descriptors, out, *others)
            return
        kernel, run = self.kernel, self.kernel.run
        if maps.flat is None:
            from triton.backends.nvidia.driver import make_tensordesc_arg

            made = zip(maps.descriptors, kernel.metadata.tensordesc_meta, strict=True)
            maps.flat = [x for descriptor, form in made for x in make_tensordesc_arg(descriptor, form)]
        self.launch(
            programs, 1, 1, stream, kernel.function, run.launch_cooperative_grid, run.launch_pdl, None, None,
            kernel.packed_metadata, None, None, None, *maps.flat, out.data_ptr(), *others,
        )  # fmt: skip
