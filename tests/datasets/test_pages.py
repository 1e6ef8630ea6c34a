"""The commands and the Python of `qwenvit/datasets/README.md` and the README's section on data sets."""

import re
import shlex
import tarfile
from pathlib import Path

import pytest
from PIL import Image

import qwenvit
from qwenvit.cli.parser import _parser

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", ROOT / "qwenvit/datasets/README.md", ROOT / "qwenvit/datasets/formats/README.md"]
COMMANDS = re.findall(
    r"(?:^|\| |`)qwenvit ((?:encode|info|fetch|picture) [^`#\n]*)", "\n".join(map(Path.read_text, PAGES)), re.M
)


def test_commands_are_found():
    assert len(COMMANDS) > 8


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_have_arguments_that_there_are(command):
    arguments = shlex.split(command.replace("INPUT…", "INPUT").replace("PHOTO…", "PHOTO").replace("[MODEL]", "demo"))
    assert _parser().parse_args(arguments).command == arguments[0]


@pytest.mark.filterwarnings("ignore:model='demo'")
def test_the_python_returns_the_manifest(tmp_path, monkeypatch):
    pytest.importorskip("pyarrow")
    (snippet,) = re.findall(r"^```python\n(.*?)^```", PAGES[1].read_text(), re.MULTILINE | re.DOTALL)
    (tmp_path / "PHOTOS").mkdir()
    Image.linear_gradient("L").save(tmp_path / "a.png")
    with tarfile.open(tmp_path / "PHOTOS" / "s.tar", "w") as archive:
        archive.add(tmp_path / "a.png", "a.png")
    (tmp_path / "PHOTOS" / "b.png").write_bytes(b"broken")
    monkeypatch.chdir(tmp_path)
    encode = qwenvit.encode_dataset
    monkeypatch.setattr(qwenvit, "encode_dataset", lambda *a, **k: encode(*a, model="demo", devices="cpu", **k))
    names = {"qwenvit": qwenvit}
    exec(snippet, names)
    counts = names["manifest"].counts
    stated = re.search(r"counts  # \{(.*)\}", snippet)[1]
    assert list(counts) == re.findall(r'"(\w+)":', stated)
    assert (counts["images"], counts["failed"], counts["shards"]) == (1, 1, 1)
