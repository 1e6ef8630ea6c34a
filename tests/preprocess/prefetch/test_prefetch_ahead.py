"""How far prefetching goes ahead of its consumer: bounded in bytes and number, and hardly ahead of a slow source."""

import gc
import itertools
import random
import threading
import time
import weakref

import pytest

from qwenvit.preprocess import prefetch as prefetch_module
from qwenvit.preprocess.prefetch import WAITING, prefetch
from support.prefetch_items import SECONDS, Counted, double, one_byte
from support.prefetch_threads import assert_no_prefetch_threads, prefetch_threads


@pytest.mark.parametrize("size", [1, 30, 1000])
def test_results_that_wait_are_bounded_by_bytes(monkeypatch, size):
    """Behind a slow item, others are prepared up to a number of bytes. An unbounded number would take less time."""
    monkeypatch.setattr(prefetch_module, "MAX_READY_BYTES", 100)
    num_workers, source, drawn = 3, Counted(), []

    def prepare(index, item):
        if index == 0:
            time.sleep(0.5)
            drawn.append(source.drawn)
        return item

    stream = prefetch(source, prepare, num_workers, lambda _: size)
    assert next(stream).position == 0
    ready = -(-100 // size)
    assert ready <= drawn[0] <= ready + 2 * num_workers
    stream.close()


def test_what_waits_is_bounded_in_number_too(monkeypatch):
    """Errors have no size, and results may be tiny."""
    monkeypatch.setattr(prefetch_module, "MAX_AHEAD", 50)
    source, drawn = Counted(), []

    def prepare(index, item):
        if index == 0:
            time.sleep(0.5)
            drawn.append(source.drawn)
        raise ValueError(index)

    stream = prefetch(source, prepare, 3, one_byte)
    assert next(stream).error.args == (0,)
    assert drawn[0] == 50
    stream.close()


@pytest.mark.parametrize("num_workers", [1, 4])
def test_a_million_items_are_drawn_a_bounded_number_ahead(monkeypatch, num_workers):
    monkeypatch.setattr(prefetch_module, "MAX_READY_BYTES", 50)
    delays, source, alive, ahead = random.Random(1), Counted(), [], []
    slow = {delays.randrange(3000) for _ in range(60)}

    class Result:
        pass

    def prepare(index, item):
        if index in slow:
            time.sleep(0.002)
        return Result()

    stream = prefetch(source, prepare, num_workers, one_byte)
    for one in itertools.islice(stream, 3000):
        ahead.append(source.drawn - one.position)
        alive.append(weakref.ref(one.result))
        del one
    assert len(ahead) == 3000
    assert max(ahead) <= 50 + 2 * num_workers + 1
    gc.collect()
    assert sum(ref() is not None for ref in alive) <= 2 * num_workers + 1  # results that were handed over are not kept
    stream.close()


def test_a_slow_source_does_not_delay_what_is_ready():
    """A result that is ready waits for one more item of the source, not for as many as could be in flight."""
    prepared, drawn = [threading.Event() for _ in range(1000)], []

    def source():
        for index in range(1000):
            if index:
                assert prepared[index - 1].wait(SECONDS)
                time.sleep(0.005)  # the result is handed back right after `prepare`
            drawn.append(index)
            yield index

    stream = prefetch(source(), lambda index, _: prepared[index].set(), 4, one_byte)
    for index in range(60):
        assert next(stream).position == index
        assert len(drawn) <= index + 2 + 10  # 10: threads may pause between `prepare` and its result
    stream.close()


def test_nothing_is_drawn_before_the_first_result_is_asked_for():
    source = Counted()
    prefetch(source, double, 2, one_byte)
    assert source.drawn == 0
    assert not prefetch_threads()


def test_no_more_is_drawn_than_is_needed_from_a_source_that_takes_time():
    drawn = []

    def source():
        for index in range(20):
            time.sleep(0.02)
            drawn.append(index)
            yield index

    stream = prefetch(source(), double, 4, one_byte)
    next(stream)
    assert len(drawn) <= 3
    stream.close()


@pytest.mark.parametrize("num_workers", [0, 1, 4])
def test_waiting_for_a_slow_source_is_announced(monkeypatch, num_workers):
    monkeypatch.setattr(prefetch_module, "SLOW_SOURCE_SECONDS", 0.0)  # every source is slow
    drawn, events = itertools.count(), []

    def source():
        for index in range(6):
            next(drawn)
            events.append(("drawn", index))
            yield index

    for one in prefetch(source(), lambda _, item: item, num_workers, lambda _: 1):
        if one is WAITING:
            events.append("waiting")
        else:
            events.append(("got", one.result))
    assert [event for event in events if event[0] == "got"] == [("got", index) for index in range(6)]
    for index in range(6):
        assert events[events.index(("drawn", index)) - 1] == "waiting"  # nothing comes between


def test_a_fast_source_is_not_announced():
    assert WAITING not in list(prefetch(range(100), lambda _, item: item, 2, lambda _: 1))


@pytest.mark.parametrize("num_workers", [0, 2])
def test_an_error_does_not_keep_its_item(num_workers):
    class Thing:
        pass

    things = []

    def source():
        for _ in range(3):
            thing = Thing()
            things.append(weakref.ref(thing))
            yield thing

    def fail(_, item):
        data = Thing()
        things.append(weakref.ref(data))
        try:
            raise KeyError(str(id(data)))
        except KeyError as cause:
            raise ValueError(str(id(item))) from cause

    outcomes = list(prefetch(source(), fail, num_workers, lambda _: 1))
    assert_no_prefetch_threads()
    gc.collect()
    assert [type(one.error) for one in outcomes] == [ValueError] * 3
    assert [thing() for thing in things] == [None] * 6
