"""LoRA's arithmetic, as peft has it: what A and B add to a weight, and which shapes they must have.

Source: LoRA (arXiv:2106.09685) and rsLoRA (arXiv:2312.03732), merged as in peft's `get_delta_weight`.
"""

from collections.abc import Mapping

import torch
import torch.nn.functional as F

LINEAR = ("lora_A.weight", "lora_B.weight")
EMBEDDING = ("lora_embedding_A", "lora_embedding_B")
LORA_BIAS = "lora_B.bias"
PARTS = (*LINEAR, *EMBEDDING, LORA_BIAS, "weight", "bias")
"""Every part of an adapter's module; the last two replace the base's tensors."""

Shape = tuple[int, ...]


def shape_problems(
    found: Mapping[str, Shape], weight: Shape, bias: Shape | None, rank: int, has_lora_bias: bool
) -> list[str]:
    """Return what is wrong with the tensors of an adapter's module, one line each.

    `found` are their shapes by part, `weight` and `bias` those of the base's (None: it has no bias), `rank` and
    `has_lora_bias` what the config says.
    """
    is_embedding = any(part in found for part in EMBEDDING)
    parts = EMBEDDING if is_embedding else LINEAR
    expected: dict[str, Shape | None] = {"weight": weight, "bias": bias}
    if is_embedding and len(weight) == 2 and bias is None:  # all linear layers with 2 dimensions have a bias
        expected |= {parts[0]: (rank, weight[0]), parts[1]: (weight[1], rank)}
    elif not is_embedding and len(weight) > 1:
        expected |= {parts[0]: (rank, *weight[1:]), parts[1]: (weight[0], rank, *(1 for _ in weight[2:]))}
        expected[LORA_BIAS] = bias if has_lora_bias else None
    problems = []
    for part, shape in found.items():
        wanted = expected.get(part)
        if wanted is None:
            problems.append(f"{part}: expected none for this module and config, got one of shape {shape}")
        elif shape != wanted:
            problems.append(f"{part}: expected {wanted} (rank {rank} in the config), got {shape}")
    has_lora = any(part in found for part in (*parts, LORA_BIAS))
    needed = (*parts, LORA_BIAS) if has_lora_bias and not is_embedding else parts
    return problems + [f"{part} is missing" for part in needed if has_lora and part not in found]


def delta_of(
    parameter: str, stored: Mapping[str, torch.Tensor], scale: float, dtype: torch.dtype
) -> torch.Tensor | None:
    """Return what the adapter adds to a module's `"weight"` or `"bias"` of `dtype`; None if nothing.

    `stored` are the adapter's tensors by part, on the CPU. They are multiplied in fp32, or fp64 for a weight in fp64:
    peft holds adapters in fp32 whatever their file has. The sum with the weight rounds once, for embeddings twice.
    """
    precision = torch.float64 if dtype == torch.float64 else torch.float32
    if parameter == "bias":
        return stored[LORA_BIAS].to(precision) * scale if LORA_BIAS in stored else None
    for parts in (LINEAR, EMBEDDING):
        if parts[0] in stored:
            # Copied: a matrix product may depend on how its operands are aligned in memory, and in a file they are not.
            a, b = (stored[part].to(precision, copy=True) for part in parts)
            if parts == EMBEDDING:
                return ((b @ a).T * scale).to(dtype)
            if a.ndim == 2:
                return b @ a * scale
            return F.conv3d(a.transpose(0, 1), b).transpose(0, 1) * scale
    return None
