"""vLLM's Qwen2.5-VL with qwenvit's vision tower."""

from vllm.model_executor.models import qwen2_5_vl
from vllm.multimodal import MULTIMODAL_REGISTRY

from qwenvit.integrations.vllm.model import QwenvitModel
from qwenvit.integrations.vllm.pixel_processor import PixelInfo, PixelProcessor


class Info(PixelInfo, qwen2_5_vl.Qwen2_5_VLProcessingInfo):
    """What vLLM knows of the checkpoint's processor, which may leave the pixels to the tower's side."""


class Processor(PixelProcessor, qwen2_5_vl.Qwen2_5_VLMultiModalProcessor):
    """vLLM's processor, which may send images as RGB bytes."""


@MULTIMODAL_REGISTRY.register_processor(
    Processor,
    info=Info,
    dummy_inputs=qwen2_5_vl.Qwen2_5_VLDummyInputsBuilder,
)
class Qwen2_5_VLForConditionalGeneration(QwenvitModel, qwen2_5_vl.Qwen2_5_VLForConditionalGeneration):
    """vLLM's model; `QwenvitModel` says what is replaced."""
