"""Damaged checkpoints through `Encoder.from_pretrained`.

A tower that loads must have the tensors that safetensors' own reader finds in the files, and the config that
transformers reads: a lie told consistently, such as another value of a tensor or of `window_size`, is nobody's to find.
What damage leaves readable is so compared with the damaged file, and everything else with the undamaged one. Changes
that must not matter must not be refused either.
"""

import functools
import json
import random
import tempfile
import warnings
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save
from transformers.models.qwen2_5_omni.configuration_qwen2_5_omni import Qwen2_5OmniVisionEncoderConfig
from transformers.models.qwen2_5_vl.configuration_qwen2_5_vl import Qwen2_5_VLVisionConfig
from transformers.models.qwen2_vl.configuration_qwen2_vl import Qwen2VLVisionConfig
from transformers.models.qwen3_5.configuration_qwen3_5 import Qwen3_5VisionConfig
from transformers.models.qwen3_omni_moe.configuration_qwen3_omni_moe import Qwen3OmniMoeVisionEncoderConfig
from transformers.models.qwen3_vl.configuration_qwen3_vl import Qwen3VLVisionConfig

from fuzz.checkpoint_damage import DAMAGE
from fuzz.checkpoint_files import INDEX, Files
from fuzz.frame import Case, DifferentError
from fuzz.harmless_changes import HARMLESS
from qwenvit import Encoder, VisionConfig
from qwenvit.towers.reference import ReferenceTower
from qwenvit.weights.names import official_name

DOCUMENTED = (ValueError, OSError)

_SIZES = {
    "depth": 2,
    "hidden_size": 16,
    "out_hidden_size": 24,
    "num_heads": 2,
    "intermediate_size": 20,
    "patch_size": 4,
}
_WINDOWS = _SIZES | {"window_size": 16, "fullatt_block_indexes": [1]}
_POSITIONS = _SIZES | {"num_position_embeddings": 16}
_DEEPSTACK = _POSITIONS | {"deepstack_visual_indexes": [0, 1]}
_QWEN2 = {"depth": 2, "embed_dim": 16, "hidden_size": 24, "num_heads": 2, "mlp_ratio": 2, "patch_size": 4}
FAMILIES = {  # the prefix, the outer model_type, the vision config and its class
    "qwen2_vl": ("visual.", "qwen2_vl", _QWEN2, Qwen2VLVisionConfig),
    "qwen2_5_vl": ("visual.", "qwen2_5_vl", _WINDOWS, Qwen2_5_VLVisionConfig),
    "qwen3_vl": ("model.visual.", "qwen3_vl", _DEEPSTACK, Qwen3VLVisionConfig),
    "qwen3_5": ("model.visual.", "qwen3_5", _POSITIONS, Qwen3_5VisionConfig),
    "qwen2_5_omni": ("thinker.visual.", "qwen2_5_omni", _WINDOWS, Qwen2_5OmniVisionEncoderConfig),
    "qwen3_omni": ("thinker.visual.", "qwen3_omni_moe", _DEEPSTACK, Qwen3OmniMoeVisionEncoderConfig),
}
LAYOUTS = ("single", "shards", "separate")
OTHERS = {name: torch.ones(3, 5) for name in ("lm_head.weight", "model.layers.0.self_attn.q_proj.weight")}
PROCESSOR = {"patch_size": 4, "temporal_patch_size": 2, "merge_size": 2, "image_mean": [0.5] * 3, "do_resize": True}


def cases(seed: int, count: int) -> Iterator[Case]:
    """Yield checkpoints of every family, layout and dtype: one in eight with a change that must not matter."""
    with tempfile.TemporaryDirectory() as folder:  # the first call imports more
        load_and_compare(dict(sound("qwen3_vl", "shards", torch.bfloat16)), True, Path(folder))
    for index in range(count):
        generator = random.Random(f"{seed}/{index}")
        family, layout = generator.choice(list(FAMILIES)), generator.choice(LAYOUTS)
        dtype = generator.choice([torch.float32, torch.bfloat16])
        files: Files = dict(sound(family, layout, dtype))
        harmless = index % 8 == 0
        changes = [generator.choice(HARMLESS)] if harmless else generator.choices(DAMAGE, k=generator.choice([1, 1, 2]))
        done = [change(files, generator) for change in changes]
        description = f"{family}, {layout}, {dtype}: {'; '.join(done)}"
        yield Case(description, functools.partial(load_and_compare, files, harmless))


@functools.cache
def sound(family: str, layout: str, dtype: torch.dtype) -> Mapping[str, bytes]:
    """Return the files of a tiny checkpoint, shaped like the official ones."""
    prefix, model_type, vision, cls = FAMILIES[family]
    vision = vision | {"model_type": cls.model_type}
    config: dict[str, Any] = {"vision_config": vision, "text_config": {"hidden_size": 24}}
    if prefix == "thinker.visual.":
        config = {"thinker_config": config}
    config |= {"model_type": model_type, "architectures": ["Model"]}
    torch.manual_seed(0)
    shapes = ReferenceTower(VisionConfig.from_hf(config)).state_dict()
    tower = {prefix + official_name(name, family): torch.randn(like.shape).to(dtype) for name, like in shapes.items()}
    files = {"config.json": json.dumps(config).encode(), "preprocessor_config.json": json.dumps(PROCESSOR).encode()}
    metadata = {"format": "pt"}
    match layout:
        case "single":
            files["model.safetensors"] = save(tower | OTHERS, metadata)
        case "separate":
            files |= {"model_visual.safetensors": save(tower, metadata), "model.safetensors": save(OTHERS, metadata)}
        case _:
            whole = tower | OTHERS
            weight_map = {name: f"model-0000{1 + place % 3}-of-00003.safetensors" for place, name in enumerate(whole)}
            for shard in sorted(set(weight_map.values())):
                files[shard] = save({name: whole[name] for name in whole if weight_map[name] == shard}, metadata)
            files[INDEX] = json.dumps({"metadata": {"total_size": 1}, "weight_map": weight_map}).encode()
    return files


def load_and_compare(files: Files, harmless: bool, folder: Path) -> None:
    """Write the files, load the tower and compare it with what is in the files."""
    for name, data in files.items():
        if isinstance(data, bytes):
            (folder / name).write_bytes(data)
        else:
            data(folder / name)
    torch.set_num_threads(1)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            encoder = Encoder.from_pretrained(folder, device="cpu", dtype="float32", impl="reference")
    except DOCUMENTED as error:
        if harmless:
            raise DifferentError(f"refused: {error!r}") from error
        raise
    if "adapter_config.json" in files:
        raise DifferentError("a broken adapter was passed over")
    loaded = {official_name(name, encoder.config.family): value for name, value in encoder.tower.state_dict().items()}
    expected = contents(folder, loaded.keys())
    for name, tensor in loaded.items():
        # As integers, since NaN is not equal to itself.
        if not torch.equal(tensor.view(torch.int32), expected[name].float().view(torch.int32)):
            raise DifferentError(f"{name}: got {tensor.flatten()[:4]}, expected {expected[name].flatten()[:4]}")
    _compare_config(folder, encoder.config)


def contents(folder: Path, names: Collection[str]) -> dict[str, torch.Tensor]:
    """Return the tensors of the only complete tower, by official names without prefix, as safetensors reads them."""
    for name in ("model_visual.safetensors", "model.safetensors", INDEX):
        if not (folder / name).exists():
            continue
        shards = _tensor_files(folder / name)
        prefixes = [
            key.removesuffix("patch_embed.proj.weight") for key in shards if key.endswith("patch_embed.proj.weight")
        ]
        complete = [prefix for prefix in prefixes if all(prefix + own in shards for own in names)]
        if len(complete) > 1:
            raise DifferentError(f"one of the towers {complete} was chosen")
        if complete:
            return {own: _tensor(shards[complete[0] + own], complete[0] + own) for own in names}
    raise DifferentError("a tower was loaded that is not in the files")


def _tensor_files(file: Path) -> dict[str, Path]:
    try:
        if file.name == INDEX:
            return {name: file.with_name(shard) for name, shard in json.loads(file.read_bytes())["weight_map"].items()}
        with safe_open(file, "pt") as opened:
            return dict.fromkeys(opened.keys(), file)
    except Exception as error:
        raise DifferentError(f"a tower was loaded from {file}, which cannot be read: {error!r}") from error


def _tensor(file: Path, name: str) -> torch.Tensor:
    try:
        with safe_open(file, "pt") as opened:
            return opened.get_tensor(name).clone()  # a view would keep the whole file mapped
    except Exception as error:
        raise DifferentError(f"{name} was loaded from {file}, where it cannot be read: {error!r}") from error


def _compare_config(folder: Path, config: VisionConfig) -> None:
    """Compare the tower's config with what transformers reads."""
    *_, cls = FAMILIES[config.family]
    content = json.loads((folder / "config.json").read_bytes())
    try:
        content = content.get("thinker_config", content)
        theirs = cls(**content["vision_config"]).to_dict()
    except Exception as error:
        raise DifferentError(f"a config was taken that transformers refuses: {error!r}") from error
    ours = config.to_hf()
    theta = ours.pop("rope_parameters")["rope_theta"], theirs["rope_parameters"]["rope_theta"]
    del ours["model_type"]
    wrong = [f"{key}: {ours[key]} instead of {theirs.get(key)}" for key in ours if ours[key] != theirs.get(key)]
    if wrong or theta[0] != theta[1]:
        raise DifferentError(f"config: {', '.join(wrong)} rope_theta {theta}")
