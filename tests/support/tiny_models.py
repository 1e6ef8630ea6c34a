"""Tiny transformers models of every family with random weights, and inputs for them."""

import importlib

import tokenizers
import torch
from transformers import PreTrainedTokenizerFast
from transformers.models.qwen2_5_vl import Qwen2_5_VLProcessor
from transformers.models.qwen2_vl import Qwen2VLImageProcessor, Qwen2VLVideoProcessor

from support.rope_index_truth import sequence

CLASSES = {
    "qwen2_vl": ("Qwen2VLConfig", "Qwen2VLForConditionalGeneration"),
    "qwen2_5_vl": ("Qwen2_5_VLConfig", "Qwen2_5_VLForConditionalGeneration"),
    "qwen3_vl": ("Qwen3VLConfig", "Qwen3VLForConditionalGeneration"),
    "qwen3_vl_moe": ("Qwen3VLMoeConfig", "Qwen3VLMoeForConditionalGeneration"),
    "qwen3_5": ("Qwen3_5Config", "Qwen3_5ForConditionalGeneration"),
    "qwen3_5_moe": ("Qwen3_5MoeConfig", "Qwen3_5MoeForConditionalGeneration"),
    "qwen2_5_omni": ("Qwen2_5OmniThinkerConfig", "Qwen2_5OmniThinkerForConditionalGeneration"),
    "qwen3_omni_moe": ("Qwen3OmniMoeThinkerConfig", "Qwen3OmniMoeThinkerForConditionalGeneration"),
}
IMAGE, VIDEO, VOCABULARY = 300, 301, 320
VISION_START, VISION_END = 302, 303  # the Omni models, and others' beams, find images and videos by these
TEXT = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]},
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": 0,
    "initializer_range": 0.2,  # large enough that generated tokens vary
}
LOG_PROBABILITY_BOUND = 1e-4
"""Of a model whose attention or vision tower is replaced, in fp32."""
VISION = {"depth": 1, "num_heads": 2, "patch_size": 4, "spatial_merge_size": 2, "temporal_patch_size": 2}
_WINDOWS = {"fullatt_block_indexes": [0], "window_size": 16}
_DEEPSTACK = {"deepstack_visual_indexes": [0], "num_position_embeddings": 64}
_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
_LINEAR_ATTENTION = {
    "head_dim": 16,
    "partial_rotary_factor": 1.0,
    "layer_types": ["linear_attention", "full_attention"],
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 2,
}
_SHARED_EXPERT = {"shared_expert_intermediate_size": 32}
CONFIG_CHANGES = {  # of the text and the vision config
    "qwen2_vl": ({}, {"embed_dim": 32, "hidden_size": 64}),
    "qwen2_5_vl": ({}, {"tokens_per_second": 3} | _WINDOWS),
    "qwen3_vl": ({"head_dim": 16}, _DEEPSTACK),
    "qwen3_vl_moe": ({"head_dim": 16} | _EXPERTS, _DEEPSTACK),
    "qwen3_5": (_LINEAR_ATTENTION, {"num_position_embeddings": 64}),
    "qwen3_5_moe": (_LINEAR_ATTENTION | _EXPERTS | _SHARED_EXPERT, {"num_position_embeddings": 64}),
    "qwen2_5_omni": ({}, _WINDOWS),
    "qwen3_omni_moe": ({"head_dim": 16} | _EXPERTS, _DEEPSTACK),
}
AUDIO = {"d_model": 16, "encoder_layers": 1, "encoder_attention_heads": 2, "encoder_ffn_dim": 16, "output_dim": 64}


def is_omni(family):
    return "omni" in family


def build(family, text=None, **vision):
    """Return a model of the family; `text` and `vision` change its configs."""
    module = importlib.import_module(f"transformers.models.{family}.modeling_{family}")
    configs = importlib.import_module(f"transformers.models.{family}.configuration_{family}")
    config_class, model_class = CLASSES[family]
    text_changes, vision_changes = CONFIG_CHANGES[family]
    vision = {"hidden_size": 32, "out_hidden_size": 64, "intermediate_size": 48} | VISION | vision_changes | vision
    if family == "qwen2_vl":
        vision = {key: value for key, value in vision.items() if key not in ("out_hidden_size", "intermediate_size")}
    config = getattr(configs, config_class)(
        text_config=TEXT | text_changes | (text or {}),
        vision_config=vision,
        image_token_id=IMAGE,
        video_token_id=VIDEO,
        **({"audio_config": AUDIO, "initializer_range": 0.2} if is_omni(family) else {}),
    )
    config.vision_start_token_id = VISION_START
    torch.manual_seed(0)
    return getattr(module, model_class)(config).eval()


def build_wide(family, text=None, **vision):
    """Return a tiny model whose heads are as wide as the fast tower's kernels support, with outlier channels."""
    width = {"embed_dim": 128} if family == "qwen2_vl" else {"hidden_size": 128, "intermediate_size": 100}
    calmer = {"initializer_range": 0.1} if family == "qwen3_5_moe" else {}  # else its experts amplify rounding
    model = build(family, calmer | (text or {}), **({"depth": 3} | width | vision))
    with torch.no_grad():
        for name, parameter in visual(model).named_parameters():
            if parameter.ndim == 1:  # transformers initialises biases to 0 and norms to 1: equal ones hide a swap
                seeded = torch.Generator("cpu").manual_seed(len(name))
                parameter += 0.1 * torch.randn(parameter.shape, generator=seeded, device="cpu").to(parameter)
            elif "proj" in name:
                parameter[3] *= 10
    return model


def base(model):
    """Return the part of the model that has the vision tower: in older versions, the Omni thinkers themselves."""
    return model if "visual" in model._modules else model.model


def visual(model):
    """Return the model's vision tower."""
    return base(model).visual


def inputs_for(model, rows, padding="left"):
    """Return the model's inputs for rows of text, images and videos as `sequence` takes them."""
    family, vision = model.config.model_type, model.config.vision_config
    layout = "qwen2_vl" if is_omni(family) else family.removesuffix("_moe")  # of ids and timestamps
    inputs = sequence(rows, layout, padding=padding, junk=False)
    inputs["input_ids"] %= IMAGE
    types = inputs["mm_token_type_ids"]
    inputs["input_ids"][types == 1] = IMAGE
    inputs["input_ids"][types == 2] = VIDEO
    generator = torch.Generator().manual_seed(1)
    patch_dim = vision.in_channels * vision.temporal_patch_size * vision.patch_size**2
    for grid, pixels in (("image_grid_thw", "pixel_values"), ("video_grid_thw", "pixel_values_videos")):
        if inputs[grid] is not None:
            inputs[pixels] = torch.randn(int(inputs[grid].prod(-1).sum()), patch_dim, generator=generator)
    is_text, ids = types == 0, inputs["input_ids"]
    ids[:, 1:][~is_text[:, :-1] & is_text[:, 1:]] = VISION_END
    ids[:, :-1][is_text[:, :-1] & ~is_text[:, 1:]] = VISION_START
    if is_omni(family):
        del inputs["mm_token_type_ids"]
    seconds = {"qwen2_5_vl": "second_per_grid_ts", "qwen2_5_omni_thinker": "video_second_per_grid"}
    if inputs["video_grid_thw"] is not None and (family in seconds or is_omni(family)):
        name = seconds.get(family, "video_second_per_grid")
        inputs[name] = torch.full((len(inputs["video_grid_thw"]),), 0.7)
    return {key: value for key, value in inputs.items() if value is not None}


def processor():
    """Return Qwen2.5-VL's processor of images and chats, for a vocabulary of the words `w0` to `w299`."""
    specials = {"<|image_pad|>": IMAGE, "<|video_pad|>": VIDEO, "<|vision_start|>": VISION_START}
    specials |= {"<|vision_end|>": VISION_END}
    words = tokenizers.models.WordLevel({f"w{i}": i for i in range(IMAGE)} | specials | {"?": 304}, unk_token="?")
    tokenizer = tokenizers.Tokenizer(words)
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    sizes = {"patch_size": VISION["patch_size"], "min_pixels": 64, "max_pixels": 1024}
    template = (
        "{% for message in messages %}{% for part in message.content %}{% if part.type == 'image' %}"
        "<|vision_start|> <|image_pad|> <|vision_end|> {% else %}{{ part.text }} {% endif %}{% endfor %}{% endfor %}"
    )
    return Qwen2_5_VLProcessor(
        Qwen2VLImageProcessor(**sizes),
        PreTrainedTokenizerFast(
            tokenizer_object=tokenizer, unk_token="?", pad_token="w0", additional_special_tokens=list(specials)
        ),
        Qwen2VLVideoProcessor(**sizes),
        chat_template=template,
    )
