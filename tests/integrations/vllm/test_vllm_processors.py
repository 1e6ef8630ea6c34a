"""The plugin's multimodal processors in vLLM: what the engine and the tower get must be what vLLM's own make."""

import os
import subprocess
from itertools import product
from pathlib import Path

import pytest
import torch

from support.tiny_checkpoints import IMAGE, VIDEO, save_tiny_checkpoint
from support.tiny_omni import OMNI, save_tiny_omni
from support.vllm_pictures import noise, picture
from support.vllm_process import ENVIRONMENT, VARIABLES, needs_vllm

pytestmark = needs_vllm

PROGRAM = Path(__file__).parents[2] / "support" / "vllm_processors.py"
SIZES = [
    (1, 1),
    (5, 900),
    (28, 28),
    (300, 411),
    (256, 256),
    (479, 640),
    (1203, 37),
    (640, 853),
]
"""Heights and widths: enlarged, shrunk, a multiple of the patches or not, as long as transformers allows."""


def ask(*images: object, **kwargs: object) -> dict:
    return {
        "prompt": "a".join(["Look: ", *[IMAGE] * len(images)]),
        "multi_modal_data": {"image": list(images)},
        "mm_processor_kwargs": kwargs,
    }


BYTES = (
    {f"{height} × {width}": ask(picture(height, width)) for height, width in SIZES}
    | {mode: ask(picture(90, 71, mode)) for mode in ("RGBA", "LA", "P", "transparent", "1", "L", "CMYK", "I;16")}
    | {
        "two": ask(picture(300, 411), picture(256, 200)),
        "two of a size": ask(picture(90, 71), picture(90, 71, "RGBA")),
        "one again, and another": ask(picture(300, 411), picture(64, 80)),
        "min_pixels": ask(picture(90, 71), min_pixels=100_000, max_pixels=900_000),
        "max_pixels": ask(picture(479, 640), min_pixels=1, max_pixels=170_000),
        "size": ask(picture(479, 640), size={"shortest_edge": 50_000, "longest_edge": 190_000}),
        "images_kwargs": ask(
            picture(479, 640), images_kwargs={"size": {"shortest_edge": 5_000, "longest_edge": 180_000}}
        ),
        "array": ask(noise(90, 71, 3)),
        "channels first": ask(noise(3, 90, 71)),
        "tensor": ask(torch.from_numpy(noise(3, 90, 71))),
    }
)
"""Prompts whose images travel as bytes."""
FRAMES = {"fps": 1.0, "duration": 4.0, "total_num_frames": 4, "frames_indices": [0, 1, 2, 3], "do_sample_frames": False}
VIDEOS = {"video": [(noise(4, 70, 90, 3), FRAMES)]}
OWN = {
    "float tensor": ask(torch.from_numpy(noise(3, 90, 71)).float(), do_rescale=False),
    "resized already": ask(picture(224, 448), do_resize=False),
    "mean": ask(picture(90, 71), image_mean=[0.1, 0.2, 0.3]),
    "lanczos": ask(picture(90, 71), resample=1),
    "more bytes than pixel values": ask(picture(640, 853), min_pixels=1, max_pixels=30_000),
    "too long": ask(picture(201, 1)),
    "video": {"prompt": VIDEO, "multi_modal_data": VIDEOS},
    "text": {"prompt": "nothing to see", "multi_modal_data": {}},
}
"""Prompts that the plugin leaves to vLLM's own processing."""
BOTH = {"image and video": {"prompt": IMAGE + VIDEO, "multi_modal_data": {"image": [picture(90, 71)]} | VIDEOS}}
CONFIGS = {
    "default": {},
    "pillow": {"mm_processor_kwargs": {"use_fast": False}},  # vLLM 0.24 ignores it for Qwen2.5-VL
    "float32": {"dtype": "float32", "mm_device_do_normalize": False},
    "bfloat16": {"mm_device_do_normalize": False},
    "pillow, bfloat16": {"mm_processor_kwargs": {"use_fast": False}, "mm_device_do_normalize": False},
    "smaller": {"mm_processor_kwargs": {"min_pixels": 3136, "max_pixels": 300_000}},
}
"""Arguments of `ModelConfig`. Since 0.28 vLLM's towers normalise by default, and pixel values are bytes."""
OFF = {
    "not asked for": ({"options": {"pixels": False}}, "additional_config: qwenvit.pixels is false"),
    "no images": ({"limit_mm_per_prompt": {"image": 0}}, "limit_mm_per_prompt allows no image"),
    "on a GPU": ({"mm_processor_kwargs": {"device": "cuda"}}, "mm_processor_kwargs: device is 'cuda'"),
    "mean": ({"mm_processor_kwargs": {"image_mean": [0.1, 0.2, 0.3]}}, "mm_processor_kwargs: image_mean: expected"),
    "resized": ({"mm_processor_kwargs": {"images_kwargs": {"do_resize": False}}}, "mm_processor_kwargs: do_resize: "),
}
"""Configs with which images do not travel as bytes, and the start of the reason."""


def process(family: str, folder: Path, configs: dict, prompts: dict) -> dict:
    """Return the answers of `support/vllm_processors.py` about a tiny model."""
    save = save_tiny_omni if family in OMNI else save_tiny_checkpoint
    save(family, folder / "model")
    job, answers, log = folder / "job.pt", folder / "answers.pt", folder / "log.txt"
    given = {name: {"model": str(folder / "model"), "dtype": "bfloat16"} | config for name, config in configs.items()}
    torch.save({"configs": given, "prompts": prompts}, job)
    with log.open("w") as output:
        done = subprocess.run(
            [ENVIRONMENT / "bin" / "python", PROGRAM, job, answers],
            env=os.environ | VARIABLES | {"VLLM_PLUGINS": "qwenvit"},
            stdout=output,
            stderr=subprocess.STDOUT,
            timeout=600,
        )
    assert done.returncode == 0, log.read_text()[-10_000:]
    return torch.load(answers)


def check_equal(found: object, expected: object) -> None:
    """Compare answers bit by bit."""
    if isinstance(expected, torch.Tensor):
        # What vLLM's tower shall normalise, transformers' Pillow processor returns as floats of 0 to 255.
        assert found.dtype in (expected.dtype, torch.uint8)
        assert torch.equal(found.to(expected.dtype), expected)
    elif isinstance(expected, dict):
        assert found.keys() == expected.keys()
        for name in expected:
            check_equal(found[name], expected[name])
    else:
        assert found == expected


@pytest.mark.parametrize("family", ["qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_5", *OMNI])
def test_the_engine_and_the_tower_get_what_vllm_gives_them(family, tmp_path):
    prompts = BYTES | OWN | BOTH
    if family in OMNI:  # the videos of a processor that hears, too, are another matter
        prompts = {name: prompt for name, prompt in prompts.items() if "video" not in prompt["multi_modal_data"]}
    configs = CONFIGS if family == "qwen2_5_vl" else {name: CONFIGS[name] for name in ("default", "bfloat16")}
    answers = process(family, tmp_path, configs, prompts)
    compared = 0
    for config, cached, prompt in product(configs, (False, True), prompts):
        own, answer = (answers[config, whose, cached, prompt] for whose in ("vllm", "qwenvit"))
        if isinstance(own, str):  # an error
            assert answer == own, (config, prompt)
            assert prompt == "too long"
            continue
        travelled = answer.pop("bytes")
        assert own.pop("bytes") == 0
        check_equal(answer, own)
        assert bool(travelled) == (prompt not in OWN), (config, prompt)
        compared += 1
    assert compared == 2 * len(configs) * (len(prompts) - 1)


def test_why_images_do_not_travel_as_bytes(tmp_path):
    prompts = {"image": ask(picture(90, 71)), "video": OWN["video"]}
    answers = process("qwen2_5_vl", tmp_path, {name: config for name, (config, _) in OFF.items()}, prompts)
    for name, (_, reason) in OFF.items():
        assert answers[name, "obstacle"].startswith(reason), answers[name, "obstacle"]
        for prompt in prompts:
            check_equal(answers[name, "qwenvit", False, prompt], answers[name, "vllm", False, prompt])
