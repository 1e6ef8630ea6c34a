"""FLOPs against torch's counter, and the feature map and its picture against their definitions."""

import pytest
import torch
from PIL import Image
from torch.nn.attention import SDPBackend, sdpa_kernel  # FlopCounterMode counts only MATH on a CPU
from torch.utils.flop_counter import FlopCounterMode

from common.hf_towers import build_tower
from qwenvit.cli.feature_map import patch_features, pca_picture
from qwenvit.encoder import Encoder
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


@pytest.mark.parametrize("family", ["qwen2_5_vl", "qwen3_vl"])
def test_patch_features_are_in_reading_order(family):
    """With zero weights in its blocks the tower returns each patch's brightness, which tells where the patch went."""
    config = SMALL[family]
    tower = ours_from(build_tower(config), config)
    encoder = Encoder(tower)
    side = config.patch_size
    rows, columns = (20, 12)
    image = torch.zeros(rows * side, columns * side, dtype=torch.uint8)
    for row in range(rows):
        for column in range(columns):
            image[row * side : (row + 1) * side, column * side : (column + 1) * side] = columns * row + column
    with torch.no_grad():
        for parameter in tower.parameters():
            parameter.zero_()
        tower.patch_embed.proj.weight[0].fill_(1)
    feature_map = patch_features(encoder, image[..., None].repeat(1, 1, 3).numpy(), min_pixels=side**2 * 4)
    assert feature_map.shape == (rows, columns, config.hidden_size)
    assert torch.equal(feature_map[..., 0].flatten().argsort(), torch.arange(rows * columns))


def test_pca_picture_shows_the_direction_of_most_variance():
    features = torch.randn(6, 5, 16, dtype=torch.float64) * 0.01
    features[:3, :, 7] += 10  # the first component: the halves differ in one channel
    picture = pca_picture(features)
    assert picture.size == (5, 6)
    red = torch.tensor([[picture.getpixel((x, y))[0] for x in range(5)] for y in range(6)])
    upper, lower = red[:3].float(), red[3:].float()
    assert (upper.mean() - lower.mean()).abs() > 200
    assert pca_picture(features, (50, 60)).size == (50, 60)
    assert pca_picture(features).tobytes() == pca_picture(features).tobytes()
    assert isinstance(pca_picture(torch.ones(2, 2, 4)), Image.Image)


@pytest.mark.parametrize("bad", [torch.rand(4, 4), torch.rand(4, 4, 2), torch.ones(4, 4, 4, dtype=torch.int64)])
def test_pca_picture_refuses(bad):
    with pytest.raises(ValueError, match=r"feature_map: expected floats \[rows, columns, channels >= 3\]"):
        pca_picture(bad)
