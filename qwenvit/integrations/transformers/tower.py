"""Compute the vision tower of a loaded transformers model with qwenvit's towers."""

import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import cache
from operator import attrgetter
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from qwenvit.arguments import Impl
from qwenvit.config.vision_config import VisionConfig
from qwenvit.graphs.graphed_tower import graphs_of
from qwenvit.graphs.weight_guard import WeightGuard
from qwenvit.integrations.transformers.handle import Handle
from qwenvit.integrations.transformers.loaded_tower import find_tower, foreign_hooks, hook_dicts, tower_weights
from qwenvit.outputs import TowerOutput
from qwenvit.plan.grid_plan import GridPlan
from qwenvit.plan.inputs import check_grid, check_pixel_values
from qwenvit.towers.choose import Tower, tower_class
from qwenvit.towers.fast import FastTower
from qwenvit.weights.names import official_name

PRECOMPUTED = (
    "position_ids",
    "cu_seqlens",
    "max_seqlen",
    "window_index",
    "cu_window_seqlens",
    "max_window_seqlen",
    "interp_indices",
    "interp_weights",
    "bilinear_indices",
    "bilinear_weights",
)
"""What a caller may compute of the grids for transformers' towers, which ours compute themselves."""


class TowerHandle(Handle):
    """Undo `use_tower`: `remove()`, or leaving a `with` block, restores the model's own tower.

    Attributes:
        tower: qwenvit's tower that computes in place of the model's; None after `remove()`.
        extra_bytes: bytes of weights held besides the model's own: packed copies; with `free_original` their padding
            alone. 0 for the reference tower, which shares the model's parameters.
    """

    def __init__(
        self, undo: Callable[[], None], tower: Tower, extra_bytes: int, mixes_weights: Callable[[], bool] | None
    ) -> None:
        super().__init__(undo)
        self.tower: Tower | None = tower
        self.extra_bytes = extra_bytes
        self._mixes_weights = mixes_weights  # None if no weights are freed

    def remove(self) -> None:
        """Restore the model's own tower, and release qwenvit's; a second call does nothing.

        Raises:
            ValueError: after restoring, if weights were written while others were freed; or, with nothing restored, if
                the tower's `forward` was replaced once more.
        """
        mixed = self._mixes_weights is not None and self._mixes_weights()
        super().remove()
        self.tower, self.extra_bytes, self._mixes_weights = None, 0, None
        if mixed:
            raise ValueError(
                "model: weights were loaded or changed while use_tower had freed others, which are now as they were "
                "before; load the vision tower's weights again"
            )


def use_tower(model: nn.Module, impl: Impl = "auto", *, free_original: bool = False) -> TowerHandle:
    """Make a loaded transformers model compute its vision tower with qwenvit's, from the weights it has.

    The model's own tower stays in place, with its config, parameters and names; only its `forward` is replaced. So
    `generate`, `forward`, `get_image_features`, `get_video_features`, pipelines, `save_pretrained`, and hooks on the
    tower itself work as before.

    The reference tower shares the model's parameters, computes on any device, and gives their gradients (without
    gradient checkpointing). The fast tower is for inference: it shares the weights whose layout it takes as it is and
    holds packed copies of the others, `handle.extra_bytes` in all. It runs in CUDA graphs, except when hidden states
    are asked of it, and in the dtype of its weights, whatever autocast says; in float32 it refuses autocast.
    `model(..., output_hidden_states=True)` asks the tower for its own too, as in transformers.

    While the tower is replaced, the model may not be moved, converted, loaded anew, quantised, adapted or copied: the
    next call, or the copying, raises. (Weights written through `.data`, or made in inference mode, escape the check.)

    Args:
        model: a model of transformers 5.3 or later that contains one vision tower of Qwen2-VL, Qwen2.5-VL, Qwen3-VL
            (MoE included), Qwen3.5 (MoE included), Qwen2.5-Omni or Qwen3-Omni, wrapped (PEFT, DDP) or not. Of a
            pipeline, pass its `.model`.
        impl: `"triton"` is the fast tower, `"reference"` the plain torch tower; `"auto"` takes the fast tower where it
            can run. An explicit choice never falls back.
        free_original: free those weights of the model that the fast tower holds packed copies of. State dicts still
            have them; parameters are empty until `remove()`, which unpacks them, bitwise as they were. Until the
            weights are packed, and while they are unpacked, memory holds both.

    Returns:
        A handle whose `remove()` restores the model's own tower; also a context manager. With `free_original` it raises
        ValueError, after restoring, if weights were written meanwhile: the freed ones are then of another state.

    Raises:
        TypeError: `model` is not a module, or does not contain exactly one such tower.
        ValueError: the tower is already replaced, or cannot be: transformers is older than 5.3, quantised or adapted
            layers, weights split over devices or offloaded, hooks inside the tower, mixed dtypes; or an explicit `impl`
            cannot run here. The model is unchanged.

    The replaced tower raises ValueError if gradients are asked of the fast tower, if `output_attentions` is set, if one
    of `PRECOMPUTED` is passed, if the model was changed since, or for pixel values that do not fit the grids.
    """
    original, config = find_tower(model)
    if is_replaced(original):
        raise ValueError("model: expected its own vision tower, got a replaced one; call remove() first")
    weights = tower_weights(original, config)
    tower = _build_tower(impl, config, weights)
    output_class = _output_class(original, config)
    shared = {_storage(parameter) for parameter in tower.parameters()} & {_storage(each) for each in weights.values()}
    copied = {name: weight for name, weight in weights.items() if _storage(weight) not in shared}
    extra_bytes = sum(each.nbytes for each in tower.parameters() if _storage(each) not in shared)
    restore = None
    if free_original:
        extra_bytes -= sum(weight.nbytes for weight in copied.values())
        restore = _free(original, tower, copied)
    forward = original.forward = _Forward(original, tower, output_class)

    def undo() -> None:
        if vars(original).get("forward") is not forward:
            raise ValueError("model: the vision tower's forward was replaced after use_tower; undo that first")
        if restore is not None:
            restore()
        del original.forward

    return TowerHandle(undo, tower, extra_bytes, forward.weights_written if free_original else None)


def is_replaced(tower: nn.Module) -> bool:
    """Return whether `use_tower` is in effect on a transformers tower."""
    return isinstance(vars(tower).get("forward"), _Forward)


def _build_tower(impl: Impl, config: VisionConfig, weights: dict[str, nn.Parameter]) -> Tower:
    """Build a tower of these weights: the parameters themselves in the reference tower."""
    with torch.device("meta"):
        tower = tower_class(impl, config, next(iter(weights.values())).device)(config)
    if isinstance(tower, FastTower):
        with torch.inference_mode(False), torch.no_grad():  # packed weights outlive the caller's modes
            tower.load_state_dict({name: weight.detach() for name, weight in weights.items()}, assign=True)
    else:
        for name, weight in weights.items():
            layer, _, kind = name.rpartition(".")
            setattr(tower.get_submodule(layer), kind, weight)
    return tower.eval()


def _output_class(original: nn.Module, config: VisionConfig) -> type[Any]:
    """Return the class of the original's outputs: a mutable one, since the model splits the tokens in place."""
    name = "BaseModelOutputWithDeepstackFeatures" if config.traits.deepstack else "BaseModelOutputWithPooling"
    return getattr(sys.modules[type(original).__module__], name)


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def _free(original: nn.Module, tower: Tower, copied: dict[str, nn.Parameter]) -> Callable[[], None]:
    """Empty parameters that `tower` has packed copies of; return what unpacks them into the parameters again."""

    def unpacked() -> Iterator[tuple[str, Tensor]]:
        state_dict = tower.state_dict()
        for name in copied:
            yield name, state_dict.pop(name).clone()  # unpacked Q, K and V are views of one tensor

    def fill_state_dict(_: nn.Module, state_dict: dict[str, Any], prefix: str, __: object) -> None:
        for name, tensor in unpacked():
            state_dict[prefix + official_name(name, tower.config.family)] = tensor

    hook = original.register_state_dict_post_hook(fill_state_dict)
    for weight in copied.values():
        weight.data = weight.data.new_empty(0)

    def restore() -> None:
        hook.remove()
        for name, tensor in unpacked():
            copied[name].data = tensor.to(copied[name].device, copied[name].dtype)  # where the model is now

    return restore


class _Forward:
    """The `forward` of a transformers tower while another tower computes in its place.

    Args:
        original: the transformers tower.
        tower: the tower that computes, with the original's weights.
        output_class: the class of the original's outputs.
    """

    def __init__(self, original: nn.Module, tower: Tower, output_class: type[Any]) -> None:
        self._original, self._tower, self._output_class = original, tower, output_class
        self._weight = next(tower.parameters())  # the tower's device and dtype: the search for it delays the GPU
        self._lock = threading.Lock()  # hidden states are recorded by hooks on the tower
        self._weights = WeightGuard(original)
        self._counted = [weight for weight in self._weights.parameters if not weight.is_inference()]
        self._versions = self._read_versions()
        self._hooks = [hooks for module in list(original.modules())[1:] for hooks in hook_dicts(module)]

    def __reduce_ex__(self, _: object) -> NoReturn:
        raise TypeError("a model cannot be copied or pickled while use_tower is in effect; call remove() first")

    def __call__(self, hidden_states: Tensor, grid_thw: Tensor, **kwargs: Any) -> Any:
        """Compute the tower's output, with the arguments and results of the original's `forward`."""
        return _run_untraced()(self, hidden_states, grid_thw, kwargs)

    def _run(self, hidden_states: Tensor, grid_thw: Tensor, kwargs: dict[str, Any]) -> Any:
        config = self._original.config
        if given := [name for name in PRECOMPUTED if kwargs.get(name) is not None]:
            raise ValueError(f"{given[0]}: expected none, which qwenvit's tower computes of grid_thw itself")
        if kwargs.get("output_attentions", getattr(config, "output_attentions", False)):
            raise ValueError(
                "output_attentions: qwenvit's vision tower keeps no attention weights; call remove() first"
            )
        output_hidden_states = kwargs.get("output_hidden_states", getattr(config, "output_hidden_states", False))
        return_dict = kwargs.get("return_dict", getattr(config, "return_dict", True))
        self._refuse_gradients(hidden_states)
        self._refuse_autocast()
        with self._lock:
            output, states = self._compute(hidden_states, grid_thw, bool(output_hidden_states))
        self._refuse_changes()  # while the GPU works
        fields: dict[str, Any] = {"last_hidden_state": output.last_hidden_state, "pooler_output": output.pooler_output}
        if self._tower.config.traits.deepstack:
            fields["deepstack_features"] = output.deepstack_features
        result = self._output_class(**fields)
        if output_hidden_states:
            result["hidden_states"] = _select(states, output_hidden_states)  # the last field, as in transformers
        return result.to_tuple() if return_dict is False else result

    def _compute(
        self, pixel_values: Tensor, grid_thw: Tensor, with_states: bool
    ) -> tuple[TowerOutput, tuple[Tensor, ...]]:
        """Run the tower; return its output, and its hidden states if they are asked for."""
        tower, device = self._tower, self._weight.device
        if pixel_values.device != device:
            raise ValueError(f"hidden_states: expected pixel values on the tower's {device}, got {pixel_values.device}")
        pixel_values = pixel_values.flatten(0, -2)
        grid = check_grid(grid_thw, tower.config.spatial_merge_size)
        check_pixel_values(pixel_values, grid, tower.config)
        graphs = None if with_states else graphs_of(tower)
        if graphs is not None:
            return graphs(pixel_values, grid), ()
        plan = GridPlan.build(grid, tower.config, device)
        with torch.autocast(device.type, enabled=False) if isinstance(tower, FastTower) else nullcontext():
            if not with_states:
                return tower(pixel_values, plan), ()
            with _recorded(tower.blocks) as states:
                output = tower(pixel_values, plan)
        return output, (*states[:-1], output.last_hidden_state)

    def _refuse_gradients(self, pixel_values: Tensor) -> None:
        if not isinstance(self._tower, FastTower) or not torch.is_grad_enabled():
            return
        asking = "pixel_values" if pixel_values.requires_grad else "parameters"
        if pixel_values.requires_grad or any(weight.requires_grad for weight in self._weights.parameters):
            raise ValueError(
                f"{asking} of the vision tower: expected none that requires gradients, which the fast tower does not "
                "give; freeze the tower with requires_grad_(False), call under torch.no_grad(), or "
                "use_tower(model, impl='reference')"
            )

    def _refuse_autocast(self) -> None:
        in_fp32 = isinstance(self._tower, FastTower) and self._weight.dtype == torch.float32
        if in_fp32 and torch.is_autocast_enabled(self._weight.device.type):
            raise ValueError(
                "autocast: expected none around a fast tower in float32, which computes in the dtype of its weights; "
                "convert the tower to bfloat16 before use_tower, or use_tower(model, impl='reference')"
            )

    def weights_written(self) -> bool:
        """Return whether parameters were written to since the tower was replaced."""
        return self._read_versions() != self._versions

    def _refuse_changes(self) -> None:
        """Raise ValueError if the model was changed since its tower was replaced."""
        if any(self._hooks) and (hooks := foreign_hooks(self._hooks)):
            raise ValueError(
                f"model: expected no hooks inside the vision tower, got {len(hooks)} added after use_tower"
            )
        written = isinstance(self._tower, FastTower) and self.weights_written()
        if written or not self._weights.weights_unmoved():
            raise ValueError(
                "model: its vision tower was moved, converted, loaded or adapted after use_tower; call remove() first, "
                "then use_tower again"
            )

    def _read_versions(self) -> list[int]:
        """Return how often each parameter was written to; tensors made in inference mode do not count it."""
        return list(map(attrgetter("_version"), self._counted))


@cache
def _run_untraced() -> Callable[..., Any]:
    """Return `_Forward._run` as torch.compile of the model leaves it out; a decorator would import Dynamo at once."""
    return torch.compiler.disable(_Forward._run)


@contextmanager
def _recorded(blocks: nn.ModuleList) -> Iterator[list[Tensor]]:
    """Record the first block's input and every block's output. They are copied: the fast tower works in place."""
    states: list[Tensor] = []
    hooks = [blocks[0].register_forward_pre_hook(lambda _, inputs: states.append(inputs[0].clone()))]
    hooks += [block.register_forward_hook(lambda _, __, output: states.append(output.clone())) for block in blocks]
    try:
        yield states
    finally:
        for hook in hooks:
            hook.remove()


def _select(states: Sequence[Tensor], chosen: bool | int | Sequence[int]) -> tuple[Tensor | None, ...]:
    """Return all hidden states, or None in place of those that are not chosen by index."""
    if isinstance(chosen, bool):
        return tuple(states)
    indices = [chosen] if isinstance(chosen, int) else chosen
    kept = {index % len(states) for index in indices if -len(states) <= index < len(states)}
    return tuple(state if index in kept else None for index, state in enumerate(states))
