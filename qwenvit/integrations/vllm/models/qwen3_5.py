"""vLLM's Qwen3.5, dense and with experts, with qwenvit's vision tower."""

from vllm.model_executor.models import qwen3_5
from vllm.multimodal import MULTIMODAL_REGISTRY

from qwenvit.integrations.vllm.model import QwenvitModel
from qwenvit.integrations.vllm.pixel_processor import PixelInfo, PixelProcessor


class Info(PixelInfo, qwen3_5.Qwen3_5ProcessingInfo):
    """What vLLM knows of the checkpoint's processor, which may leave the pixels to the tower's side."""


class MoeInfo(PixelInfo, qwen3_5.Qwen3_5MoeProcessingInfo):
    """The same for the model with experts."""


class Processor(PixelProcessor, qwen3_5.Qwen3VLMultiModalProcessor):
    """vLLM's processor, which may send images as RGB bytes."""


@MULTIMODAL_REGISTRY.register_processor(
    Processor,
    info=Info,
    dummy_inputs=qwen3_5.Qwen3VLDummyInputsBuilder,
)
class Qwen3_5ForConditionalGeneration(QwenvitModel, qwen3_5.Qwen3_5ForConditionalGeneration):
    """vLLM's model; `QwenvitModel` says what is replaced."""


@MULTIMODAL_REGISTRY.register_processor(
    Processor,
    info=MoeInfo,
    dummy_inputs=qwen3_5.Qwen3VLDummyInputsBuilder,
)
class Qwen3_5MoeForConditionalGeneration(QwenvitModel, qwen3_5.Qwen3_5MoeForConditionalGeneration):
    """vLLM's model; `QwenvitModel` says what is replaced."""
