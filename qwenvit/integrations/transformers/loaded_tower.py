"""Find the vision tower of a loaded transformers model, and check that its weights are all there and plain."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import __version__ as TRANSFORMERS

from qwenvit.config.families import FAMILIES, FAMILY_OF_MODEL_TYPE
from qwenvit.config.vision_config import VisionConfig
from qwenvit.ops.checks import FLOATING
from qwenvit.towers.reference import ReferenceTower
from qwenvit.weights.names import official_name

MIN_TRANSFORMERS = (5, 3)
"""Before 5, towers return tensors and tuples instead of output classes."""
_CHILDREN = {"patch_embed", "blocks", "merger"}  # of every family's tower, and of no wrapper around one
_PLAIN_LAYERS = ("torch.nn.modules.", "transformers.models.", "transformers.activations.")
_HARMLESS_HOOKS = ("output_capturing_hook", "make_inputs_require_grads")
"""Functions of transformers' own: the first records hidden states and stays after the call that asked for them; the
second, for gradient checkpointing, makes the patch embedding's output require gradients, which a frozen tower drops."""
_MAX_LISTED = 4


def find_tower(model: nn.Module) -> tuple[nn.Module, VisionConfig]:
    """Return the vision tower that `model` contains, and its config.

    Args:
        model: a transformers model, wrapped (PEFT, DDP, torch.compile) or not, or a tower.

    Raises:
        TypeError: `model` is not a module, or does not contain exactly one tower of a supported family.
        ValueError: transformers is too old, or the tower's config has values that no tower of its family can have.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a transformers model (of a pipeline: its .model), got {type(model).__name__}")
    if tuple(int(part) for part in TRANSFORMERS.split(".")[:2]) < MIN_TRANSFORMERS:
        expected = ".".join(map(str, MIN_TRANSFORMERS))
        raise ValueError(f"model: expected a model of transformers {expected} or later, got {TRANSFORMERS}")
    found = [module for module in model.modules() if _is_tower(module)]
    if len(found) != 1:
        raise TypeError(
            f"model: expected exactly one vision tower of {', '.join(FAMILIES)}, got {len(found)} in "
            f"{type(model).__name__}"
        )
    config: Any = found[0].config
    return found[0], VisionConfig.from_hf(config.to_dict())


def _is_tower(module: nn.Module) -> bool:
    model_type = getattr(getattr(module, "config", None), "model_type", None)
    return model_type in FAMILY_OF_MODEL_TYPE and module._modules.keys() >= _CHILDREN


def tower_weights(tower: nn.Module, config: VisionConfig) -> dict[str, nn.Parameter]:
    """Return the parameters of a transformers tower by canonical name, in the order of our towers' state dicts.

    Raises:
        ValueError: the weights are not plain tensors of one floating dtype in the memory of one device, in layers of
            torch and of transformers' modelling code, of the shapes that `config` states; or something besides the
            layers takes part in the computation (hooks). The message names the cause.
    """
    _check_layers(tower)
    parameters = dict(tower.named_parameters())
    _check_tensors(parameters)
    with torch.device("meta"):
        shapes = {name: tuple(tensor.shape) for name, tensor in ReferenceTower(config).state_dict().items()}
    names = {name: official_name(name, config.family) for name in shapes}
    _check_shapes(parameters, {names[name]: shape for name, shape in shapes.items()}, config.family)
    return {name: parameters[official] for name, official in names.items()}


def _check_layers(tower: nn.Module) -> None:
    for name, module in tower.named_modules():
        where = f"the vision tower's {name}" if name else "the vision tower"
        if hasattr(module, "_hf_hook"):
            raise _refusal("no hooks of accelerate (device_map over several devices, offload)", f"one on {where}")
        if name and (hooks := foreign_hooks(hook_dicts(module))):  # those of the tower itself go on working
            raise _refusal("no hooks inside the vision tower", f"{_describe(hooks[0])} on {where}")
        if "forward" in vars(module):  # after the hooks: accelerate's replace it too
            raise _refusal("the vision tower's own forward", f"a replaced one on {where}")
        if not f"{type(module).__module__}.".startswith(_PLAIN_LAYERS):
            got = f"{where} of class {type(module).__module__}.{type(module).__qualname__}"
            raise _refusal("plain layers in the vision tower, neither quantised nor adapted (LoRA)", got)


def _check_tensors(parameters: dict[str, nn.Parameter]) -> None:
    for name, parameter in parameters.items():
        if type(parameter) is not nn.Parameter:
            kind = type(parameter).__name__  # DTensor, Params4bit, AffineQuantizedTensor, ...
            expected = "plain weights in the vision tower, neither split over devices (tensor parallel) nor quantised"
            raise _refusal(expected, f"{name} of class {kind}")
        if parameter.is_meta:
            raise _refusal("weights in memory", f"{name} on the meta device (offloaded, or not loaded)")
    _refuse_several("one device for the whole vision tower", parameters, lambda parameter: parameter.device)
    _refuse_several("one dtype in the whole vision tower", parameters, lambda parameter: parameter.dtype)
    dtype = next(iter(parameters.values())).dtype
    if dtype not in FLOATING:
        raise _refusal(f"weights in one of {', '.join(map(str, FLOATING))}", str(dtype))


def _check_shapes(parameters: dict[str, nn.Parameter], expected: dict[str, tuple[int, ...]], family: str) -> None:
    got = {name: tuple(parameter.shape) for name, parameter in parameters.items()}
    differing = [
        f"{name}: expected {expected.get(name, 'none')}, got {got.get(name, 'none')}"
        for name in sorted(expected.keys() | got.keys())
        if expected.get(name) != got.get(name)
    ]
    if differing:
        more = f"; and {len(differing) - _MAX_LISTED} more" if len(differing) > _MAX_LISTED else ""
        listed = "; ".join(differing[:_MAX_LISTED])
        raise _refusal(f"the parameters of a {family} tower of its config", f"differing ones: {listed}{more}")


def hook_dicts(module: nn.Module) -> list[dict[int, Callable[..., object]]]:
    """Return the dictionaries in which torch keeps a module's forward and backward hooks."""
    return [module._forward_pre_hooks, module._forward_hooks, module._backward_pre_hooks, module._backward_hooks]


def foreign_hooks(dicts: Iterable[dict[int, Callable[..., object]]]) -> list[Callable[..., object]]:
    """Return the hooks in `dicts` but `_HARMLESS_HOOKS`."""
    hooks = [hook for hooks in dicts for hook in hooks.values()]
    return [hook for hook in hooks if getattr(hook, "__qualname__", "").rpartition(".")[2] not in _HARMLESS_HOOKS]


def _describe(hook: Callable[..., object]) -> str:
    return getattr(hook, "__qualname__", type(hook).__name__)


def _refuse_several(expected: str, parameters: dict[str, nn.Parameter], kind: Callable[[Tensor], object]) -> None:
    examples = {kind(parameter): name for name, parameter in parameters.items()}
    if len(examples) > 1:
        raise _refusal(expected, ", ".join(f"{name} with {value}" for value, name in examples.items()))


def _refusal(expected: str, got: str) -> ValueError:
    return ValueError(f"model: expected {expected}, got {got}; the model is unchanged")
