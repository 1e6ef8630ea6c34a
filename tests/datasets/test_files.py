"""Searching folders and matching patterns, against pathlib, glob and what the file system itself says."""

import glob
import itertools
import os
import random
from pathlib import Path

import pytest

from qwenvit.datasets.digests import MAX_RECENT, DigestSet
from qwenvit.datasets.files import expand, walk


def make_tree(root, names):
    for name in names:
        file = root / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.touch()


def relatives(found):
    return [one.relative for one in found]


NAMES = [
    "a.png",
    "a/b.png",
    "a/.hidden.png",
    "a!.png",
    "B/c.jpg",
    "B/deep/er/d.jpg",
    ".dot/e.png",
    "z.txt",
    "a/b/f.png",
]


def test_every_file_is_found_in_the_order_of_its_parts(tmp_path):
    make_tree(tmp_path, NAMES)
    expected = sorted(path for path in tmp_path.rglob("*") if path.is_file())
    found = list(walk(str(tmp_path)))
    assert [Path(one.path) for one in found] == expected
    assert relatives(found) == [path.relative_to(tmp_path).as_posix() for path in expected]
    assert not any(one.error for one in found)


def test_folders_behind_links_are_found_once_and_loops_end(tmp_path):
    root, outside = tmp_path / "root", tmp_path / "outside"
    make_tree(root, ["m/a.png", "z/b.png"])
    make_tree(outside, ["c.png", "inner/d.png"])
    (root / "a_first").symlink_to(root / "m")  # inside: found under its own name alone
    (root / "m" / "up").symlink_to(root)
    (root / "out").symlink_to(outside)
    (root / "out_again").symlink_to(outside)
    (outside / "self").symlink_to(outside)
    (outside / "back").symlink_to(root)
    (root / "file.png").symlink_to(outside / "c.png")
    found = relatives(walk(str(root)))
    assert found == ["file.png", "m/a.png", "z/b.png", "out/c.png", "out/inner/d.png"]


def test_a_link_to_a_parent_is_followed_once(tmp_path):
    make_tree(tmp_path, ["root/a.png", "sibling/b.png"])
    (tmp_path / "root" / "up").symlink_to(tmp_path)
    assert relatives(walk(str(tmp_path / "root"))) == ["a.png", "up/sibling/b.png"]


def test_a_folder_that_may_not_be_searched_is_named(tmp_path, monkeypatch):
    make_tree(tmp_path, ["a.png", "locked/b.png", "z.png"])
    scandir = os.scandir

    def refuse(path):  # root may search every folder
        if Path(path).name == "locked":
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    found = list(walk(str(tmp_path)))
    assert relatives(found) == ["a.png", "locked", "z.png"]
    assert found[1].error == "the folder cannot be searched: Permission denied"


def test_links_to_nowhere_are_named(tmp_path):
    (tmp_path / "gone.png").symlink_to(tmp_path / "nowhere")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    found = list(walk(str(tmp_path)))
    assert relatives(found) == ["gone.png", "loop"]
    assert all("not there" in one.error for one in found)


def test_a_folder_can_be_left_out(tmp_path):
    make_tree(tmp_path, ["a.png", "out/b.png", "in/c.png"])
    (tmp_path / "in" / "link").symlink_to(tmp_path / "out")
    status = (tmp_path / "out").stat()
    assert relatives(walk(str(tmp_path), (status.st_dev, status.st_ino))) == ["a.png", "in/c.png"]


PATTERNS = [
    "*.png",
    "a*",
    "*/b.png",
    "?/*.png",
    "[aB]/*",
    "B/**/*.jpg",
    "**/*.png",
    "*/*/*",
    "**/b/*",
    "**/d*/**/*.jpg",
]


@pytest.mark.parametrize("pattern", PATTERNS)
def test_patterns_match_what_glob_matches(tmp_path, pattern):
    make_tree(tmp_path, NAMES)
    matched = [Path(path) for path in glob.glob(f"{tmp_path}/{pattern}", recursive=True)]
    inside = itertools.chain(*([path] if path.is_file() else path.rglob("*") for path in matched))
    expected = sorted({path for path in inside if path.is_file()})
    found = list(expand(f"{tmp_path}/{pattern}"))
    assert [Path(one.path) for one in found] == expected
    fixed = tmp_path / "B" if pattern.startswith("B/") else tmp_path
    assert relatives(found) == [path.relative_to(fixed).as_posix() for path in expected]


def test_a_pattern_searches_no_folder_that_it_cannot_match(tmp_path, monkeypatch):
    make_tree(tmp_path, ["2023/a.png", "2024/b.png", "2024/more/c.png"])
    searched, scandir = [], os.scandir
    monkeypatch.setattr(os, "scandir", lambda path: searched.append(Path(path).name) or scandir(path))
    assert relatives(expand(f"{tmp_path}/2024/*.png")) == ["b.png"]
    assert searched == ["2024"]


def test_loops_end_for_patterns_too(tmp_path):
    make_tree(tmp_path, ["a/b.png"])
    (tmp_path / "a" / "loop").symlink_to(tmp_path)
    assert relatives(expand(f"{tmp_path}/**/*.png")) == ["a/b.png"]


def test_a_pattern_is_relative_to_the_current_folder(tmp_path, monkeypatch):
    make_tree(tmp_path, ["a.png", "b.txt"])
    monkeypatch.chdir(tmp_path)
    assert relatives(expand("*.png")) == ["a.png"]


def test_a_digest_set_is_a_set():
    draw = random.Random(0)
    texts = [f"{draw.randrange(150_000)}\udcff\n" for _ in range(3 * MAX_RECENT)]
    ours, truth = DigestSet(), set()
    for text in texts:
        assert ours.add(text) == (text not in truth)
        truth.add(text)
    assert len(ours) == len(truth)
    assert all(text in ours for text in truth)
    assert not any(f"{number}" in ours for number in range(1000))
