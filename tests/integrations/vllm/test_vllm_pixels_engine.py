"""Images as RGB bytes in a real vLLM engine, beside videos, embeddings and images that are no bytes."""

import torch

from qwenvit import Encoder
from support.tiny_checkpoints import IMAGE, VIDEO, save_tiny_checkpoint
from support.vllm_pictures import noise, picture
from support.vllm_process import ENGINE, IMAGES, OWN, TEXT, TOLERANCE, difference, needs_vllm, run_engines

pytestmark = needs_vllm

CHANNELS = {"image": [torch.from_numpy(noise(3, 90, 71))]}


def prompts(checkpoint):
    """Return prompts by name; those of a tuple share the engine's batches."""
    image = {"prompt": f"Describe {IMAGE} in a word.", "multi_modal_data": {"image": IMAGES[:1]}}
    both = {"prompt": f"Is {IMAGE} in {VIDEO}?", "multi_modal_data": image["multi_modal_data"] | OWN["video"]}
    embeddings = Encoder.from_pretrained(checkpoint, impl="reference").encode(IMAGES)
    given = {"prompt": TEXT["images"], "multi_modal_data": embeddings.to_vllm()}
    modes = {"prompt": TEXT["images"], "multi_modal_data": {"image": [picture(90, 71, "RGBA"), picture(200, 71, "P")]}}
    tensor = {"prompt": f"Describe {IMAGE}.", "multi_modal_data": CHANNELS}
    mean = image | {"mm_processor_kwargs": {"image_mean": [0.1, 0.2, 0.3]}}
    small = image | {"mm_processor_kwargs": {"min_pixels": 3136, "max_pixels": 70_000}}
    return {
        "image and video": both,
        "modes": modes,
        "tensor": tensor,
        "smaller": small,
        "at once": (image, given, both, mean, modes, small, tensor),
    }


def test_pixels_on_and_off_give_the_same_log_probabilities(tmp_path):
    save_tiny_checkpoint("qwen2_5_vl", tmp_path / "model")
    arguments = ENGINE | {"model": str(tmp_path / "model"), "enable_mm_embeds": True}
    engines = {"off": {"arguments": arguments}}
    for pixels in (True, False):
        options = {"additional_config": {"qwenvit": {"tower": "tower", "pixels": pixels}}}
        engines[f"pixels {pixels}"] = {"arguments": arguments | options, "plugin": True}
    asked = prompts(tmp_path / "model")
    answers, log = run_engines(tmp_path, engines, asked)
    assert log.count("images travel as RGB bytes") == 1
    assert log.count("images travel as pixel values, because additional_config: qwenvit.pixels is false") == 1
    largest = {}
    for name in asked:
        for way in ("pixels True", "pixels False"):
            largest[way, name] = difference(answers[way, name], answers["off", name])
            print(f"{way}, {name}: log-probabilities differ by up to {largest[way, name]:.1e}")
        largest["on and off", name] = difference(answers["pixels True", name], answers["pixels False", name])
    assert max(largest.values()) <= TOLERANCE, largest
