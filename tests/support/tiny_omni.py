"""What a server's processor reads of Omni checkpoints: config, tokenizer and processors, no weights."""

from pathlib import Path

from tokenizers.pre_tokenizers import ByteLevel
from transformers import (
    Qwen2_5OmniConfig,
    Qwen2_5OmniProcessor,
    Qwen2Tokenizer,
    Qwen2VLImageProcessor,
    Qwen2VLVideoProcessor,
    Qwen3OmniMoeConfig,
    Qwen3OmniMoeProcessor,
    WhisperFeatureExtractor,
)

_PADS = {f"{kind}_token": f"<|{kind}_pad|>" for kind in ("image", "audio", "video")}
_ENDS = {
    f"{kind}_{end}_token": f"<|{kind}_{name}|>"
    for kind in ("vision", "audio")
    for end, name in (("bos", "start"), ("eos", "end"))
}
_KINDS = {
    "qwen2_5_omni": (Qwen2_5OmniConfig, Qwen2_5OmniProcessor, "Qwen2_5OmniForConditionalGeneration", {}),
    "qwen3_omni": (
        Qwen3OmniMoeConfig,
        Qwen3OmniMoeProcessor,
        "Qwen3OmniMoeForConditionalGeneration",
        {"patch_size": 16, "image_mean": [0.5] * 3, "image_std": [0.5] * 3},
    ),
}
OMNI = tuple(_KINDS)


def save_tiny_omni(family: str, folder: Path) -> None:
    """Write the processor and the config of one of `OMNI`, whose thinker has the tokens of the tokenizer."""
    config_class, processor_class, architecture, images = _KINDS[family]
    letters = sorted(ByteLevel.alphabet())
    vocab = {letter: index for index, letter in enumerate(letters)}
    tokenizer = Qwen2Tokenizer(vocab=vocab, merges=[], extra_special_tokens=_PADS | _ENDS)
    audio = WhisperFeatureExtractor(feature_size=128)
    processor_class(Qwen2VLImageProcessor(**images), Qwen2VLVideoProcessor(), audio, tokenizer).save_pretrained(folder)
    config = config_class(architectures=[architecture])
    for kind in ("image", "audio", "video"):
        for name in (f"{kind}_token_id", f"{kind}_token_index"):
            if hasattr(config.thinker_config, name):
                setattr(config.thinker_config, name, tokenizer.convert_tokens_to_ids(_PADS[f"{kind}_token"]))
    config.save_pretrained(folder)
