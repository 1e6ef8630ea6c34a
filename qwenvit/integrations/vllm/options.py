"""The plugin's options: `--additional-config '{"qwenvit": {...}}'`."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from typing import Any, Literal, cast, get_args

Wish = Literal["auto", "tower", "attention"]
PluginImpl = Literal["auto", "triton", "reference"]
_ATTRIBUTE = "qwenvit"


@dataclass(frozen=True)
class Options:
    """What a user asks of the plugin. What cannot be done is an error if it is asked for, and left out by default."""

    tower: Wish = "auto"
    """`"tower"`: our tower in place of vLLM's; `"attention"`: our attention in vLLM's; `"auto"`: the first that can."""
    pixels: bool | None = None
    """Whether images travel as RGB bytes and are resized where the tower runs; None where they can."""
    impl: PluginImpl = "auto"
    """`"triton"`, `"reference"` (plain torch), or `"auto"` by device."""

    def __post_init__(self) -> None:
        for name, allowed in (("tower", get_args(Wish)), ("impl", get_args(PluginImpl))):
            if (value := getattr(self, name)) not in allowed:
                raise ValueError(f"additional_config: qwenvit.{name}: expected one of {allowed}, got {value!r}")
        if not isinstance(self.pixels, bool | None):
            raise ValueError(f"additional_config: qwenvit.pixels: expected true or false, got {self.pixels!r}")


def read_options(additional_config: object) -> Options:
    """Return the options in vLLM's `additional_config`.

    Raises:
        ValueError: an unknown key or value.
    """
    given = additional_config.get("qwenvit", {}) if isinstance(additional_config, Mapping) else {}
    if not isinstance(given, Mapping):
        raise ValueError(f"additional_config: qwenvit: expected an object with options, got {given!r}")
    known = [field.name for field in fields(Options)]
    if unknown := [key for key in given if key not in known]:
        raise ValueError(f"additional_config: qwenvit: expected keys among {known}, got {unknown}")
    return Options(**given)


def options_of(model_config: Any) -> Options:
    """Return the options that vLLM's `ModelConfig` carries; the default ones if it carries none."""
    return cast(Options, getattr(model_config, _ATTRIBUTE, Options()))


class OptionsReader:
    """An entry of vLLM's table of hooks that see a `VllmConfig` first: read the options, then call vLLM's own hook.

    vLLM gives its multimodal processors a `ModelConfig` alone, so the options are kept there; it travels to every
    process.

    Args:
        own: vLLM's own hook for the architecture, if there is one.
    """

    def __init__(self, own: Any = None) -> None:
        self.own = own

    def verify_and_update_config(self, vllm_config: Any) -> None:
        """Read the options of a new `VllmConfig`."""
        setattr(vllm_config.model_config, _ATTRIBUTE, read_options(vllm_config.additional_config))
        if self.own is not None:
            self.own.verify_and_update_config(vllm_config)

    def verify_and_update_model_config(self, model_config: Any) -> None:
        """Do what vLLM does with a new `ModelConfig`."""
        if self.own is not None:
            self.own.verify_and_update_model_config(model_config)


def read_options_with_config(architectures: Iterable[str]) -> None:
    """Make vLLM read the options of these architectures when it makes its configuration; a second call does nothing."""
    from vllm.model_executor.models.config import MODELS_CONFIG_MAP

    for architecture in architectures:
        own = MODELS_CONFIG_MAP.get(architecture)
        if not isinstance(own, OptionsReader):
            MODELS_CONFIG_MAP[architecture] = OptionsReader(own)
