"""vLLM's Qwen3-Omni's thinker with qwenvit's vision tower."""

from vllm.model_executor.models import qwen3_omni_moe_thinker
from vllm.multimodal import MULTIMODAL_REGISTRY

from qwenvit.integrations.vllm.model import QwenvitModel
from qwenvit.integrations.vllm.pixel_processor import PixelInfo, PixelProcessor


class Info(PixelInfo, qwen3_omni_moe_thinker.Qwen3OmniMoeThinkerProcessingInfo):
    """What vLLM knows of the checkpoint's processor, which may leave the pixels to the tower's side."""


class Processor(PixelProcessor, qwen3_omni_moe_thinker.Qwen3OmniMoeThinkerMultiModalProcessor):
    """vLLM's processor, which may send images as RGB bytes."""


@MULTIMODAL_REGISTRY.register_processor(
    Processor,
    info=Info,
    dummy_inputs=qwen3_omni_moe_thinker.Qwen3OmniMoeThinkerDummyInputsBuilder,
)
class Qwen3OmniMoeThinkerForConditionalGeneration(
    QwenvitModel, qwen3_omni_moe_thinker.Qwen3OmniMoeThinkerForConditionalGeneration
):
    """vLLM's model; `QwenvitModel` says what is replaced."""
