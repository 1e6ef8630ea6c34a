"""`adapter_config.json` as peft writes it: what is understood, and what is refused by its name."""

import math
import re
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from qwenvit.weights.adapters.patterns import check_patterns, compile_patterns, value_for
from qwenvit.weights.strict_json import read_json

ADAPTER_CONFIG = "adapter_config.json"

# Settings that choose the modules, which the tensors' names tell anyway, or that concern training alone.
_NO_EFFECT = {
    "task_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision", "inference_mode",
    "runtime_config", "target_modules", "exclude_modules", "target_parameters", "layers_to_transform", "layers_pattern",
    "modules_to_save", "lora_dropout", "megatron_core", "qalora_group_size", "loftq_config", "eva_config",
    "corda_config", "lora_ga_config", "ensure_weight_tying",
    "fan_in_fan_out",  # peft ignores it for nn.Linear, and towers have no other linear layers
    "trainable_token_indices",  # its tensors have names of their own, which no tower's module has
}  # fmt: skip
_UNDERSTOOD = {
    "peft_type", "r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora", "bias", "lora_bias",
    "init_lora_weights",
}  # fmt: skip
_VARIANTS = {
    "use_dora": "DoRA",
    "velora_config": "VeLoRA",
    "alora_invocation_tokens": "aLoRA",
    "use_qalora": "QALoRA",
    "monteclora_config": "MonteCLoRA",
    "use_bdlora": "BD-LoRA",
    "arrow_config": "Arrow",
    "kasa_config": "KaSA",
    "layer_replication": "replicated layers",
    "megatron_config": "Megatron's parallel layers",
}
_MAX_LISTED = 2000  # modules in one list; there are hundreds in a whole model
# Other initialisations (pissa, olora, corda, loftq, lora_ga, mica) change the base's weights or the way of merging.
_PLAIN_INITIALISATIONS = (None, True, False, "gaussian", "eva", "orthogonal")


@dataclass(frozen=True)
class AdapterConfig:
    """The content of an `adapter_config.json`."""

    file: Path
    values: dict[str, Any]

    @classmethod
    def read(cls, file: Path) -> "AdapterConfig":
        """Read the file; raise OSError if it cannot be read, and ValueError if it is not an object in JSON."""
        return cls(file, read_json(file))

    @property
    def base_model(self) -> str | None:
        """The model that the adapter was trained on, as its trainer named it."""
        name = self.values.get("base_model_name_or_path")
        return name if isinstance(name, str) and name else None

    @property
    def has_lora_bias(self) -> bool:
        """Whether B has a bias."""
        return bool(self.values.get("lora_bias"))

    def modules(self, key: str) -> list[str]:
        """Return the names of modules that `modules_to_save` or `target_parameters` lists.

        Raises ValueError unless it is a list of names or absent.
        """
        names = self.values.get(key) or []
        if not isinstance(names, list) or not all(isinstance(name, str) and name for name in names):
            raise self._error(key, "a list of names", names)
        if len(names) > _MAX_LISTED:
            raise self._error(key, f"at most {_MAX_LISTED} names", len(names))
        return names

    def check(self, paths: list[str]) -> None:
        """Check that the adapter is plain LoRA, for the modules with these `paths`, as `rank` and `scale` take them.

        Raises ValueError, which names the setting that is not understood or of a wrong type.
        """
        if (kind := self.values.get("peft_type")) != "LORA":
            raise self._error("peft_type", "LORA, the only kind of adapter that is merged", kind)
        for key, value in self.values.items():
            if key in _VARIANTS and value:
                raise self._error(key, f"plain LoRA, without {_VARIANTS[key]}", value)
            if key not in _UNDERSTOOD | _NO_EFFECT | _VARIANTS.keys() and value:
                raise self._error(key, "settings that are known, since this one may change the result", value)
        for key in ("use_rslora", "lora_bias"):
            if not isinstance(self.values.get(key) or False, bool):
                raise self._error(key, "true or false", self.values[key])
        if (bias := self.values.get("bias") or "none") not in ("none", "all", "lora_only"):
            raise self._error("bias", "none, all or lora_only", bias)
        start = self.values.get("init_lora_weights")
        if not any(start is plain or (isinstance(start, str) and start == plain) for plain in _PLAIN_INITIALISATIONS):
            what = "an adapter for the unchanged base; save it with peft's path_initial_model_for_weight_conversion"
            raise self._error("init_lora_weights", what, start)
        self.modules("modules_to_save")
        for name in self.modules("target_parameters"):
            # Their names are those of LoRA on a module, and they are not merged in the same way.
            if any(f".{path}.weight".endswith(f".{name}") for path in paths):
                raise self._error("target_parameters", "parameters of other parts than the tower", name)
        for key, default in (("rank_pattern", "r"), ("alpha_pattern", "lora_alpha")):
            self._check_numbers(key, default, paths)

    def _check_numbers(self, key: str, default: str, paths: list[str]) -> None:
        patterns = self.values.get(key) or {}
        if not isinstance(patterns, dict):
            raise self._error(key, "an object", patterns)
        numbers = {f"{key}: {pattern[:200]!r}": number for pattern, number in patterns.items()}
        for name, number in [(default, self.values.get(default)), *numbers.items()]:
            if default == "r" and (type(number) is not int or number < 1):
                raise self._error(name, "a positive integer", number)
            if type(number) not in (int, float):
                raise self._error(name, "a number", number)
        try:
            check_patterns(patterns, len(paths), max(map(len, paths), default=0))
        except ValueError as error:
            raise ValueError(f"{self.file}: {key}: {error}") from None

    def rank(self, path: str) -> int:
        """Return the rank of the module with this path, once `check` has passed."""
        return int(value_for(path, self._ranks, self.values["r"]))

    def scale(self, path: str) -> float:
        """Return what B @ A is multiplied by for the module with this path, once `check` has passed."""
        alpha, rank = value_for(path, self._alphas, self.values["lora_alpha"]), self.rank(path)
        return float(alpha / (math.sqrt(rank) if self.values.get("use_rslora") else rank))

    @cached_property
    def _ranks(self) -> list[tuple[re.Pattern[str], Any]]:
        return compile_patterns(self.values.get("rank_pattern") or {})

    @cached_property
    def _alphas(self) -> list[tuple[re.Pattern[str], Any]]:
        return compile_patterns(self.values.get("alpha_pattern") or {})

    def _error(self, key: str, expected: str, got: object) -> ValueError:
        return ValueError(f"{self.file}: {key}: expected {expected}, got {str(got)[:200]!r}")
