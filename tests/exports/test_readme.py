"""The snippets of `qwenvit/exports/README.md`, executed: with a tiny model, and stand-ins for engines."""

import re
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen2VLImageProcessor, Qwen3VLProcessor, Qwen3VLVideoProcessor

import qwenvit
from support.embeddings import save_embeddings
from support.pinned import needs_pinned_transformers
from support.tiny_models import IMAGE, VIDEO, VISION_END, VISION_START
from support.whole_models import encoder_of, whole_model

SECTION = (Path(__file__).parents[2] / "qwenvit/exports/README.md").read_text()
SNIPPETS = re.findall(r"^```python\n(.*?)^```", SECTION, re.MULTILINE | re.DOTALL)
TEMPLATE = """{% for message in messages %}{% for part in message['content'] %}{% if part['type'] == 'image' %}
<|vision_start|><|image_pad|><|vision_end|>{% else %}{{ part['text'] }}{% endif %}{% endfor %}{% endfor %}"""


def tiny_processor():
    words = {f"w{i}": i for i in range(IMAGE)}
    special = {
        "<|vision_start|>": VISION_START,
        "<|image_pad|>": IMAGE,
        "<|video_pad|>": VIDEO,
        "<|vision_end|>": VISION_END,
    }
    tokenizer = Tokenizer(models.WordLevel(words | special, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=tokenizer, additional_special_tokens=list(special))
    return Qwen3VLProcessor(
        Qwen2VLImageProcessor(
            patch_size=16, min_pixels=65536, max_pixels=10**7, image_mean=[0.5] * 3, image_std=[0.5] * 3
        ),
        tokenizer,
        Qwen3VLVideoProcessor(),
        chat_template=TEMPLATE,
    )


def noise(height, width, seed):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


@needs_pinned_transformers
def test_the_snippets(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model = whole_model("qwen3_vl")
    enc = encoder_of(model)
    images = [noise(256, 256, 0), noise(300, 200, 1)]
    content = [{"type": "image"}, {"type": "text", "text": "w5 w6"}, {"type": "image"}, {"type": "text", "text": "w7"}]
    prompts, requests = [], []
    names = {
        "qwenvit": qwenvit,
        "enc": enc,
        "images": images,
        "messages": [{"role": "user", "content": content}],
        "model": model,
        "processor": tiny_processor(),
        "prompt": "<|vision_start|><|image_pad|><|vision_end|> w5",
        "llm": SimpleNamespace(generate=prompts.append),
        "engine": SimpleNamespace(generate=lambda **arguments: requests.append(arguments)),
        "folder": tmp_path / "shared",
    }
    cat = enc.encode(images[0])[0]
    save_embeddings(Path("out.safetensors"), {"cat.jpg": cat})
    assert len(SNIPPETS) == 2
    for snippet in SNIPPETS:
        exec(snippet, names)

    # The prompt that transformers' processor makes of the pictures, and what the model says to their pixels.
    inputs, out = names["inputs"], names["out"]
    text = names["processor"].apply_chat_template(names["messages"], tokenize=False)
    own = names["processor"](text=text, images=images, return_tensors="pt")
    assert torch.equal(inputs["input_ids"], own["input_ids"])
    assert torch.equal(inputs["image_grid_thw"], own["image_grid_thw"])
    expected = model.generate(**own)
    assert torch.equal(names["answer"], expected)

    whole, cached = prompts
    joined = [torch.cat([item.tokens, *item.deepstack], dim=1) for item in out]
    assert torch.equal(whole["multi_modal_data"]["image"]["image_embeds"], torch.cat(joined))
    assert torch.equal(whole["multi_modal_data"]["image"]["image_grid_thw"], own["image_grid_thw"])
    (uuid,) = cached["multi_modal_uuids"]["image"]
    file = load_file(tmp_path / "shared" / uuid / "encoder_cache.safetensors")
    assert torch.equal(file["ec_cache"], joined[0])
    assert torch.equal(cached["multi_modal_data"]["image"]["image_grid_thw"], own["image_grid_thw"][:1])
    assert [part["type"] for part in names["content"]] == ["image_embeds", "image_embeds", "text"]
    (request,) = requests
    assert request["input_ids"].count(IMAGE) == len(request["image_data"][0]["precomputed_embeddings"])
    assert torch.equal(names["items"]["cat.jpg"].tokens, cat.tokens)


@needs_pinned_transformers
@pytest.mark.parametrize("change", ["a size", "the order", "the tower"])
def test_a_mismatch_stops_the_snippet_before_anything_is_generated(change, monkeypatch):
    model = whole_model("qwen3_vl")
    enc = encoder_of(model)
    generated = []
    monkeypatch.setattr(model, "generate", lambda **arguments: generated.append(arguments))
    images = [noise(256, 256, 0), noise(300, 200, 1)]
    out = enc.encode(images)
    other = {"a size": [noise(320, 256, 0), images[1]], "the order": images[::-1], "the tower": images}[change]
    if change == "the tower":
        model.config.vision_config.depth = 3
    prompt = enc.encode(other)  # what the prompt is made for
    ids = [token for item in prompt for token in (VISION_START, *[IMAGE] * len(item.tokens), VISION_END)]
    with pytest.raises(ValueError, match=r"placeholders|depth"):
        out.check_receiver(model.config, torch.tensor([ids]))
    assert generated == []
