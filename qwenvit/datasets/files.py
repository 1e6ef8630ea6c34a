"""Finding files below folders and by patterns: in a fixed order, with the names of few folders in memory."""

import os
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from fnmatch import fnmatchcase

MAGIC = frozenset("*?[")
"""What makes an input a pattern if there is no file of that name."""


@dataclass(frozen=True, slots=True)
class Found:
    """A file that was found, or a place that could not be searched."""

    relative: str
    """Its path from where the search started, with slashes."""
    path: str
    error: str | None = None
    """Why a folder, or a link, is of no use."""


Folder = tuple[int, int]
"""A folder's device and inode."""


def walk(
    root: str, exclude: Folder | None = None, may_match: Callable[[list[str]], bool] | None = None
) -> Iterator[Found]:
    """Yield every file below a folder, sorted by the parts of its path.

    Links to folders are followed after everything that is in the folder itself. No folder is searched twice, whichever
    links lead to it, so that loops end and a file keeps its name when a link to its folder is added.

    Args:
        root: the folder.
        exclude: a folder to leave out, as the output may be inside the input.
        may_match: whether to search the folder of these parts.
    """
    seen = {exclude}
    links = deque([("", root)])
    while links:
        start, path = links.popleft()
        stack = [_entries(start, path, seen, links)]
        while stack:
            entry = next(stack[-1], None)
            if entry is None:
                stack.pop()
            elif entry.error is None and entry.path.endswith(os.sep):
                if may_match is None or may_match(entry.relative.split("/")):
                    stack.append(_entries(entry.relative, entry.path[:-1], seen, links))
            else:
                yield entry


def _entries(relative: str, path: str, seen: set[Folder | None], links: deque[tuple[str, str]]) -> Iterator[Found]:
    """Yield the entries of a folder, sorted; a folder's path ends with a separator. Links to folders go to `links`."""
    try:
        found = os.stat(path)
        if (found.st_dev, found.st_ino) in seen:
            return
        seen.add((found.st_dev, found.st_ino))
        with os.scandir(path) as entries:
            # Names alone: a million entries of a folder would take four times the memory.
            names = [_name_with_kind(entry) for entry in entries]
    except OSError as error:
        yield Found(relative or ".", path, f"the folder cannot be searched: {error.strerror}")
        return
    names.sort()
    prefix = f"{relative}/" if relative else ""
    for entry in names:
        name, kind = entry[:-1], entry[-1]
        inner = os.path.join(path, name)
        if kind == _LINK:
            links.append((prefix + name, inner))
        elif kind == _DANGLING:
            yield Found(prefix + name, inner, "a link to a file or folder that is not there")
        else:
            yield Found(prefix + name, inner + os.sep if kind == _FOLDER else inner)


_FILE, _FOLDER, _LINK, _DANGLING = "\0", "\1", "\2", "\3"
"""Characters after a name; none can be in one but the first, which sorts first: names sort as without them."""


def _name_with_kind(entry: os.DirEntry[str]) -> str:
    if entry.is_symlink():
        try:
            is_folder = entry.is_dir()
            kind = _LINK if is_folder else _FILE if os.path.exists(entry.path) else _DANGLING
        except OSError:  # a link to itself
            kind = _DANGLING
    else:
        kind = _FOLDER if entry.is_dir() else _FILE
    return entry.name + kind


def is_pattern(text: str) -> bool:
    """Whether an input that is no existing file is a pattern."""
    return not MAGIC.isdisjoint(text)


def expand(pattern: str, exclude: Folder | None = None) -> Iterator[Found]:
    """Yield the files that a pattern matches, and those below the folders that it matches, in the order of `walk`.

    `*`, `?` and `[…]` match within one name, and no dot at its start. `**` matches any number of folders. Relative
    paths start at the last folder before the first name with a wildcard.
    """
    parts = os.fspath(pattern).replace(os.sep, "/").split("/")
    fixed = next(position for position, part in enumerate(parts) if is_pattern(part))
    root = "/".join(parts[:fixed]) or ("/" if fixed else ".")
    wanted = parts[fixed:]
    for found in walk(root, exclude, lambda folder: _may_match(folder, wanted)):
        if _matches(found.relative.split("/"), wanted):
            yield found


def _name_matches(name: str, pattern: str) -> bool:
    return fnmatchcase(name, pattern) and (name[0] != "." or pattern[0] == ".")


def _matches(parts: list[str], pattern: list[str]) -> bool:
    """Whether a pattern matches a path, or a folder above it."""
    if not pattern:
        return True
    if pattern[0] == "**":
        if _matches(parts, pattern[1:]):
            return bool(parts)
        return bool(parts) and parts[0][0] != "." and _matches(parts[1:], pattern)
    return bool(parts) and _name_matches(parts[0], pattern[0]) and _matches(parts[1:], pattern[1:])


def _may_match(folder: list[str], pattern: list[str]) -> bool:
    """Whether a pattern may match something in a folder."""
    if not pattern or not folder:
        return True
    if pattern[0] == "**":
        return True
    return _name_matches(folder[0], pattern[0]) and _may_match(folder[1:], pattern[1:])
