"""Exported embeddings in a real vLLM engine: the log-probabilities must be those that its own tower gives."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from qwenvit import Encoder
from qwenvit.outputs import Embeddings
from support.tiny_checkpoints import IMAGE, VIDEO, save_tiny_checkpoint

ENVIRONMENT = Path(sys.prefix, "vllm")
pytestmark = [
    pytest.mark.skipif(not (ENVIRONMENT / "installed").exists(), reason="needs vLLM: run make test-vllm"),
    pytest.mark.parametrize("family", ["qwen2_5_vl", "qwen3_vl"]),
]

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
}
TEXT = {
    "images": f"Compare {IMAGE} with {IMAGE}: which of the two is larger, and what do they show?",
    "video": f"Watch {VIDEO} to its end: what happens there?",
}


def noise(*shape):
    return np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)


IMAGES = [Image.fromarray(noise(300, 411, 3)), Image.fromarray(noise(256, 200, 3))]
FRAMES = noise(6, 130, 170, 3)  # one a second: at two, Qwen2.5-VL's seconds per grid would be vLLM's default
FRAME_TIMES = range(len(FRAMES))
SHOWN = {"fps": 1.0, "duration": 6.0, "total_num_frames": 6, "frames_indices": list(FRAME_TIMES)}
OWN = {"images": {"image": IMAGES}, "video": {"video": [(FRAMES, SHOWN | {"do_sample_frames": False})]}}
"""`multi_modal_data` for vLLM's own tower."""


def encode(checkpoint):
    encoder = Encoder.from_pretrained(checkpoint, impl="reference")
    return {"images": encoder.encode(IMAGES), "video": encoder.encode_video(FRAMES, frame_times=FRAME_TIMES)}


def spoil(embeddings, *, only_deepstack=False):
    """Return embeddings with noise of 1 % (relative L2)."""
    generator = torch.Generator().manual_seed(0)

    def noisy(layer):
        noise = torch.randn(layer.shape, generator=generator)
        return layer + 0.01 * layer.norm() / noise.norm() * noise

    deepstack = [noisy(layer) for layer in embeddings.deepstack]
    tokens = embeddings.packed if only_deepstack else noisy(embeddings.packed)
    first = embeddings[0]
    return Embeddings(
        tokens, embeddings.grid_thw, deepstack, embeddings.config, video=first.is_video, times=first.times
    )


def ask(prompts, folder, **options):
    """Return `{name: (token ids, log-probabilities)}` of prompts from an engine of the model in a folder."""
    job, answers, log = folder / "job.pt", folder / "answers.pt", folder / "log.txt"
    engine = ENGINE | {"model": str(folder / "model")} | options
    torch.save({"engine": engine, "prompts": prompts}, job)
    program = Path(__file__).parents[1] / "support" / "vllm_engine.py"
    homes = {f"VLLM_{name}_ROOT": str(folder / name) for name in ("CACHE", "CONFIG")}
    with log.open("w") as output:
        done = subprocess.run(
            [ENVIRONMENT / "bin" / "python", program, job, answers],
            env=os.environ | VARIABLES | homes,
            stdout=output,
            stderr=subprocess.STDOUT,
            timeout=600,
        )
    assert done.returncode == 0, log.read_text()[-10_000:]
    return torch.load(answers)


def check(answers):
    """Compare answers named `(kind, way)` with those of vLLM's own tower to the same kind."""
    right, spoiled = {}, {}
    for (kind, way), (tokens, logprobs) in answers.items():
        own_tokens, own = answers[kind, "own"]
        assert tokens == own_tokens
        if way != "own":
            (spoiled if "spoiled" in way else right)[kind, way] = (logprobs - own).abs().max().item()
    for (kind, way), difference in (right | spoiled).items():
        print(f"{kind}, {way}: log-probabilities differ by up to {difference:.1e}")
    assert max(right.values()) < TOLERANCE, right
    assert min(spoiled.values()) > TOLERANCE, spoiled


def chat(text, parts):
    """Return the messages of a chat with content parts in place of a text's placeholders."""
    texts = [{"type": "text", "text": part} for part in text.replace(VIDEO, IMAGE).split(IMAGE)]
    content = [texts[0]]
    for part, following in zip(parts, texts[1:], strict=True):
        content += [part, following]
    return [{"role": "user", "content": content}]


def test_prompts_and_chats(family, tmp_path):
    save_tiny_checkpoint(family, tmp_path / "model")
    prompts = {}
    for kind, embeddings in encode(tmp_path / "model").items():
        data = {"own": OWN[kind], "to_vllm": embeddings.to_vllm(), "spoiled": spoil(embeddings).to_vllm()}
        if embeddings.deepstack:
            data["spoiled DeepStack"] = spoil(embeddings, only_deepstack=True).to_vllm()
        prompts |= {(kind, way): {"prompt": TEXT[kind], "multi_modal_data": one} for way, one in data.items()}
        prompts[kind, "to_vllm_message"] = chat(TEXT[kind], embeddings.to_vllm_message())
    check(ask(prompts, tmp_path, enable_mm_embeds=True))


def test_encoder_cache(family, tmp_path):
    save_tiny_checkpoint(family, tmp_path / "model")
    prompts, storage = {}, tmp_path / "storage"
    for kind, embeddings in encode(tmp_path / "model").items():
        prompts[kind, "own"] = {"prompt": TEXT[kind], "multi_modal_data": OWN[kind]}
        ((modality, fields),) = embeddings.to_vllm().items()
        metadata = {name: field for name, field in fields.items() if name != f"{modality}_embeds"}
        for way, stored in {"save_vllm_cache": embeddings, "spoiled": spoil(embeddings)}.items():
            uuids = [f"{kind}-{way}-{index}" for index in range(len(stored))]
            for item, uuid in zip(stored, uuids, strict=True):
                item.save_vllm_cache(storage, uuid)
            prompts[kind, way] = {
                "prompt": TEXT[kind],
                "multi_modal_data": {modality: metadata},
                "multi_modal_uuids": {modality: uuids},
            }
    connector = {
        "ec_connector": "ECExampleConnector",
        "ec_role": "ec_consumer",
        "ec_connector_extra_config": {"shared_storage_path": str(storage)},
    }
    check(ask(prompts, tmp_path, ec_transfer_config=connector))
