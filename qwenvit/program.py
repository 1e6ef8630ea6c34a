"""The reference tower as a program of its own: torch.export and ONNX, for batches of fixed grids."""

import copy
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import fields, is_dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram

from qwenvit.encoder import Encoder
from qwenvit.features.maps import Cells, MapRequest
from qwenvit.plan.grid_plan import GridPlan
from qwenvit.plan.reading_order import reading_order
from qwenvit.towers.hidden_states import ordered_hidden_states
from qwenvit.towers.reference import ReferenceTower

SUFFIXES = (".pt2", ".onnx")


def export(
    encoder: Encoder | str | os.PathLike[str],
    grid_thw: Tensor | Sequence[Sequence[int]],
    path: str | os.PathLike[str] | None = None,
    *,
    layers: Iterable[int] | None = None,
    what: Cells = "patches",
    norm: bool = False,
) -> ExportedProgram:
    """Export the reference tower for the grids of one batch, and write it to a file.

    Positions, windows and segments depend on the grids alone: they become constants of the program, which takes
    batches of these grids and no others. It needs neither qwenvit nor the checkpoint.

    Args:
        encoder: an encoder with the reference tower (`impl="reference"`), of which dtype and device become the
            program's; or a model's name or folder, which is loaded in float32 on the CPU. `program.module().to(device)`
            moves it.
        grid_thw: `[items, 3]` integers: frame groups, rows and columns of patches of each item.
        path: where to write the program: `.pt2` for `torch.export.load`, or `.onnx`, which needs
            `pip install 'qwenvit[onnx]'`. An existing file is replaced. Weights above 2 GB of an ONNX file are in a
            second file beside it.
        layers: return the maps of these layers instead of the tower's output, as `Encoder.features` numbers them. The
            program ends at the deepest of them and merges nothing.
        what: cells of the maps, `"patches"` or `"tokens"`, as in `Encoder.features`.
        norm: apply the final merger's norm to each patch of the maps first, as in `Encoder.features`.

    Returns:
        The program, whose `module()` takes `pixel_values` `[patches, C·T·P·P]` float32 and returns a dict of tensors.
        The outputs of an ONNX file have the same names and order.

        - without `layers`: `last_hidden_state`, `pooler_output` and `deepstack_features_0`, `…_1`: the fields of
          `TowerOutput`;
        - with them: `layer_8` for layer 8, once each and in ascending order, `[cells, hidden_size]` in reading order,
          all items one after another: `view(rows, columns, -1)` is the map of one image.

    Raises:
        ValueError: the fast tower; grids, layers or a suffix that cannot be; `what` or `norm` without `layers`;
            bfloat16 in ONNX, which onnxruntime does not run on a CPU.
        TypeError: layers that are no integers.
        ImportError: an `.onnx` file, and a package that it needs is not installed.
        OSError: no such folder, or a model or a file that cannot be read or written.
    """
    if layers is None and (what != "patches" or norm):
        raise ValueError(f"layers: expected some, of whose maps what={what!r} and norm={norm!r} are, got None")
    file = None if path is None else _check_path(path)
    if not isinstance(encoder, Encoder):
        encoder = Encoder.from_pretrained(encoder, impl="reference", device="cpu", dtype="float32")
    tower = encoder.tower
    if not isinstance(tower, ReferenceTower):
        raise ValueError("encoder: expected the reference tower, got the fast tower; load it with impl='reference'")
    if file is not None and file.suffix == ".onnx" and encoder.dtype == torch.bfloat16:
        raise ValueError("encoder: expected float32 or float16 for ONNX, got bfloat16")
    request = None if layers is None else MapRequest.check(layers, what, norm, encoder.config)
    plan = GridPlan.build(grid_thw, encoder.config, encoder.device)
    module = TowerProgram(tower, plan, request)
    pixel_values = torch.zeros(plan.num_patches, encoder.config.patch_dim, device=encoder.device)
    training = [part for part in tower.modules() if part.training]
    try:
        with torch.no_grad(), torch.autocast(encoder.device.type, enabled=False):  # else it would be in the program
            program = torch.export.export(module.eval(), (pixel_values,), strict=False)
        _erase_device_checks(program)
    finally:
        for part in training:  # eval() reaches the caller's modules, which may be in the middle of a training
            part.training = True
    if file is not None and file.suffix == ".onnx":
        names: Any = {"input_names": ["pixel_values"], "output_names": module.output_names}
        onnx = torch.onnx.export(program, (pixel_values,), dynamo=True, verbose=False, **names)
        cast(torch.onnx.ONNXProgram, onnx).save(file)
    elif file is not None:
        torch.export.save(program, file)
    return program


def _erase_device_checks(program: torch.export.ExportedProgram) -> None:
    """Erase the assertions of dtype, device and layout that torch.export adds before conversions.

    Nothing else in the program names the device that the tower was exported on: `program.module()` can be moved.
    """
    for module in program.graph_module.modules():
        if isinstance(module, torch.fx.GraphModule):
            for node in module.graph.nodes:
                if node.target is torch.ops.aten._assert_tensor_metadata.default:
                    module.graph.erase_node(node)
            module.recompile()


class TowerProgram(nn.Module):
    """The reference tower for fixed grids, whose plan is in buffers.

    A module moves its buffers to another device with its weights. Of a plain attribute, torch.export would make
    constants, which stay where they are.

    Args:
        tower: the tower.
        plan: the plan of the grids.
        request: the maps to return; None for the tower's output.
    """

    def __init__(self, tower: ReferenceTower, plan: GridPlan, request: MapRequest | None = None) -> None:
        super().__init__()
        self.tower = tower if request is None else _without_unused(tower, request)
        self.request = request
        if request is None:
            levels = range(len(tower.config.deepstack_visual_indexes))
            self.output_names = ["last_hidden_state", "pooler_output", *(f"deepstack_features_{i}" for i in levels)]
        else:
            self.output_names = [f"layer_{layer}" for layer in request.computed]
            order = reading_order(plan.grid_thw, tower.config, request.by_token)
            self.register_buffer("order", order.to(plan.cos.device), persistent=False)

        def keep(tensor: Tensor) -> str:
            name = f"plan_{len(self._buffers)}"
            self.register_buffer(name, tensor, persistent=False)
            return name

        self.plan = _replace_leaves(plan, Tensor, keep)

    def forward(self, pixel_values: Tensor) -> dict[str, Tensor]:
        """Run the tower on `pixel_values` `[patches, C·T·P·P]`; see `export` for the tensors returned."""
        plan = _replace_leaves(self.plan, str, self.get_buffer)
        if self.request is None:
            output = self.tower(pixel_values, plan)
            tensors = [output.last_hidden_state, output.pooler_output, *output.deepstack_features]
        else:
            order = self.get_buffer("order")
            states = ordered_hidden_states(self.tower, pixel_values, plan, self.request.computed, order)
            tensors = self.request.cells(states, self.tower)
        return dict(zip(self.output_names, tensors, strict=True))


def _without_unused(tower: ReferenceTower, request: MapRequest) -> ReferenceTower:
    """Return a tower that shares the weights which maps need and has no others: a program has every weight it is given.

    A program would otherwise have the mergers too, more than a quarter of Qwen3-VL-8B's weights.
    """
    short = copy.copy(tower)
    kept: dict[str, nn.Module | None] = {
        name: module for name, module in tower.named_children() if name in ("patch_embed", "pos_embed")
    }
    kept["blocks"] = tower.blocks[: request.computed[-1]]
    if request.norm:
        kept["merger"] = nn.ModuleDict({"norm": tower.merger.norm})
    short._modules = kept
    return short


def _replace_leaves(value: Any, kind: type, new: Callable[[Any], Any]) -> Any:
    """Return a copy of nested dataclasses and tuples in which every leaf of type `kind` is replaced by `new` of it."""
    if isinstance(value, kind):
        return new(value)
    if isinstance(value, tuple):
        return tuple(_replace_leaves(part, kind, new) for part in value)
    if is_dataclass(value) and not isinstance(value, type):
        parts = {field.name: getattr(value, field.name) for field in fields(value)}
        return replace(value, **{name: _replace_leaves(part, kind, new) for name, part in parts.items()})
    return value


def _check_path(path: str | os.PathLike[str]) -> Path:
    """Check what exporting needs, before it takes minutes."""
    file = Path(path).expanduser()
    if file.suffix not in SUFFIXES:
        raise ValueError(f"path: expected a file that ends in {' or '.join(SUFFIXES)}, got {str(path)!r}")
    if not file.parent.is_dir():
        raise FileNotFoundError(f"path: expected a file in a folder that exists, got {str(path)!r}")
    if file.suffix == ".onnx" and not (find_spec("onnx") and find_spec("onnxscript")):
        raise ImportError("path: an .onnx file needs onnx and onnxscript: pip install 'qwenvit[onnx]'")
    return file
