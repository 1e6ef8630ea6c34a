"""The manifest of a folder of shards: how its rows were made, and how many there are."""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from qwenvit.datasets.atomic import write_atomically
from qwenvit.weights.strict_json import read_json

NAME = "manifest.json"
COUNTS = ("images", "failed", "tokens", "shards", "bytes")


@dataclass
class Manifest:
    """What `manifest.json` says of a folder.

    Attributes:
        folder: the folder; not in the file.
        settings: what decides the values of a row: model, revision, hash of the weights, dtype, pixel bounds, resize,
            decoder, pooling, format and so on. They are the same for all rows of a folder.
        config: the tower's config, as in config.json.
        versions: the versions of qwenvit that wrote rows.
        counts: `images` (rows; videos count as one), `failed` (inputs in `errors.jsonl`), `tokens`, `shards`, `bytes`
            (of the shards).
        complete: whether the last run came to the end of its inputs.
    """

    folder: Path
    settings: dict[str, Any]
    config: dict[str, Any]
    versions: list[str]
    counts: dict[str, int] = field(default_factory=lambda: dict.fromkeys(COUNTS, 0))
    complete: bool = False

    @classmethod
    def read(cls, folder: Path) -> "Manifest | None":
        """Return a folder's manifest, or None if it has none.

        Raises:
            ValueError: a file that no job wrote.
            OSError: the file cannot be read.
        """
        path = folder / NAME
        if not path.exists():
            return None
        content = read_json(path)
        kinds = {"settings": dict, "config": dict, "versions": list, "counts": dict, "complete": bool}
        wrong = [key for key, kind in kinds.items() if not isinstance(content.get(key), kind)]
        if wrong or set(content) != set(kinds) or set(content["counts"]) != set(COUNTS):
            raise ValueError(f"{path}: expected the manifest of a qwenvit job, got one with other keys ({wrong})")
        return cls(folder, **content)

    def write(self) -> None:
        """Write the manifest, atomically.

        Raises:
            OSError: the file cannot be written.
        """
        content = {key: value for key, value in vars(self).items() if key != "folder"}
        write_atomically(self.folder / NAME, [json.dumps(content, indent=2) + "\n"])

    def check_settings(self, settings: Mapping[str, Any], keys: Iterable[str] | None = None) -> None:
        """Compare the folder's settings with those of a run.

        Args:
            settings: the run's.
            keys: which to compare; None: all of both.

        Raises:
            ValueError: they differ; the message names each that does.
        """
        compared = sorted({*self.settings, *settings} if keys is None else keys)
        differing = [key for key in compared if self.settings.get(key) != settings.get(key)]
        if differing:
            pairs = (f"{key} {self.settings.get(key)!r}, now {settings.get(key)!r}" for key in differing)
            raise ValueError(
                f"{self.folder}: expected the settings of the rows that are there, got others: {'; '.join(pairs)}; "
                "choose another folder, or overwrite"
            )
