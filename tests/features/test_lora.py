"""LoRA with peft on the reference tower, from an encoder to an adapter that any encoder merges."""

import peft
import pytest
import torch

from common.hf_towers import build_tower
from qwenvit.encoder import Encoder
from support.towers import narrow, ours_from, random_pixels

GRID = torch.tensor([[1, 4, 6], [1, 8, 4]])
ATTENTION = r"blocks\.\d+\.attn\.(qkv|proj|[qkv])"
WHOLE_BLOCKS = r"blocks\.\d+\.(attn|mlp)\.(qkv|proj|[qkv]|fc[12]|(gate|up|down)_proj)"


def with_adapter(enc, modules):
    torch.manual_seed(0)
    return peft.get_peft_model(enc.tower, peft.LoraConfig(r=4, target_modules=modules))


def load(folder, **options):
    return Encoder.from_pretrained(folder, device="cpu", impl="reference", **options)


def train(wrapped, enc, pixels, steps=8):
    """Train towards given tokens; return the loss of each step."""
    trained = [parameter for parameter in wrapped.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-2)
    goal = torch.randn(14, enc.config.out_hidden_size, generator=torch.Generator().manual_seed(1))
    losses = []
    for _ in range(steps):
        loss = (enc(pixels, GRID).pooler_output.float() - goal).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize(
    ("family", "whole_blocks", "checkpointing"),
    [
        ("qwen2_vl", True, False),
        ("qwen2_5_vl", False, True),
        ("qwen2_5_omni", True, False),
        ("qwen3_vl", False, False),
        ("qwen3_5", False, True),
    ],
)
def test_training_changes_only_the_adapter_which_any_encoder_merges(family, whole_blocks, checkpointing, tmp_path):
    config = narrow(family, depth=2)
    enc = Encoder(ours_from(build_tower(config), config))
    enc.save_pretrained(tmp_path / "base")
    before = {name: parameter.clone() for name, parameter in enc.tower.named_parameters()}
    pixels = random_pixels(56, config)
    tokens = enc(pixels, GRID).pooler_output

    wrapped = with_adapter(enc, WHOLE_BLOCKS if whole_blocks else ATTENTION)
    enc.tower.gradient_checkpointing = checkpointing
    assert torch.equal(enc(pixels, GRID).pooler_output, tokens)  # an adapter starts with no effect
    start = {name: parameter.clone() for name, parameter in wrapped.named_parameters()}
    losses = train(wrapped, enc, pixels)
    assert losses[-1] < 0.9 * losses[0]
    changed = {name for name, parameter in wrapped.named_parameters() if not torch.equal(parameter, start[name])}
    assert changed == {name for name in start if ".lora_" in name}
    assert {name.split("blocks.")[1][0] for name in changed} == {"0", "1"}
    assert any(".mlp." in name for name in changed) == whole_blocks
    kept = {name.replace(".base_layer", ""): parameter for name, parameter in enc.tower.named_parameters()}
    assert all(torch.equal(kept[name], parameter) for name, parameter in before.items())

    wrapped.save_pretrained(tmp_path / "adapter")
    merged = load(tmp_path / "base", adapter=tmp_path / "adapter")
    trained = enc(pixels, GRID).pooler_output
    assert (trained - tokens).norm() > 0.1 * tokens.norm()
    torch.testing.assert_close(merged(pixels, GRID).pooler_output, trained, rtol=1e-4, atol=1e-4)
    wrapped.merge_and_unload()
    assert torch.equal(merged(pixels, GRID).pooler_output, enc(pixels, GRID).pooler_output)


def test_a_tower_with_a_merged_adapter_is_saved_whole(tmp_path):
    """Also where the names of its modules are not the checkpoints', which peft's file needs."""
    config = narrow("qwen3_vl", depth=2)
    enc = Encoder(ours_from(build_tower(config), config))
    enc.save_pretrained(tmp_path / "base")
    pixels = random_pixels(56, config)
    wrapped = with_adapter(enc, WHOLE_BLOCKS)
    train(wrapped, enc, pixels)
    wrapped.save_pretrained(tmp_path / "adapter")
    with pytest.raises(ValueError, match=r"blocks\.0\.mlp\.fc1: .* has no such module"):
        load(tmp_path / "base", adapter=tmp_path / "adapter")
    wrapped.merge_and_unload()
    enc.save_pretrained(tmp_path / "trained")
    assert torch.equal(load(tmp_path / "trained")(pixels, GRID).pooler_output, enc(pixels, GRID).pooler_output)


def test_an_adapter_in_fp32_on_a_tower_of_16_bits():
    config = narrow("qwen3_vl", depth=2)
    enc = Encoder(ours_from(build_tower(config, dtype=torch.bfloat16), config))
    wrapped = with_adapter(enc, WHOLE_BLOCKS)
    pixels = random_pixels(56, config)
    losses = train(wrapped, enc, pixels)
    assert losses[-1] < 0.9 * losses[0]
    assert enc(pixels, GRID).pooler_output.dtype == torch.bfloat16
    assert {parameter.dtype for name, parameter in wrapped.named_parameters() if ".lora_" in name} == {torch.float32}
