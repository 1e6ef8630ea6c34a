"""How prefetching ends: no thread is left, and the interpreter ends, whoever leaves, fails or is interrupted."""

import itertools
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from qwenvit.preprocess.prefetch import prefetch
from qwenvit.preprocess.threads import Threads
from support.prefetch_items import SECONDS, double, one_byte
from support.prefetch_threads import assert_no_prefetch_threads, prefetch_threads

ROOT = Path(__file__).parents[3]


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
