"""Count a tower's parameters, and the floating-point operations of an input, from the config."""

from qwenvit.config.vision_config import VisionConfig
from qwenvit.plan.grid_plan import GridPlan
from qwenvit.towers.shapes import weight_shapes


def parameters(config: VisionConfig) -> int:
    """Return the number of parameters of the tower."""
    return sum(shape.numel() for shape in weight_shapes(config).values())


def flops(config: VisionConfig, plan: GridPlan) -> int:
    """Return the floating-point operations of the matrix products of one forward pass, two per multiply-add."""
    width, patches = config.hidden_size, plan.num_patches
    tokens = patches // config.merge_unit
    mlp_matrices = 3 if config.traits.gated_mlp else 2
    block = patches * (4 * width * width + mlp_matrices * width * config.intermediate_size)
    merged_width = width * config.merge_unit
    merger = tokens * merged_width * (merged_width + config.out_hidden_size)
    products = patches * config.patch_dim * width + config.depth * block
    products += merger * (1 + len(config.deepstack_visual_indexes))
    for index in range(config.depth):
        segments = plan.frames if plan.windows is None or config.is_full_attention(index) else plan.windows
        lengths = segments.cu_seqlens.diff().double()
        products += int(2 * width * lengths.square().sum())  # scores, then weighted values
    return 2 * products
