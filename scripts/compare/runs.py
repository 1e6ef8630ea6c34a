"""One forward pass of each tower, block by block, and the checks of its outputs."""

import torch
from torch import Tensor, nn

import qwenvit
from common.hf_towers import forward
from qwenvit import parity
from qwenvit.outputs import TowerOutput
from qwenvit.parity import BlockCall, Check, Difference, record
from qwenvit.plan.grid_plan import GridPlan

Outputs = list[tuple[str, Tensor]]


class DisagreementError(Exception):
    """Of our two ways to run one tower."""


def run_theirs(tower: nn.Module, pixel_values: Tensor, grid: Tensor) -> tuple[Outputs, list[BlockCall]]:
    outputs, calls = record(tower.blocks, lambda: forward(tower, pixel_values, grid))
    return named(TowerOutput(*outputs)), calls


@torch.no_grad()
def run_ours(encoder: qwenvit.Encoder, pixel_values: Tensor, grid: Tensor) -> tuple[Outputs, list[BlockCall]]:
    plan = GridPlan.build(grid, encoder.config, encoder.device)
    output, calls = record(encoder.tower.blocks, lambda: encoder.tower(pixel_values, plan))
    whole = encoder(pixel_values, grid)  # with CUDA graphs where the fast tower uses them
    for (name, ours), (_, theirs) in zip(named(whole), named(output), strict=True):
        if not Difference.of(ours, theirs).relative_l2 <= parity.MEANINGFUL_ERROR:  # NaN is no agreement
            raise DisagreementError(f"the encoder and its tower differ in {name}")
    return named(whole), calls


def named(output: TowerOutput) -> Outputs:
    return [("tokens", output.pooler_output), *((f"DeepStack {i}", x) for i, x in enumerate(output.deepstack_features))]


def check_ends(ours: Outputs, theirs: Outputs, truths: Outputs) -> list[Check]:
    checks = []
    for (name, our), (_, their), (_, truth) in zip(ours, theirs, truths, strict=True):
        error = Difference.of(their, truth).relative_l2
        if error <= parity.MEANINGFUL_ERROR:
            checks.append(parity.no_worse(name, our, their, truth))
        else:
            print(f"{name}: transformers' own error of {error:.1%} is above {parity.MEANINGFUL_ERROR:.0%}: not judged")
    return checks
