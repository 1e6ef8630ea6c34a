"""Run vLLM's own vision towers without an engine: a program for the Python that `make test-vllm` makes.

    python vllm_towers.py WAYS ANSWERS PORT RANK RANKS

Run by each of RANKS processes, over which vLLM splits a tower's weights; rank 0 writes ANSWERS, a JSON object of what
`attend_in_eager_blocks` (WAYS is "eager") or `attend_in_compiled_blocks` ("compiled") returns, by family. Differences
are those of tokens, as relative L2.
"""

import json
import os
import sys
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn
from vllm.config import CompilationConfig, CompilationMode, VllmConfig, set_current_vllm_config
from vllm.distributed import init_distributed_environment, initialize_model_parallel
from vllm.model_executor.models.qwen2_5_vl import Qwen2_5_VisionTransformer
from vllm.model_executor.models.qwen2_vl import Qwen2VisionTransformer
from vllm.model_executor.models.qwen3_omni_moe_thinker import Qwen3Omni_VisionTransformer
from vllm.model_executor.models.qwen3_vl import Qwen3_VisionTransformer

from qwenvit import ops
from qwenvit.config.vision_config import VisionConfig
from qwenvit.integrations.vllm import attention
from qwenvit.towers.reference import ReferenceTower
from qwenvit.weights.names import official_name

TOWERS = {
    "qwen2_vl": Qwen2VisionTransformer,
    "qwen2_5_vl": Qwen2_5_VisionTransformer,
    "qwen3_vl": Qwen3_VisionTransformer,
    "qwen3_omni": Qwen3Omni_VisionTransformer,
}
GRIDS = [[1, 18, 22], [3, 4, 6], [1, 2, 2]]


def tiny(family: str, head_dim: int = 72) -> VisionConfig:
    shape = {"depth": 4, "hidden_size": 4 * head_dim, "intermediate_size": 96, "num_heads": 4, "out_hidden_size": 64}
    more: dict[str, Any] = {"hidden_act": "quick_gelu", "patch_size": 14}
    if family == "qwen2_vl":
        shape["intermediate_size"] = 4 * shape["hidden_size"]
    elif family == "qwen2_5_vl":
        more = {"hidden_act": "silu", "patch_size": 14, "window_size": 112, "fullatt_block_indexes": (1, 3)}
    else:
        more = {"hidden_act": "gelu_pytorch_tanh", "patch_size": 16, "num_position_embeddings": 64}
        more["deepstack_visual_indexes"] = (0, 2)
    return VisionConfig(family, **shape, **more)


def build(config: VisionConfig) -> nn.Module:
    """Return vLLM's tower with seeded weights, in float32."""
    hf = {"mlp_ratio": 4, "image_size": config.position_grid * config.patch_size, "apply_vit_abs_pos_embed": True}
    visual: nn.Module = TOWERS[config.family](SimpleNamespace(**hf | config.to_hf()), prefix="visual")
    generator = torch.Generator().manual_seed(0)
    weights = {}
    for name, tensor in ReferenceTower(config).state_dict().items():
        drawn = torch.randn(tensor.shape, generator=generator)
        scaled = 1 + drawn / 8 if tensor.ndim == 1 else 2 * drawn / tensor.shape[-1] ** 0.5
        weights[official_name(name, config.family)] = scaled
    loaded = visual.load_weights(weights.items())  # type: ignore[operator]
    assert loaded == {name for name, _ in visual.named_parameters()}
    for module in visual.modules():
        if hasattr(module, "quant_method"):
            module.quant_method.process_weights_after_loading(module)  # type: ignore[union-attr, operator]
    return visual.eval()


def run(visual: nn.Module, config: VisionConfig) -> torch.Tensor:
    grids = torch.tensor(GRIDS)
    pixels = torch.randn(int(grids.prod(1).sum()), config.patch_dim, generator=torch.Generator().manual_seed(1))
    grid_thw = grids if config.family == "qwen3_omni" else GRIDS
    out: torch.Tensor = visual(pixels, grid_thw)
    return out


def difference(out: torch.Tensor, own: torch.Tensor) -> float:
    return float((out - own).norm() / own.norm())


class Calls(Counter[int]):
    """Counts the calls of qwenvit's attention by `max_seqlen`, which chooses the kernel."""

    def __init__(self) -> None:
        super().__init__()
        self.attend, ops.rope_attention = ops.rope_attention, self.count

    def count(self, *args: Any, **options: Any) -> torch.Tensor:
        self[args[6]] += 1
        return self.attend(*args, **options)


def attend_in_eager_blocks(config: VisionConfig, calls: Calls) -> dict[str, Any]:
    """Return the differences of qwenvit's attention, and of one whose scale is 2 % off in one block."""
    visual = build(config)
    own = run(visual, config)
    attention.use_attention(visual, config)
    calls.clear()
    found = {"attention": difference(run(visual, config), own), "calls": dict(calls)}
    visual.blocks[2].attn.attn.scale *= 1.02  # type: ignore[index, union-attr]
    return found | {"wrong": difference(run(visual, config), own)}


def attend_in_compiled_blocks(config: VisionConfig, calls: Calls) -> dict[str, Any]:
    """Return the differences of compiled blocks from eager ones.

    On a CPU vLLM compiles each block again: it cannot load what it has saved, its own either.
    """
    found, own = {}, torch.empty(0)
    for way in ("eager", "own", "attention"):
        compilation = CompilationConfig(mode=CompilationMode.VLLM_COMPILE, compile_mm_encoder=way != "eager")
        key = {"qwenvit_attention": "1"} if way == "attention" else {}
        with set_current_vllm_config(VllmConfig(compilation_config=compilation, additional_config=key)):
            visual = build(config)
            if way == "attention":
                attention.use_attention(visual, config)
            calls.clear()
            out = run(visual, config)
        own = out if way == "eager" else own
        compiled = sum(getattr(block, "aot_compiled_fn", None) is not None for block in visual.blocks)
        found[way] = {"difference": difference(out, own), "calls": dict(calls), "compiled": compiled}
    return found


def main(ways: str, answers: str, port: str, rank: str, ranks: str) -> None:
    with set_current_vllm_config(VllmConfig()), torch.inference_mode():
        init_distributed_environment(int(ranks), int(rank), f"tcp://127.0.0.1:{port}", int(rank), "gloo")
        initialize_model_parallel(int(ranks))
        attend = attend_in_compiled_blocks if ways == "compiled" else attend_in_eager_blocks
        families, calls = ["qwen2_5_vl"] if ways == "compiled" else TOWERS, Calls()
        found = {family: attend(tiny(family), calls) for family in families}
    if rank == "0":
        Path(answers).write_text(json.dumps(found))
    os._exit(0)


if __name__ == "__main__":
    main(*sys.argv[1:])
