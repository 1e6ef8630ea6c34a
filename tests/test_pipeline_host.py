"""The streams of `run_batches`, with CUDA replaced by a log: what is queued where, and what waits for what."""

import contextlib
from types import SimpleNamespace

import pytest
import torch

from qwenvit import pipeline
from qwenvit.preprocess.prefetch import WAITING, Prefetched

EMPTY = [torch.empty(0, 3)]
GPU = torch.device("cuda", 0)


class Picture:
    """Two tokens; logs where it is copied and written."""

    grid, num_bytes = (1, 2, 4), 1

    def __init__(self, number, cuda):
        self.number, self.cuda = number, cuda

    def to(self, device):
        assert device == GPU
        self.cuda.add("copy", self.number)
        return self

    def write(self, rows):
        assert len(rows) == 8
        self.cuda.add("write", self.number)

    def record_stream(self, stream):
        self.cuda.log.append(("kept for", stream.name, self.number))


class FakeCUDA:
    """Stands in for torch.cuda: one stream is current, and everything is logged."""

    def __init__(self, monkeypatch):
        self.log, self.current, self.events = [], SimpleNamespace(name="caller", device=GPU), 0
        self.current.wait_event = lambda event: self.log.append(("caller waits for", event.number))
        made = iter(("copies", "compute"))
        monkeypatch.setattr(torch.cuda, "Stream", lambda _: self.new_stream(next(made)))
        monkeypatch.setattr(torch.cuda, "Event", lambda **_: self.new_event())
        monkeypatch.setattr(torch.cuda, "stream", self.stream)
        monkeypatch.setattr(torch.cuda, "current_stream", lambda *_: self.current)
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
        monkeypatch.setattr(torch.Tensor, "record_stream", lambda _, stream: self.add("kept", stream.name))
        pipeline._streams.cache_clear()

    def add(self, what, detail):
        self.log.append((self.current.name, what, detail))

    def new_stream(self, name):
        stream = SimpleNamespace(name=name, device=GPU)
        stream.wait_stream = lambda other: self.log.append((name, "waits for", other.name))

        def record_event(event):
            self.log.append((name, "done", event.number))
            return event

        stream.record_event = record_event
        return stream

    def new_event(self):
        event = SimpleNamespace(number=self.events)
        event.synchronize = lambda: self.log.append(("host waits for", event.number))
        self.events += 1
        return event

    @contextlib.contextmanager
    def stream(self, stream):
        before, self.current = self.current, stream
        try:
            yield
        finally:
            self.current = before


@pytest.fixture
def cuda(monkeypatch):
    yield FakeCUDA(monkeypatch)
    pipeline._streams.cache_clear()


def run_on(cuda):
    def run(write, grid):
        write(torch.empty(grid.patches, 1))
        cuda.add("tower", len(grid.tensor))
        return [torch.zeros(grid.patches // 4, 3)]

    return run


def embed(cuda, images, max_patches=8, may_split=False):
    """Yield what `run_batches` yields, and log when."""
    found = pipeline.run_batches(images, run_on(cuda), GPU, 2, EMPTY, max_patches, may_split)
    for batch in found:
        cuda.log.append(("yielded", len(batch)))
        yield batch


def pictures(cuda, count):
    return [Prefetched(number, Picture(number, cuda), None) for number in range(count)]


def test_a_batch_is_queued_before_the_last_is_handed_over(cuda):
    assert len(list(embed(cuda, pictures(cuda, 4)))) == 4
    waits = ("yielded", "host waits for", "caller waits for")
    events = [entry for entry in cuda.log if entry[0] in waits or "tower" in entry]
    tower = ("compute", "tower", 1)
    assert events == [
        tower, tower, ("caller waits for", 0), ("yielded", 1),
        ("host waits for", 0), tower, ("caller waits for", 1), ("yielded", 1),
        ("host waits for", 1), tower, ("caller waits for", 2), ("yielded", 1),
        ("caller waits for", 3), ("yielded", 1),
    ]  # fmt: skip


def test_the_tower_waits_for_copies_and_for_the_caller(cuda):
    list(embed(cuda, pictures(cuda, 2), max_patches=16))
    assert cuda.log == [
        ("copies", "copy", 0), ("copies", "copy", 1),
        ("compute", "waits for", "copies"), ("compute", "waits for", "caller"),
        ("compute", "write", 0), ("compute", "write", 1), ("compute", "tower", 2),
        ("kept for", "compute", 0), ("kept for", "compute", 1),
        ("compute", "done", 0),
        ("caller waits for", 0), ("caller", "kept", "caller"), ("yielded", 2),
    ]  # fmt: skip


@pytest.mark.parametrize("may_split", [False, True])
def test_a_slow_source_flushes_where_bits_allow_it(cuda, may_split):
    first, second, third = pictures(cuda, 3)
    sizes = [len(batch) for batch in embed(cuda, [first, WAITING, second, WAITING, third], 100, may_split)]
    assert sizes == ([1, 1, 1] if may_split else [3])
    if may_split:  # each is handed over before the next is copied
        assert cuda.log.index(("yielded", 1)) < cuda.log.index(("copies", "copy", 1))


def test_what_came_before_an_error_is_handed_over(cuda):
    def images():
        yield from pictures(cuda, 3)
        raise KeyError("source")

    found = []
    with pytest.raises(KeyError, match="source"):
        found.extend(embed(cuda, images(), max_patches=16))
    assert [len(batch) for batch in found] == [2, 1]


def test_a_batch_of_broken_images_runs_nothing(cuda):
    broken = [Prefetched(number, None, None) for number in range(3)]
    (batch,) = embed(cuda, broken)
    assert batch.skipped == [0, 1, 2]
    assert cuda.log == [("yielded", 3)]


def test_a_capture_of_the_caller_is_refused(cuda, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with pytest.raises(ValueError, match="encode has streams and graphs of its own"):
        list(embed(cuda, pictures(cuda, 1)))


def test_an_image_is_prepared_on_the_stream_that_was_current_when_it_was_drawn(cuda):
    caller, other = cuda.current, SimpleNamespace(name="other", device=GPU)

    def source():
        for stream in (caller, other, caller):
            cuda.current = stream
            yield stream.name
        cuda.current = caller

    def prepare(_, name):
        return SimpleNamespace(num_bytes=1, drawn=name, prepared=cuda.current.name)

    found = [one.result for one in pipeline.prefetch_on_stream(GPU, source(), prepare, 0)]
    assert [one.prepared for one in found] == [one.drawn for one in found] == ["caller", "other", "caller"]
