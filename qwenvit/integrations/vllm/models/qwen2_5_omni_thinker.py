"""vLLM's Qwen2.5-Omni's thinker with qwenvit's vision tower."""

from vllm.model_executor.models import qwen2_5_omni_thinker
from vllm.multimodal import MULTIMODAL_REGISTRY

from qwenvit.integrations.vllm.model import QwenvitModel
from qwenvit.integrations.vllm.pixel_processor import PixelInfo, PixelProcessor


class Info(PixelInfo, qwen2_5_omni_thinker.Qwen2_5OmniThinkerProcessingInfo):
    """What vLLM knows of the checkpoint's processor, which may leave the pixels to the tower's side."""


class Processor(PixelProcessor, qwen2_5_omni_thinker.Qwen2_5OmniThinkerMultiModalProcessor):
    """vLLM's processor, which may send images as RGB bytes."""


@MULTIMODAL_REGISTRY.register_processor(
    Processor,
    info=Info,
    dummy_inputs=qwen2_5_omni_thinker.Qwen2_5OmniThinkerDummyInputsBuilder,
)
class Qwen2_5OmniThinkerForConditionalGeneration(
    QwenvitModel, qwen2_5_omni_thinker.Qwen2_5OmniThinkerForConditionalGeneration
):
    """vLLM's model; `QwenvitModel` says what is replaced."""
