"""Lines of text: whatever a name has in it, and whatever becomes of the terminal."""

import io
import sys
import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qwenvit.cli import progress
from qwenvit.cli.progress import ProgressLine, describe, duration
from qwenvit.cli.terminal import make_lenient, one_line, printable, say
from qwenvit.datasets.progress import Progress


@given(st.text(st.characters(exclude_categories=[])))  # surrogates too
def test_nothing_in_a_name_can_control_a_terminal(text):
    shown = printable(text)
    assert not any(unicodedata.category(one) in ("Cc", "Cf", "Cs", "Zl", "Zp") for one in shown)
    if text.isprintable():
        assert shown == text


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("a\nb", r"a\nb"),
        ("\x1b[31mred\x1b]0;title\x07", r"\x1b[31mred\x1b]0;title\x07"),
        ("\u202egpj.exe", r"\u202egpj.exe"),
        ("日本 café.jpg", "日本 café.jpg"),
        ("\udcff", r"\udcff"),
        ("\x9b2J", r"\x9b2J"),
    ],
)
def test_what_is_escaped_and_what_is_not(text, shown):
    assert printable(text) == shown


def test_an_error_is_one_line():
    assert one_line(ValueError("first\n  second\x1b[2J")) == r"first second\x1b[2J"
    assert one_line(ValueError()) == "ValueError"


def test_a_terminal_need_not_know_a_character():
    stream = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    make_lenient(stream)
    say("日 café", stream)
    stream.seek(0)
    assert stream.buffer.getvalue() == b"\\u65e5 caf\\xe9\n"


class Broken(io.StringIO):
    def write(self, _):
        raise BrokenPipeError


def test_a_broken_stream_stops_nothing():
    say("anything", Broken())
    closed = io.StringIO()
    closed.close()
    say("anything", closed)


def at(seconds, **counts):
    values = {"encoded": 0, "failed": 0, "skipped": 0, "expected": 1000, "tokens": 0, "waiting": 0.0}
    return Progress(seconds=seconds, **(values | counts))


def test_progress_in_words():
    before, now = at(10, encoded=100, tokens=10_000), at(20, encoded=200, failed=10, tokens=45_000, waiting=0.034)
    # 110 images in 10 s are 11/s; 1000 - 210 - 90 remain, which take 64 s.
    expected = "300 of 1,000 images, 11 images/s, 3,500 tokens/s, ETA 01:04, device waits 3%, 10 failed"
    assert describe(Progress(**(vars(now) | {"skipped": 90})), before) == expected
    assert describe(at(0), at(0)) == "0 of 1,000 images"
    assert describe(at(2, encoded=1, tokens=300, expected=None), at(0)) == (
        "1 images, 0.5 images/s, 150 tokens/s, device waits 0%"
    )


@pytest.mark.parametrize(
    ("seconds", "shown"), [(0, "00:00"), (59.6, "01:00"), (3599, "59:59"), (3600, "1:00:00"), (200_000, "2 d 7 h")]
)
def test_durations(seconds, shown):
    assert duration(seconds) == shown


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_a_terminals_line_is_overwritten_and_cut_at_its_width(monkeypatch):
    stream = Terminal()
    monkeypatch.setattr(sys, "stderr", stream)
    monkeypatch.setenv("COLUMNS", "30")
    line = ProgressLine()
    line(at(1, encoded=10))
    line(at(2, encoded=20))
    shown = stream.getvalue().split(progress.CLEAR_LINE)[1:]
    assert shown[0].startswith("10 of 1,000 images, 10 images")
    assert shown[1].startswith("20 of 1,000 images")
    assert all(len(one) == 29 for one in shown)
    assert "\n" not in stream.getvalue()
    line.clear()
    assert stream.getvalue().endswith(progress.CLEAR_LINE)


def test_a_log_gets_a_line_a_minute(monkeypatch):
    stream, now = io.StringIO(), 0.0
    monkeypatch.setattr(sys, "stderr", stream)
    monkeypatch.setattr(progress.time, "monotonic", lambda: now)
    line = ProgressLine()
    for second in range(1, 200):
        now = float(second)
        line(at(second, encoded=second))
    assert [text.split(" of ")[0] for text in stream.getvalue().splitlines()] == ["60", "120", "180"]


def test_rates_are_those_of_the_last_seconds(monkeypatch):
    stream = Terminal()
    monkeypatch.setattr(sys, "stderr", stream)
    monkeypatch.setenv("COLUMNS", "200")
    line = ProgressLine()
    for second in range(1, 101):
        line(at(second, encoded=second * 2 if second <= 60 else 120 + 20 * (second - 60), expected=5000))
    assert "920 of 5,000 images, 20 images/s" in stream.getvalue().split(progress.CLEAR_LINE)[-1]
