"""vLLM's Qwen2-VL with qwenvit's vision tower."""

from vllm.model_executor.models import qwen2_vl
from vllm.multimodal import MULTIMODAL_REGISTRY

from qwenvit.integrations.vllm.model import QwenvitModel
from qwenvit.integrations.vllm.pixel_processor import PixelInfo, PixelProcessor


class Info(PixelInfo, qwen2_vl.Qwen2VLProcessingInfo):
    """What vLLM knows of the checkpoint's processor, which may leave the pixels to the tower's side."""


class Processor(PixelProcessor, qwen2_vl.Qwen2VLMultiModalProcessor):
    """vLLM's processor, which may send images as RGB bytes."""


@MULTIMODAL_REGISTRY.register_processor(
    Processor,
    info=Info,
    dummy_inputs=qwen2_vl.Qwen2VLDummyInputsBuilder,
)
class Qwen2VLForConditionalGeneration(QwenvitModel, qwen2_vl.Qwen2VLForConditionalGeneration):
    """vLLM's model; `QwenvitModel` says what is replaced."""
