"""A model of Gluon in threads and torch that runs attention on Hopper without a GPU: control flow, barriers and copies.

Each warp-specialised partition of a program is a thread. Barriers complete phases as the hardware's do, and a wait
tells only odd phases from even ones. Copies finish later, in any order. Registers, layouts and instructions are not
modelled.
"""

import random
import threading
from contextlib import ExitStack
from functools import partial
from types import SimpleNamespace
from unittest import mock

import torch

from qwenvit.kernels.attention import hopper, hopper_consumer, hopper_producer, hopper_scheduler

DEADLOCK_SECONDS = 60.0
"""A wait longer than this is a deadlock."""


class Block(torch.Tensor):
    """A value in registers. In-place operators return a new tensor, since registers are values, not memory."""

    type = SimpleNamespace(layout=None)
    __iadd__, __isub__, __imul__ = torch.Tensor.__add__, torch.Tensor.__sub__, torch.Tensor.__mul__


def as_block(x):
    return torch.as_tensor(x).as_subclass(Block)


def run_in_threads(calls):
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
    """Shared memory: an array of buffers or barriers, or one buffer of it."""

    def __init__(self, values):
        self.values = values

    def index(self, i):
        return Shared(self.values[i]) if isinstance(self.values, torch.Tensor) else self.values[i]

    def permute(self, _):
        return Shared(self.values.T)

    def load(self, _):
        return as_block(self.values.clone())

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
                lambda: self.machine.failures or (self.phase & 1) != int(parity), DEADLOCK_SECONDS
            )
        if self.machine.failures or not passed:
            raise RuntimeError("deadlock")


class NamedBarrier:
    """A barrier of the hardware: `sync` and `arrive` add threads, and a phase ends when as many as needed have come."""

    def __init__(self):
        self.phase = self.arrived = 0

    def arrive(self, machine, needed, threads, waits):
        with machine.changed:
            phase = self.phase
            self.arrived += threads
            assert self.arrived <= needed, "more arrivals than a phase has"
            if self.arrived == needed:
                self.phase, self.arrived = phase + 1, 0
                machine.changed.notify_all()
            elif waits:
                passed = machine.changed.wait_for(lambda: machine.failures or self.phase != phase, DEADLOCK_SECONDS)
                if machine.failures or not passed:
                    raise RuntimeError("deadlock")


class Machine:
    """A GPU: its programs in threads, and a thread that makes the asynchronous copies.

    `local` has the running thread's program number, the number of programs, and the program's named barriers.
    """

    def __init__(self, seed):
        self.random = random.Random(seed)
        self.changed = threading.Condition()
        self.failures, self.soon, self.late, self.local = [], [], [], threading.local()

    def copy(self, descriptors, first, rest, full, i_row, end, length, i_head, head_dim):
        """Do what `hopper_producer._copy_rows` does: copy rows from `i_row` of the segment on, zeros past its end."""
        rows = len(first.values)
        start, end, head = int(end - length + i_row), int(end), int(i_head)

        def make_copy():
            x = descriptors[0]
            tile = torch.zeros(rows, x.shape[2], dtype=x.dtype)
            inside = x[min(start, end) : min(start + rows, end), head]
            tile[: len(inside)] = inside
            first.values.copy_(tile[:, :64])
            if head_dim > 64:
                rest.values[:, : x.shape[2] - 64] = tile[:, 64:]
            full.change(more_bytes=-rows * (128 if head_dim == 64 else 160))

        with self.changed:
            (self.late if self.random.random() < 0.2 else self.soon).append(make_copy)
            self.changed.notify_all()

    def run(self, function, *arguments):
        """Call a function; keep its error, which ends all waits and is raised again in the test's own thread."""
        try:
            function(*arguments)
        except BaseException as error:  # noqa: BLE001
            with self.changed:
                self.failures.append(error)
                self.changed.notify_all()

    def make_copies(self):
        """Make copies in random order until the launch is done; late ones only when no other has come for a while."""
        while True:
            with self.changed:
                self.changed.wait_for(lambda: self.soon or self.late or self.done)
                if not (self.soon or self.late):
                    return
                self.changed.wait_for(lambda: self.soon, 0.003)
                ready = self.soon or self.late
                make_copy = ready.pop(self.random.randrange(len(ready)))
            self.run(make_copy)

    def specialize(self, partitions, *_):
        program = vars(self.local)

        def run_partition(function, arguments):
            vars(self.local).update(program)
            self.run(function, *arguments)

        run_in_threads(partial(run_partition, *partition) for partition in partitions)

    def atomic_add(self, pointer, value, mask=True, **_):
        with self.changed:
            offset, value, mask = (torch.as_tensor(x) for x in (pointer.offset, value, mask))
            old = torch.zeros_like(value + 0 * offset)
            for i in range(offset.numel()):
                if mask.expand(offset.shape).flatten()[i]:
                    old.view(-1)[i] = pointer.memory[offset.flatten()[i]]
                    pointer.memory[offset.flatten()[i]] += value.expand(offset.shape).flatten()[i]
            return as_block(old)

    def launch(self, programs, kernel, *arguments):
        """Run a kernel's programs in threads."""
        self.done = False
        copier = threading.Thread(target=self.make_copies)
        copier.start()

        def program(number):
            self.local.program, self.local.programs = number, programs
            self.local.named_barriers = [NamedBarrier() for _ in range(16)]
            self.run(kernel, *arguments)
            if any(barrier.arrived for barrier in self.local.named_barriers):
                self.failures.append(AssertionError("arrivals are left at a named barrier"))

        run_in_threads(partial(program, number) for number in range(programs))
        with self.changed:
            self.done = True
            self.changed.notify_all()
        copier.join()
        if self.failures:
            raise self.failures[0]

    def named_barrier(self, waits):
        """Return the stand-in for `hopper_producer.barrier_sync` or `barrier_arrive`."""

        def call(i_barrier, needed, warps):
            self.local.named_barriers[int(i_barrier)].arrive(self, needed, 32 * warps, waits)

        return call

    def gluon(self):
        """Return the stand-in for the kernel's module `gl`."""

        def load(pointer, mask=True, other=0):
            offset = torch.as_tensor(pointer.offset)
            inside = torch.as_tensor(mask).expand(offset.shape)
            return as_block(torch.where(inside, pointer.memory[torch.where(inside, offset, 0)], other))

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
            program_id=lambda _: as_block(self.local.program), num_programs=lambda _: self.local.programs,
            arange=lambda start, end, **_: as_block(torch.arange(start, end, dtype=torch.int32)),
            zeros=lambda shape, dtype, _: as_block(torch.zeros(shape, dtype=dtype)),
            where=lambda mask, a, b: as_block(torch.where(torch.as_tensor(mask), a, b)),
            minimum=lambda a, b: as_block(torch.minimum(torch.as_tensor(a), torch.as_tensor(b))),
            maximum=lambda a, b: as_block(torch.maximum(torch.as_tensor(a), torch.as_tensor(b))),
            sum=lambda x, axis: x.sum(axis), max=lambda x, axis: x.amax(axis),
            convert_layout=lambda x, *_, **__: x, reshape=torch.reshape,
            load=load, store=store, atomic_add=self.atomic_add,
            allocate_shared_memory=shared, warp_specialize=self.specialize,
        )  # fmt: skip


def _product(a, b, total, use_acc=True, **_):
    a, b = (x.values if isinstance(x, Shared) else x for x in (a, b))
    return as_block(a.float() @ b.float() + (total if use_acc else 0))


def attend(q, k, v, cu_seqlens, scale, out, programs, across_heads, seed=0):
    """Run `hopper_attention`'s kernel on CPU tensors `[S, H, D]`; `seed` orders the copies."""
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
        "_copy_rows": machine.copy,
        "barrier_sync": machine.named_barrier(waits=True),
        "barrier_arrive": machine.named_barrier(waits=False),
        "_rescale": lambda x, factors: x * factors[:, None],
        "_exp2": torch.exp2,
        "_exp2_unless_zeros": torch.exp2,
        "_pack": lambda x, dtype: x.to(dtype),
        "_unpack": lambda x, *_: x,
        "warpgroup_mma": _product,
        "warpgroup_mma_wait": lambda _, deps: deps[0] if len(deps) == 1 else deps,
    }
    with ExitStack() as stack:
        for module in (hopper_scheduler, hopper_producer, hopper_consumer, hopper):
            for name, value in list(vars(module).items()):
                if name in functions:
                    stack.enter_context(mock.patch.object(module, name, functions[name]))
                elif name != "_hopper_attention" and hasattr(value, "fn"):  # the functions that it calls
                    stack.enter_context(mock.patch.object(module, name, value.fn))
                elif type(value).__name__ == "constexpr":
                    stack.enter_context(mock.patch.object(module, name, value.value))
        counters = torch.zeros(2, dtype=torch.int32)
        values = torch.nn.functional.pad(v, (0, -head_dim % 16), value=1.0)  # as `end_with_ones` does, on a GPU
        tensors = (x for one in (q, k, values) for x in (one, one))
        machine.launch(
            programs, hopper._hopper_attention.fn, *tensors, Pointer(out.view(-1)), Pointer(cu_seqlens),
            Pointer(counters), len(cu_seqlens) - 1, tokens, heads, scale * hopper.LOG2_E, head_dim,
            across_heads,
        )  # fmt: skip
        assert not counters.any()
