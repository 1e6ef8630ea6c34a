"""Prefetching: order, memory, slow and failing items, and no thread left behind."""

import gc
import itertools
import os
import random
import signal
import subprocess
import sys
import threading
import time
import weakref
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qwenvit.preprocess import prefetch as prefetch_module
from qwenvit.preprocess.prefetch import DEFAULT_WORKERS, WAITING, Prefetched, check_num_workers, prefetch
from qwenvit.preprocess.threads import Threads
from support.prefetch_threads import assert_no_prefetch_threads, prefetch_threads

ROOT = Path(__file__).parents[2]
SECONDS = 30
"""After this long, a test that waits for a thread fails."""


def one_byte(result):
    return 1


def double(index, item):
    return 2 * item


class Counted:
    """An iterator of the integers from 0 that knows how many were drawn."""

    def __init__(self, stop=10**6):
        self.drawn, self.stop = 0, stop

    def __iter__(self):
        return self

    def __next__(self):
        if self.drawn == self.stop:
            raise StopIteration
        self.drawn += 1
        return self.drawn - 1


@pytest.fixture(autouse=True)
def _no_thread_is_left():
    yield
    assert_no_prefetch_threads()


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


def test_nothing_is_drawn_before_the_first_result_is_asked_for():
    source = Counted()
    prefetch(source, double, 2, one_byte)
    assert source.drawn == 0
    assert not prefetch_threads()


def leave_by_close(stream):
    next(stream)
    stream.close()


def leave_by_break(stream):
    for _ in stream:
        break


def leave_by_an_exception(stream):
    def consume():
        for one in stream:
            one.position / 0

    with pytest.raises(ZeroDivisionError):
        consume()


def leave_by_forgetting(stream):
    next(stream)


@pytest.mark.parametrize("leave", [leave_by_close, leave_by_break, leave_by_an_exception, leave_by_forgetting])
def test_threads_end_when_the_consumer_leaves(leave):
    streams = [prefetch(itertools.count(), double, 3, one_byte)]
    leave(streams[0])
    streams.clear()
    assert_no_prefetch_threads()


def test_leaving_does_not_wait_for_workers_that_are_blocked():
    """They end with the item they are at, and start none of those that were drawn."""
    release, four_drawn, busy, started = threading.Event(), threading.Event(), threading.Semaphore(0), []

    def source():
        for index in itertools.count():
            if index == 3:
                four_drawn.set()
            yield index

    def prepare(index, item):
        started.append(index)
        if index == 0:
            return four_drawn.wait(SECONDS)
        busy.release()
        return release.wait(SECONDS)

    stream = prefetch(source(), prepare, 2, one_byte)
    assert next(stream).result is True
    assert busy.acquire(timeout=SECONDS)
    assert busy.acquire(timeout=SECONDS)
    stream.close()
    assert len(prefetch_threads()) == 2  # close() returned although they are busy
    release.set()
    assert_no_prefetch_threads()
    assert sorted(started) == [0, 1, 2]


def test_an_exception_of_the_source_leaves_no_thread():
    def source():
        yield 1
        raise RuntimeError("broken")

    with pytest.raises(RuntimeError, match="broken"):
        list(prefetch(source(), double, 2, one_byte))
    assert_no_prefetch_threads()


def test_a_source_that_interrupts_leaves_no_thread():
    def source():
        yield from range(3)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        list(prefetch(source(), double, 2, one_byte))
    assert_no_prefetch_threads()


CHILD = """
import atexit, itertools, threading, time
from qwenvit.preprocess.prefetch import prefetch

atexit.register(print, "the end")

busy = threading.Event()

def prepare(index, item):
    if index == 0:
        return busy.wait(30)
    if index == 1:
        print("busy", flush=True)
    busy.set()
    time.sleep(2)
    print("prepared", flush=True)

stream = prefetch(itertools.count(), prepare, 2, lambda _: 1)
next(stream)
"""
ENDINGS = {
    "exit with a suspended generator": "",
    "exit by an exception": "raise SystemExit(3)",
    "interrupt while it waits for a result": "next(stream)",
    "interrupt in the consumer": "time.sleep(60)",
}


@pytest.mark.parametrize("ending", ENDINGS)
def test_the_interpreter_ends_while_workers_are_busy(ending):
    process = subprocess.Popen(
        [sys.executable, "-c", CHILD + ENDINGS[ending]],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        cwd=ROOT,
        text=True,
    )
    try:
        assert process.stdout.readline() == "busy\n"
        if "interrupt" in ending:
            process.send_signal(signal.SIGINT)
        stdout, stderr = process.communicate(timeout=10)
    finally:
        process.kill()
        process.wait()
    assert 0 <= stdout.rfind("prepared") < stdout.find("the end")  # what `prepare` uses has not ended under it
    if "interrupt" in ending:
        assert "KeyboardInterrupt" in stderr
        assert process.returncode == -signal.SIGINT
    else:
        assert stderr == ""
        assert process.returncode == (3 if ending == "exit by an exception" else 0)


CONSUMER = """
import itertools, threading, time
from qwenvit.preprocess.prefetch import prefetch

def prepare(index, item):
    time.sleep(0.02)
    return item

def consume():
    for one in prefetch({source}, prepare, 4, lambda _: 1):
        print(one.result, flush=True)

threading.Thread(target=consume, daemon={daemon}).start()
time.sleep(0.1)
"""


@pytest.mark.parametrize("daemon", [False, True])
def test_a_consumer_in_a_thread_when_the_main_thread_has_ended(daemon):
    """The interpreter waits for it, and so do its threads; for a daemon neither does."""
    source = "itertools.count()" if daemon else "range(40)"
    command = [sys.executable, "-c", CONSUMER.format(source=source, daemon=daemon)]
    found = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=20)
    assert found.returncode == 0
    numbers = [int(line) for line in found.stdout.split()]
    assert numbers == list(range(len(numbers) if daemon else 40))


def test_threads_that_have_ended_with_the_interpreter_refuse_more(monkeypatch):
    monkeypatch.setattr(Threads, "_is_abandoned", lambda _: True)
    threads = Threads(abs, 1)
    threads.add(1)
    deadline = time.monotonic() + SECONDS
    while not threads._interpreter_ends and time.monotonic() < deadline:
        time.sleep(0.005)
    for call in (lambda: threads.add(2), threads.result):
        with pytest.raises(RuntimeError, match="while the interpreter ends"):
            call()


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


INTERRUPTED = """
import itertools, os, random, signal, threading, time
from qwenvit.preprocess.prefetch import prefetch

def interrupt(*_):
    raise KeyboardInterrupt

signal.signal(signal.SIGALRM, interrupt)
chance = random.Random(0)
for _ in range(1000):
    stream = prefetch(itertools.count(), lambda index, item: sum(range(2000)), 4, lambda _: 1)
    next(stream)  # the threads have started
    try:
        signal.setitimer(signal.ITIMER_REAL, chance.uniform(1e-4, 3e-3))
        for _ in stream:
            pass
    except KeyboardInterrupt:
        stream.close()
deadline = time.monotonic() + 10
while threading.active_count() > 1 and time.monotonic() < deadline:
    time.sleep(0.01)
print(threading.active_count() - 1, flush=True)
os._exit(0)
"""


def test_an_interrupt_at_any_moment_leaves_no_thread_waiting():
    """It may come while the consumer has a lock that the threads need."""
    command = [sys.executable, "-c", INTERRUPTED]
    assert subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60).stdout == "0\n"


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
