"""Outcomes of prefetching, in order: slow and failing items, a source that fails, and how many threads prepare them."""

import os
import random
import threading
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qwenvit.preprocess.prefetch import DEFAULT_WORKERS, Prefetched, check_num_workers, prefetch
from qwenvit.preprocess.threads import Threads
from support.prefetch_items import SECONDS, Counted, double, one_byte
from support.prefetch_threads import assert_no_prefetch_threads, prefetch_threads


@pytest.mark.parametrize("num_workers", [0, 1, 2, 7])
def test_order_whatever_the_workers_timing(num_workers):
    delays = random.Random(0)
    pauses = [delays.choice((0, 0, 0.001, 0.004)) for _ in range(200)]

    def prepare(index, item):
        time.sleep(pauses[index])
        return index, item

    items = [f"item {i}" for i in range(200)]
    outcomes = list(prefetch(iter(items), prepare, num_workers, one_byte))
    assert outcomes == [Prefetched(index, (index, item), None) for index, item in enumerate(items)]


@given(
    outcomes=st.lists(st.sampled_from(["good", "bad", "slow"]), max_size=30),
    num_workers=st.integers(0, 4),
    source_fails=st.booleans(),
)
def test_errors_are_outcomes_and_the_sources_own_comes_last(outcomes, num_workers, source_fails):
    def source():
        yield from outcomes
        if source_fails:
            raise OSError("the source is broken")

    def prepare(index, item):
        if item == "bad":
            raise ValueError(index)
        if item == "slow":
            time.sleep(0.001)
        return item

    got, raised = [], None
    try:
        for one in prefetch(source(), prepare, num_workers, len):
            got.append(one)  # noqa: PERF402  (what came before the exception counts)
    except OSError as error:
        raised = error
    assert (raised is not None) == source_fails
    assert [one.position for one in got] == list(range(len(outcomes)))
    for one, item in zip(got, outcomes, strict=True):
        if item == "bad":
            assert one.result is None
            assert isinstance(one.error, ValueError)
            assert one.error.args == (one.position,)
        else:
            assert (one.result, one.error) == (item, None)


def test_a_slow_item_delays_only_itself():
    """The first item is not ready before many of the later ones, more than are in flight at once, are."""
    later = threading.Event()

    def prepare(index, item):
        if index == 0:
            return later.wait(SECONDS)
        if index == 40:
            later.set()
        return item

    outcomes = list(prefetch(range(50), prepare, 2, one_byte))
    assert outcomes[0].result is True
    assert [one.result for one in outcomes[1:]] == list(range(1, 50))


def test_no_worker_means_the_callers_thread_and_nothing_ahead():
    source, threads = Counted(), []
    stream = prefetch(source, lambda *_: threads.append(threading.get_ident()), 0, one_byte)
    assert source.drawn == 0
    for index in range(5):
        assert next(stream).position == index
        assert source.drawn == index + 1
    assert set(threads) == {threading.get_ident()}
    assert not prefetch_threads()


def test_items_are_drawn_in_the_callers_thread_and_prepared_in_others():
    drawn, prepared = set(), set()

    def source():
        for index in range(20):
            drawn.add(threading.get_ident())
            yield index

    list(prefetch(source(), lambda *_: prepared.add(threading.get_ident()), 3, one_byte))
    assert drawn == {threading.get_ident()}
    assert prepared
    assert not prepared & drawn


def test_a_system_without_threads_to_spare(monkeypatch):
    def start(_):
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", start)
    assert [one.result for one in prefetch(range(5), double, 2, one_byte)] == [0, 2, 4, 6, 8]


def test_what_is_no_exception_ends_the_stream_at_once():
    """As `sys.exit` in a user's code, which is no outcome of an item."""

    def prepare(index, item):
        raise SystemExit(3)

    with pytest.raises(SystemExit):
        list(prefetch(range(5), prepare, 2, one_byte))


def test_no_thread_is_started_while_one_is_idle():
    threads = Threads(abs, 4)
    for number in range(5):
        threads.add(number)
        assert threads.result(SECONDS) == number
    assert len(prefetch_threads()) == 1
    threads.end()
    assert_no_prefetch_threads()


def test_the_default_number_of_workers(monkeypatch):
    for cores, expected in ((1, 1), (3, 3), (4, DEFAULT_WORKERS), (64, DEFAULT_WORKERS)):
        monkeypatch.setattr(os, "sched_getaffinity", lambda _, cores=cores: range(cores), raising=False)
        assert check_num_workers(None) == expected
    monkeypatch.delattr(os, "sched_getaffinity")
    monkeypatch.setattr(os, "cpu_count", lambda: None)
    assert check_num_workers(None) == 1
    assert [check_num_workers(number) for number in (0, 1, 99)] == [0, 1, 99]


@pytest.mark.parametrize("num_workers", [-1, True, False, 1.0, "2", [1]])
def test_numbers_of_workers_that_are_refused(num_workers):
    with pytest.raises(ValueError, match=r"^num_workers: expected None or an integer of at least 0, got "):
        check_num_workers(num_workers)
