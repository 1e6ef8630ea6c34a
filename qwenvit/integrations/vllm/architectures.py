"""Which of vLLM's architectures the plugin replaces, in which versions of vLLM, and on which devices."""

import re
from typing import Any

_MODELS = "qwenvit.integrations.vllm.models"
ARCHITECTURES = {
    "Qwen2VLForConditionalGeneration": f"{_MODELS}.qwen2_vl:Qwen2VLForConditionalGeneration",
    "Qwen2_5_VLForConditionalGeneration": f"{_MODELS}.qwen2_5_vl:Qwen2_5_VLForConditionalGeneration",
    "Qwen3VLForConditionalGeneration": f"{_MODELS}.qwen3_vl:Qwen3VLForConditionalGeneration",
    "Qwen3VLMoeForConditionalGeneration": f"{_MODELS}.qwen3_vl_moe:Qwen3VLMoeForConditionalGeneration",
    "Qwen3_5ForConditionalGeneration": f"{_MODELS}.qwen3_5:Qwen3_5ForConditionalGeneration",
    "Qwen3_5MoeForConditionalGeneration": f"{_MODELS}.qwen3_5:Qwen3_5MoeForConditionalGeneration",
    "Qwen2_5OmniModel": f"{_MODELS}.qwen2_5_omni_thinker:Qwen2_5OmniThinkerForConditionalGeneration",
    "Qwen2_5OmniForConditionalGeneration": (
        f"{_MODELS}.qwen2_5_omni_thinker:Qwen2_5OmniThinkerForConditionalGeneration"
    ),
    "Qwen3OmniMoeForConditionalGeneration": (
        f"{_MODELS}.qwen3_omni_moe_thinker:Qwen3OmniMoeThinkerForConditionalGeneration"
    ),
}
"""Where our class of each architecture is. Models that borrow vLLM's towers under other names stay vLLM's."""

VERSIONS = ((0, 22), (0, 33))
"""The oldest and the newest vLLM, major and minor, that the plugin was checked against."""


def version_obstacle(version: str) -> str | None:
    """Return why the plugin does not fit a version of vLLM, or None."""
    parts = re.match(r"(\d+)\.(\d+)", version)
    oldest, newest = (".".join(map(str, each)) for each in VERSIONS)
    if parts is None or not VERSIONS[0] <= (int(parts[1]), int(parts[2])) <= VERSIONS[1]:
        return f"this version of qwenvit was checked with vLLM {oldest} to {newest}, and this is {version}"
    return None


def platform_obstacle(platform: Any) -> str | None:
    """Return why the plugin does not fit vLLM's `current_platform`, or None."""
    if platform.is_cpu():
        return None
    if not platform.is_cuda():
        return f"expected a CPU or a GPU of NVIDIA, got {platform.device_name}"
    if not platform.has_device_capability(80):
        return "expected a GPU of compute capability 8.0 or later"
    return None
