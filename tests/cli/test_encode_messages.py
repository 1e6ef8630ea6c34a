"""What `qwenvit encode` says, to a terminal or a reader that is gone: errors, images, progress, names of any kind."""

import io
import os
import subprocess
import sys

import pytest

import qwenvit
from qwenvit.cli import encode as encode_module
from support.encode_command import command, index, run

pytestmark = pytest.mark.filterwarnings("ignore:model='demo'")
BUFFERED = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
"""An environment in which Python still has to flush what a broken stream did not take when it ends."""


def test_of_many_errors_the_first_are_named_unless_verbose(capsys, photos, tmp_path, monkeypatch):
    monkeypatch.setattr(encode_module, "MAX_ERROR_LINES", 3)
    for number in range(10, 18):
        (photos / f"{number}.png").write_bytes(b"broken")
    _, _, err = run(capsys, photos, "-o", tmp_path / "out")
    assert sum(line.startswith("qwenvit: error: ") for line in err.splitlines()) == 3
    assert "further errors only in errors.jsonl" in err
    _, _, err = run(capsys, photos, "-o", tmp_path / "out", "--verbose")
    assert sum(line.startswith("qwenvit: error: ") for line in err.splitlines()) == 8


def test_verbose_has_a_line_for_each_image_and_quiet_the_summary_alone(capsys, photos, tmp_path):
    _, out, _ = run(capsys, photos, "-o", tmp_path / "out", "--verbose")
    assert out.splitlines()[:5] == [f"{number}.png: 2x2, 4 tokens" for number in range(5)]
    _, out, err = run(capsys, photos, "-o", tmp_path / "quiet", "--quiet")
    assert out.count("\n") == 1
    assert [line for line in err.splitlines() if "random weights" not in line] == []
    _, out, _ = run(capsys, photos, "-o", tmp_path / "out.safetensors", "--quiet")
    assert out == f"5 of 5 images -> {tmp_path / 'out.safetensors'}\n"


NAMES = [b"new\nline.png", b"\x1b[31mred.png", b"\xff\xfe.png", "日本.png".encode(), b"x" * 251 + b".png", b" .png"]
IDS = ["new\nline.png", "\x1b[31mred.png", r"\xff\xfe.png", "日本.png", "x" * 251 + ".png", " .png"]


@pytest.mark.parametrize("target", ["out", "out.safetensors"])
def test_names_of_any_kind_harm_neither_the_output_nor_the_terminal(photos, tmp_path, target):
    folder = tmp_path / "odd"
    folder.mkdir()
    for name in NAMES:
        (folder / os.fsdecode(name)).write_bytes((photos / "0.png").read_bytes())
    (folder / "broken\x1b]0;title\x07.png").write_bytes(b"broken")
    environment = os.environ | {
        "LC_ALL": "C",
        "PYTHONUTF8": "0",
        "PYTHONCOERCECLOCALE": "0",
        "PYTHONIOENCODING": "ascii",
    }
    # Without UTF-8 mode, the C locale's own encoding keeps what is not ASCII as surrogates.
    done = subprocess.run(
        command(folder, "-o", tmp_path / target, "-v"), capture_output=True, env=environment, check=False
    )
    assert done.returncode == 1, done.stderr
    lines = (done.stdout + done.stderr).replace(b"\n", b"")
    assert all(0x20 <= byte < 0x7F for byte in lines)
    assert b"6 of 7 images" in done.stdout
    assert rb"error: broken\x1b]0;title\x07.png: " in done.stderr
    assert rb"new\nline.png" in done.stdout
    file = tmp_path / target if target.endswith("s") else tmp_path / target / "00000.safetensors"
    assert set(qwenvit.load_embeddings(file)) == set(IDS)


def test_a_reader_that_goes_away_stops_nothing(photos, tmp_path):
    script = 'set -o pipefail; "$@" | true'
    arguments = command(photos, "-o", tmp_path / "out", "--verbose")
    done = subprocess.run(
        ["bash", "-c", script, "bash", *arguments], capture_output=True, env=BUFFERED, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    assert "BrokenPipe" not in done.stderr
    assert len(index(tmp_path / "out")) == 5


def test_no_place_on_the_disk_of_standard_output_stops_nothing(photos, tmp_path):
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            command(photos, "-o", tmp_path / "out", "-v"),
            stdout=full,
            stderr=subprocess.PIPE,
            env=BUFFERED,
            text=True,
            check=False,
        )
    assert done.returncode == 0, done.stderr
    assert len(index(tmp_path / "out")) == 5


def test_progress_is_shown_on_a_terminal(capsys, photos, tmp_path, monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    stream = Terminal()
    monkeypatch.setattr(sys, "stderr", stream)
    monkeypatch.setenv("COLUMNS", "200")
    run(capsys, photos, "-o", tmp_path / "out")
    last = [one for one in stream.getvalue().split("\r\x1b[K") if one][-1]
    assert last.startswith("5 of 5 images, ")
    assert "tokens/s, ETA 00:00, device waits " in last
