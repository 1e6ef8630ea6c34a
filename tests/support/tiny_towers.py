"""Tiny towers of every family, built by transformers: an independent source of names and shapes."""

import json
import re
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers.models.qwen2_5_omni.modeling_qwen2_5_omni import Qwen2_5OmniVisionEncoder
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VisionTransformerPretrainedModel
from transformers.models.qwen2_vl.modeling_qwen2_vl import Qwen2VisionTransformerPretrainedModel
from transformers.models.qwen3_5.modeling_qwen3_5 import Qwen3_5VisionModel
from transformers.models.qwen3_omni_moe.modeling_qwen3_omni_moe import Qwen3OmniMoeVisionEncoder
from transformers.models.qwen3_vl.modeling_qwen3_vl import Qwen3VLVisionModel

Tensors = dict[str, torch.Tensor]

# Official prefix, class and config of each family.
_COMMON = {"depth": 2, "hidden_size": 16, "out_hidden_size": 24, "num_heads": 2, "intermediate_size": 20}
_QWEN3 = {**_COMMON, "num_position_embeddings": 16, "patch_size": 4}
_DEEPSTACK = {**_QWEN3, "deepstack_visual_indexes": [0, 1]}
FAMILIES = {
    "qwen2_vl": (
        "visual.",
        Qwen2VisionTransformerPretrainedModel,
        {"depth": 2, "embed_dim": 16, "hidden_size": 24, "num_heads": 2, "mlp_ratio": 2, "patch_size": 4},
    ),
    "qwen2_5_vl": ("visual.", Qwen2_5_VisionTransformerPretrainedModel, {**_COMMON, "patch_size": 4}),
    "qwen3_vl": ("model.visual.", Qwen3VLVisionModel, _DEEPSTACK),
    "qwen3_5": ("model.visual.", Qwen3_5VisionModel, _QWEN3),
    "qwen2_5_omni": ("thinker.visual.", Qwen2_5OmniVisionEncoder, {**_COMMON, "patch_size": 4}),
    "qwen3_omni": ("thinker.visual.", Qwen3OmniMoeVisionEncoder, _DEEPSTACK),
}
# Other tensors in composite checkpoints.
OTHER_TENSORS = (
    "model.layers.0.self_attn.q_proj.weight",
    "model.language_model.norm.weight",
    "lm_head.weight",
    "mtp.norm.weight",
    "thinker.audio_tower.conv1.weight",
    "thinker.model.norm.weight",
    "talker.model.norm.weight",
)
# Official to canonical names where they differ. Written independently of the tables under test, in another form.
_CANONICAL = (
    (r"^(deepstack_merger_list|merger_list)\.", "deepstack_mergers."),
    (r"merger(s\.\d+)?\.ln_q\.", r"merger\1.norm."),
    (r"(mergers?(?:\.\d+)?)\.mlp\.0\.", r"\1.fc1."),
    (r"(mergers?(?:\.\d+)?)\.mlp\.2\.", r"\1.fc2."),
    (r"\.linear_fc", ".fc"),
)


def canonical_name(official: str) -> str:
    for pattern, replacement in _CANONICAL:
        official = re.sub(pattern, replacement, official)
    return official


@dataclass
class Tower:
    """One family's tower: `state` has official names without prefix, `canonical` has canonical names."""

    family: str
    prefix: str
    state: dict[str, torch.Tensor]
    model: torch.nn.Module
    canonical: dict[str, torch.Tensor] = field(init=False)

    def __post_init__(self) -> None:
        self.canonical = {canonical_name(name): tensor for name, tensor in self.state.items()}

    @property
    def expected(self) -> dict[str, torch.Size]:
        return {name: tensor.shape for name, tensor in self.canonical.items()}

    def composite(self, prefix: str | None = None) -> dict[str, torch.Tensor]:
        """Return the whole model's tensors: the tower under `prefix`, and tensors of other parts."""
        prefix = self.prefix if prefix is None else prefix
        return {name: torch.full((3, 5), 7.0) for name in OTHER_TENSORS} | {
            prefix + name: tensor for name, tensor in self.state.items()
        }


def build(family: str, dtype: torch.dtype = torch.float32, **changes: object) -> Tower:
    prefix, cls, config = FAMILIES[family]
    torch.manual_seed(sorted(FAMILIES).index(family))
    model = cls._from_config(cls.config_class(**{**config, **changes})).to(dtype)
    # transformers initialises biases to 0 and norms to 1; equal tensors would hide a swap.
    state = {name: torch.randn(tensor.shape).to(dtype) for name, tensor in model.state_dict().items()}
    model.load_state_dict(state)
    return Tower(family, prefix, state, model)


def save_sharded(directory: Path, tensors: dict[str, torch.Tensor], shard_of: dict[str, int]) -> dict[str, str]:
    """Write `tensors` as shards with an index, like official checkpoints; return the weight map."""
    count = max(shard_of.values()) + 1
    weight_map = {name: f"model-{shard_of[name] + 1:05}-of-{count:05}.safetensors" for name in tensors}
    for file in set(weight_map.values()):
        part = {name: tensor for name, tensor in tensors.items() if weight_map[name] == file}
        save_file(part, directory / file, metadata={"format": "pt"})
    index = {"metadata": {"total_size": 0}, "weight_map": weight_map}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    return weight_map
