"""Exported embeddings in a real vLLM engine: the log-probabilities must be those that its own tower gives."""

import pytest
import torch

from qwenvit import Encoder
from qwenvit.outputs import Embeddings
from support.tiny_checkpoints import IMAGE, VIDEO, save_tiny_checkpoint
from support.vllm_process import ENGINE, FRAME_TIMES, FRAMES, IMAGES, OWN, TEXT, TOLERANCE, needs_vllm, run_engines

pytestmark = [needs_vllm, pytest.mark.parametrize("family", ["qwen2_5_vl", "qwen3_vl"])]


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
    engine = {"arguments": ENGINE | {"model": str(folder / "model")} | options}
    answers, _ = run_engines(folder, {"engine": engine}, prompts)
    return {prompt: answer for (_, prompt), answer in answers.items() if prompt != "report"}


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
