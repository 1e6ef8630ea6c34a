"""FLOPs and parameters against torch's own counts."""

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel  # FlopCounterMode counts only MATH on a CPU
from torch.utils.flop_counter import FlopCounterMode

from common.hf_towers import build_tower
from qwenvit.plan.grid_plan import GridPlan
from qwenvit.towers.cost import flops, parameters
from support.towers import MIXED_GRIDS, SMALL, ours_from, random_pixels


@pytest.mark.parametrize("family", SMALL)
def test_flops_equal_torchs_count(family):
    config = SMALL[family]
    tower = ours_from(build_tower(config), config)
    assert parameters(config) == sum(p.numel() for p in tower.parameters())
    plan = GridPlan.build(MIXED_GRIDS, config)
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        tower(random_pixels(plan.num_patches, config), plan)
    assert flops(config, plan) == counter.get_total_flops()
