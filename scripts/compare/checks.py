"""Check qwenvit's run against transformers': bit for bit, in fp32, and in 16 bits against the fp32 truth.

The truth is transformers' tower in fp32 with the same weights. `qwenvit.parity` has the bounds.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn

import qwenvit
from compare.report import NamedPair, show_differences
from compare.runs import NamedOutputs, TowerRun, run_qwenvit, run_transformers
from qwenvit import parity
from qwenvit.parity import Check, Difference


class TowerPair(NamedTuple):
    """qwenvit's encoder and transformers' tower with the same weights."""

    ours: qwenvit.Encoder
    theirs: nn.Module


def compare_on_input(
    pixel_values: Tensor, grid: Tensor, item_names: list[str], towers: TowerPair, fp32_towers: TowerPair | None
) -> list[Check]:
    """Run both towers on one input, print the differences, and return the checks.

    Args:
        pixel_values: `[patches, C·T·P·P]`, on the towers' device.
        grid: `[items, 3]` int64 on the CPU.
        item_names: a name for each item.
        towers: the towers to compare.
        fp32_towers: the same towers in fp32. None asks for equality to the last bit instead.
    """
    ours = run_qwenvit(towers.ours, pixel_values, grid)
    theirs = run_transformers(towers.theirs, pixel_values, grid)
    blocks = [(f"block {i}", a.out, b.out) for i, (a, b) in enumerate(zip(ours.calls, theirs.calls, strict=True))]
    outputs = pair_outputs(ours.outputs, theirs.outputs)
    show_differences(blocks, outputs, grid, towers.ours.config.merge_unit, item_names)
    if fp32_towers is None:
        return [parity.exact(*pair) for pair in blocks + outputs]
    our_fp32 = run_qwenvit(fp32_towers.ours, pixel_values, grid)
    truth = run_transformers(fp32_towers.theirs, pixel_values, grid)
    checks = fp32_checks(our_fp32, truth)
    return checks if towers.ours.dtype == torch.float32 else checks + low_precision_checks(ours, theirs, truth)


def pair_outputs(ours: NamedOutputs, theirs: NamedOutputs) -> list[NamedPair]:
    return [(name, a, b) for (name, a), (_, b) in zip(ours, theirs, strict=True)]


def fp32_checks(ours: TowerRun, truth: TowerRun) -> list[Check]:
    """Check the outputs of qwenvit's fp32 run against the truth."""
    return [parity.close(*pair) for pair in pair_outputs(ours.outputs, truth.outputs)]


def low_precision_checks(ours: TowerRun, theirs: TowerRun, truth: TowerRun) -> list[Check]:
    """Check that qwenvit's 16-bit errors are no larger than 1.05 times transformers', block by block and at the end."""
    checks = parity.blocks_no_worse((ours.blocks, ours.calls), (theirs.blocks, theirs.calls), truth.calls)
    return checks + output_checks(ours.outputs, theirs.outputs, truth.outputs)


def output_checks(ours: NamedOutputs, theirs: NamedOutputs, truths: NamedOutputs) -> list[Check]:
    """Check the 16-bit outputs whose error in transformers' run is small enough to mean anything."""
    checks = []
    for (name, our), (_, their), (_, truth) in zip(ours, theirs, truths, strict=True):
        error = Difference.of(their, truth).relative_l2
        if error <= parity.MEANINGFUL_ERROR:
            checks.append(parity.no_worse(name, our, their, truth))
        else:
            print(f"{name}: transformers' own error of {error:.1%} is above {parity.MEANINGFUL_ERROR:.0%}: not judged")
    return checks
