"""Run one tower on one input, and record what each block received and returned."""

from typing import NamedTuple

import torch
from torch import Tensor, nn

import qwenvit
from common.hf_towers import forward
from qwenvit import parity
from qwenvit.outputs import TowerOutput
from qwenvit.parity import BlockCall, Difference, record
from qwenvit.plan.grid_plan import GridPlan

NamedOutputs = list[tuple[str, Tensor]]


class TowerRun(NamedTuple):
    """A tower's blocks, its named outputs, and the call of each block."""

    blocks: nn.ModuleList
    outputs: NamedOutputs
    calls: list[BlockCall]


class DisagreementError(Exception):
    """The encoder and its own tower gave different outputs for the same input."""


def run_transformers(tower: nn.Module, pixel_values: Tensor, grid: Tensor) -> TowerRun:
    """Run transformers' tower."""
    outputs, calls = record(tower.blocks, lambda: forward(tower, pixel_values, grid))
    return TowerRun(tower.blocks, name_outputs(TowerOutput(*outputs)), calls)


@torch.no_grad()
def run_qwenvit(encoder: qwenvit.Encoder, pixel_values: Tensor, grid: Tensor) -> TowerRun:
    """Run the encoder for its outputs, and its tower for the calls of the blocks.

    The encoder may replay CUDA graphs, in which blocks cannot be observed.

    Raises:
        DisagreementError: the outputs of the two differ by more than rounding can explain.
    """
    plan = GridPlan.build(grid, encoder.config, encoder.device)
    tower_output, calls = record(encoder.tower.blocks, lambda: encoder.tower(pixel_values, plan))
    outputs = name_outputs(encoder(pixel_values, grid))
    for (name, ours), (_, theirs) in zip(outputs, name_outputs(tower_output), strict=True):
        if not Difference.of(ours, theirs).relative_l2 <= parity.MEANINGFUL_ERROR:  # NaN is a disagreement
            raise DisagreementError(f"the encoder and its tower differ in {name}")
    return TowerRun(encoder.tower.blocks, outputs, calls)


def name_outputs(output: TowerOutput) -> NamedOutputs:
    return [("tokens", output.pooler_output), *((f"DeepStack {i}", x) for i, x in enumerate(output.deepstack_features))]
