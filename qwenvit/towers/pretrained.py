"""From the name of a model to its tower: find or fetch the checkpoint and the adapter, and load them."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch

from qwenvit.arguments import Impl
from qwenvit.towers import demo
from qwenvit.towers.checkpoint import ConfigSource, load_tower
from qwenvit.towers.choose import Tower
from qwenvit.towers.locate import directory_of, locate
from qwenvit.weights.hub.adapter import locate_adapter
from qwenvit.weights.hub.fetch import PROCESSOR_CONFIGS


def load_pretrained(
    model: str | os.PathLike[str],
    *,
    impl: Impl,
    device: torch.device,
    dtype: torch.dtype | None,
    subfolder: str | None,
    config: ConfigSource | None,
    family: str | None,
    prefix: str | None,
    adapter: str | os.PathLike[str] | Literal[False] | None,
    revision: str | None,
    **hub: Any,
) -> tuple[Tower, Path | None]:
    """Load the tower of a model, for `Encoder.from_pretrained`, which describes the arguments and errors.

    Returns:
        The tower, and the directory of the preprocessors' configs: the checkpoint's, or that of `config` if only that
        one has some (None for `"demo"`, which has no directory).
    """
    if not isinstance(prefix, str | None):
        raise TypeError(f"prefix: expected a string or None, got {prefix!r}")
    checkpoint: dict[str, Any] = {"config": config, "family": family, "prefix": prefix}
    if os.fspath(model) == demo.NAME:
        refuse_for_demo({"subfolder": subfolder, "adapter": adapter or None, **checkpoint})
        return demo.build_tower(impl, device, dtype), None
    found: Path | Literal[False] | None
    wanted = {"needs_config": config is None, "with_adapter": adapter is None}
    source = locate(model, subfolder=subfolder, prefix=prefix, revision=revision, **wanted, **hub)
    if isinstance(adapter, str | os.PathLike):
        found = locate_adapter(adapter, **hub)
    elif adapter is None or adapter is False:
        found = adapter
    else:
        raise TypeError(f"adapter: expected a path, a Hub repository, False or None, got {adapter!r}")
    tower = load_tower(source, impl=impl, device=device, dtype=dtype, adapter=found, **checkpoint)
    directories = [directory_of(source)]
    if isinstance(config, str | os.PathLike):
        directories.append(directory_of(Path(config).expanduser()))
    with_processors = [one for one in directories if any((one / name).exists() for name in PROCESSOR_CONFIGS)]
    return tower, (with_processors or directories)[0]


def refuse_for_demo(options: Mapping[str, object]) -> None:
    """Raise ValueError for an option about a checkpoint, given with the demo, which has none."""
    for name, value in options.items():
        if value is not None:
            raise ValueError(f"{name}: expected None with model={demo.NAME!r}, which is made by code, got {value!r}")
