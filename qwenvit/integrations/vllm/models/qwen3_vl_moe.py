"""vLLM's Qwen3-VL with experts with qwenvit's vision tower."""

from vllm.model_executor.models import qwen3_vl_moe
from vllm.multimodal import MULTIMODAL_REGISTRY

from qwenvit.integrations.vllm.model import QwenvitModel
from qwenvit.integrations.vllm.pixel_processor import PixelInfo, PixelProcessor


class Info(PixelInfo, qwen3_vl_moe.Qwen3VLMoeProcessingInfo):
    """What vLLM knows of the checkpoint's processor, which may leave the pixels to the tower's side."""


class Processor(PixelProcessor, qwen3_vl_moe.Qwen3VLMultiModalProcessor):
    """vLLM's processor, which may send images as RGB bytes."""


@MULTIMODAL_REGISTRY.register_processor(
    Processor,
    info=Info,
    dummy_inputs=qwen3_vl_moe.Qwen3VLDummyInputsBuilder,
)
class Qwen3VLMoeForConditionalGeneration(QwenvitModel, qwen3_vl_moe.Qwen3VLMoeForConditionalGeneration):
    """vLLM's model; `QwenvitModel` says what is replaced."""
