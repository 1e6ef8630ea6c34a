"""Enough of Gluon in threads and torch to run `hopper_attention` without a GPU: its control flow, barriers and copies.

A program's partitions are threads. Barriers complete their phases as the hardware's do, and waits tell odd phases from
even ones only. Copies are made some time later, in any order. Registers, layouts and instructions are not modelled.
"""

import random
import threading
from contextlib import ExitStack
from functools import partial
from types import SimpleNamespace
from unittest import mock

import torch

from qwenvit.kernels.attention import hopper as hopper_attention
from qwenvit.kernels.attention import hopper_producer as hopper_tiles

PATIENCE = 60.0
"""Seconds until a wait is a deadlock."""


class Block(torch.Tensor):
    """A tensor of registers: a new one for each value, also where Python would change the old."""

    type = SimpleNamespace(layout=None)
    __iadd__, __isub__, __imul__ = torch.Tensor.__add__, torch.Tensor.__sub__, torch.Tensor.__mul__


def block(x):
    return torch.as_tensor(x).as_subclass(Block)


def side_by_side(calls):
    threads = [threading.Thread(target=call) for call in calls]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


class Pointer:
    def __init__(self, memory, offset=0):
        self.memory, self.offset = memory, offset
        self.dtype = SimpleNamespace(element_ty=memory.dtype)

    def __add__(self, offset):
        return Pointer(self.memory, self.offset + offset)


class Shared:
    """Shared memory of several slots, or one of them."""

    def __init__(self, values):
        self.values = values

    def index(self, i):
        return Shared(self.values[i]) if isinstance(self.values, torch.Tensor) else self.values[i]

    def permute(self, _):
        return Shared(self.values.T)

    def load(self, _):
        return block(self.values.clone())

    def store(self, x):
        self.values.copy_(x[: len(self.values)])


class Barrier:
    def __init__(self, machine):
        self.machine, self.phase, self.bytes = machine, 0, 0

    def init(self, count):
        self.count = self.left = count

    def change(self, arrivals=0, more_bytes=0):
        with self.machine.changed:
            self.left, self.bytes = self.left - arrivals, self.bytes + more_bytes
            assert self.left >= 0, "more arrivals than a phase has"
            if self.left == 0 and self.bytes == 0:
                self.left, self.phase = self.count, self.phase + 1
                self.machine.changed.notify_all()

    def wait(self, parity):
        with self.machine.changed:
            passed = self.machine.changed.wait_for(
                lambda: self.machine.failures or (self.phase & 1) != int(parity), PATIENCE
            )
        if self.machine.failures or not passed:
            raise RuntimeError("deadlock")


class Machine:
    """Programs, their threads, and whoever makes copies."""

    def __init__(self, seed):
        self.random = random.Random(seed)
        self.changed = threading.Condition()
        self.failures, self.copies, self.here = [], ([], []), threading.local()

    def copy(self, descriptors, first, rest, full, i_row, end, length, i_head, head_dim):
        """`hopper_tiles._copy`: rows from `i_row` of the segment on, zeros from its end on."""
        rows = len(first.values)
        start, end, head = int(end - length + i_row), int(end), int(i_head)

        def make():
            x = descriptors[0]
            taken = torch.zeros(rows, head_dim, dtype=x.dtype)
            found = x[min(start, end) : min(start + rows, end), head]
            taken[: len(found)] = found
            first.values.copy_(taken[:, :64])
            if head_dim > 64:
                rest.values[:, : head_dim - 64] = taken[:, 64:]
            full.change(more_bytes=-rows * (128 if head_dim == 64 else 160))

        with self.changed:
            self.copies[self.random.random() < 0.2].append(make)
            self.changed.notify_all()

    def run(self, function, *arguments):
        """An error ends all waits, and is raised again in the test's own thread."""
        try:
            function(*arguments)
        except BaseException as error:  # noqa: BLE001
            with self.changed:
                self.failures.append(error)
                self.changed.notify_all()

    def make_copies(self):
        """Some at once, and some when nothing else has moved for a while."""
        soon, late = self.copies
        while True:
            with self.changed:
                self.changed.wait_for(lambda: soon or late or self.done)
                if not (soon or late):
                    return
                self.changed.wait_for(lambda: soon, 0.003)
                ready = soon or late
                make = ready.pop(self.random.randrange(len(ready)))
            self.run(make)

    def specialize(self, partitions, *_):
        where = vars(self.here)

        def work(function, arguments):
            vars(self.here).update(where)
            self.run(function, *arguments)

        side_by_side(partial(work, *partition) for partition in partitions)

    def atomic_add(self, pointer, value, mask=True, **_):
        with self.changed:
            offset, value, mask = (torch.as_tensor(x) for x in (pointer.offset, value, mask))
            old = torch.zeros_like(value + 0 * offset)
            for i in range(offset.numel()):
                if mask.expand(offset.shape).flatten()[i]:
                    old.view(-1)[i] = pointer.memory[offset.flatten()[i]]
                    pointer.memory[offset.flatten()[i]] += value.expand(offset.shape).flatten()[i]
            return block(old)

    def launch(self, programs, kernel, *arguments):
        """Run a kernel's programs side by side."""
        self.done = False
        copier = threading.Thread(target=self.make_copies)
        copier.start()

        def program(number):
            self.here.program, self.here.programs = number, programs
            self.run(kernel, *arguments)

        side_by_side(partial(program, number) for number in range(programs))
        with self.changed:
            self.done = True
            self.changed.notify_all()
        copier.join()
        if self.failures:
            raise self.failures[0]

    def gluon(self):
        """What the kernel calls `gl`."""

        def load(pointer, mask=True, other=0):
            offset = torch.as_tensor(pointer.offset)
            inside = torch.as_tensor(mask).expand(offset.shape)
            return block(torch.where(inside, pointer.memory[torch.where(inside, offset, 0)], other))

        def store(pointer, value, mask=True):
            offset = torch.as_tensor(pointer.offset)
            value, mask = (torch.as_tensor(x).expand(offset.shape) for x in (value, mask))
            pointer.memory.view(-1)[offset[mask]] = value[mask].to(pointer.memory.dtype)

        def shared(dtype, shape, _):
            if dtype == torch.int64:
                return Shared([Barrier(self) for _ in range(shape[0])])
            return Shared(torch.zeros(shape, dtype=dtype))

        def layout(*_, **__):
            return None

        return SimpleNamespace(
            **{name: getattr(torch, name) for name in ("int16", "int32", "int64", "float32", "bfloat16", "float16")},
            constexpr=lambda x: x,
            BlockedLayout=layout, SliceLayout=layout, NVMMADistributedLayout=layout, NVMMASharedLayout=layout,
            SwizzledSharedLayout=layout, DotOperandLayout=layout,
            static_range=range,
            program_id=lambda _: block(self.here.program), num_programs=lambda _: self.here.programs,
            arange=lambda start, end, **_: block(torch.arange(start, end, dtype=torch.int32)),
            zeros=lambda shape, dtype, _: block(torch.zeros(shape, dtype=dtype)),
            where=lambda mask, a, b: block(torch.where(torch.as_tensor(mask), a, b)),
            minimum=lambda a, b: block(torch.minimum(torch.as_tensor(a), torch.as_tensor(b))),
            maximum=lambda a, b: block(torch.maximum(torch.as_tensor(a), torch.as_tensor(b))),
            sum=lambda x, axis: x.sum(axis), max=lambda x, axis: x.amax(axis),
            convert_layout=lambda x, *_, **__: x,
            load=load, store=store, atomic_add=self.atomic_add,
            allocate_shared_memory=shared, warp_specialize=self.specialize,
        )  # fmt: skip


def _product(a, b, total, use_acc=True, **_):
    a, b = (x.values if isinstance(x, Shared) else x for x in (a, b))
    return block(a.float() @ b.float() + (total if use_acc else 0))


def attend(q, k, v, cu_seqlens, scale, out, programs, across, seed=0):
    """`hopper_attention` on CPU tensors `[S, H, D]`, by so many programs."""
    tokens, heads, head_dim = out.shape
    machine = Machine(seed)
    barriers = SimpleNamespace(
        MBarrierLayout=lambda: None,
        init=lambda barrier, count: barrier.init(count),
        wait=Barrier.wait,
        arrive=lambda barrier, count: barrier.change(arrivals=count),
        expect=lambda barrier, count: barrier.change(arrivals=1, more_bytes=count),
    )
    functions = {
        "gl": machine.gluon(),
        "mbarrier": barriers,
        "_copy": machine.copy,
        "_exp2": torch.exp2,
        "_pack": lambda x, dtype: x.to(dtype),
        "_unpack": lambda x, *_: x,
        "warpgroup_mma": _product,
        "warpgroup_mma_wait": lambda _, deps: deps[0] if len(deps) == 1 else deps,
    }
    with ExitStack() as stack:
        for module in (hopper_tiles, hopper_attention):
            for name, value in list(vars(module).items()):
                if name in functions:
                    stack.enter_context(mock.patch.object(module, name, functions[name]))
                elif name != "_hopper_attention" and hasattr(value, "fn"):  # what it calls
                    stack.enter_context(mock.patch.object(module, name, value.fn))
                elif type(value).__name__ == "constexpr":
                    stack.enter_context(mock.patch.object(module, name, value.value))
        counters = torch.zeros(2, dtype=torch.int32)
        tensors = (x for one in (q, k, v) for x in (one, one))
        machine.launch(
            programs, hopper_attention._hopper_attention.fn, *tensors, Pointer(out.view(-1)), Pointer(cu_seqlens),
            Pointer(counters), len(cu_seqlens) - 1, tokens, heads, scale * hopper_attention.LOG2_E, head_dim,
            across,
        )  # fmt: skip
        assert not counters.any()
