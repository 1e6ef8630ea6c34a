"""Checkpoints in formats that are not read are named as what they are, with what to do."""

import re

import pytest
import torch
from safetensors.torch import save_file

from qwenvit.weights.formats import quantisation_of, refuse_other_format
from qwenvit.weights.local import CheckpointError, find_tensors, load_tensors

SINGLE = "model.safetensors"
QKV = "blocks.0.attn.qkv"
U8, I8, I32, U32 = torch.uint8, torch.int8, torch.int32, torch.uint32

# What each library saves for one linear layer instead of `weight`, by parameter.
QUANTISED = {
    "AWQ": {"qweight": (16, I32), "qzeros": (2, I32), "scales": (4, torch.float16)},
    "GPTQ": {"qweight": (16, I32), "qzeros": (2, I32), "scales": (4, torch.float16), "g_idx": (16, I32)},
    "FP8": {"weight": (16, torch.float8_e4m3fn), "weight_scale_inv": (1, torch.float32)},
    "bitsandbytes in 4 bits": {
        "weight": (16, U8),
        "weight.absmax": (4, U8),
        "weight.quant_map": (16, torch.float32),
        "weight.nested_absmax": (1, torch.float32),
        "weight.quant_state.bitsandbytes__nf4": (64, U8),
    },
    "bitsandbytes in 8 bits": {"weight": (16, I8), "SCB": (4, torch.float32), "weight_format": (1, U8)},
    "compressed-tensors": {
        "weight_packed": (16, I32),
        "weight_scale": (4, torch.bfloat16),
        "weight_shape": (2, torch.int64),
    },
    "MLX": {"weight": (16, U32), "scales": (4, torch.bfloat16), "biases": (4, torch.bfloat16)},
    "integers (I8)": {"weight": (16, I8)},
}


@pytest.mark.parametrize("kind", QUANTISED)
def test_a_quantised_tower_is_named(tmp_path, tower, kind):
    module = f"{tower.prefix}blocks.0.attn.proj"
    tensors = {name: tensor for name, tensor in tower.composite().items() if name != f"{module}.weight"}
    tensors |= {f"{module}.{name}": torch.zeros(size).to(dtype) for name, (size, dtype) in QUANTISED[kind].items()}
    save_file(tensors, tmp_path / SINGLE)
    with pytest.raises(CheckpointError, match=rf"weights are quantised: .*{re.escape(kind)}") as error:
        load_tensors(find_tensors(tmp_path), tower.expected, family=tower.family)
    assert "use the unquantised checkpoint" in str(error.value)
    assert module in str(error.value)


def test_plain_towers_are_not_called_quantised(tower):
    for dtype in ("F32", "F16", "BF16", "F64"):
        assert quantisation_of(dict.fromkeys(tower.state, dtype)) is None
    assert quantisation_of({}) is None


@pytest.mark.parametrize("name", ["mmproj-F16.gguf", SINGLE])
def test_gguf_is_named(tmp_path, name):
    file = tmp_path / name
    file.write_bytes(b"GGUF" + (3).to_bytes(4, "little") + (400).to_bytes(8, "little") + bytes(100))
    for path in (file, tmp_path):
        with pytest.raises(ValueError, match=r"this is GGUF.*use the safetensors checkpoint"):
            find_tensors(path)


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("name", ["pytorch_model.bin", SINGLE])
def test_a_pickle_is_named_whatever_it_is_called(tmp_path, zipped, name):
    torch.save({"x": torch.ones(2)}, tmp_path / name, _use_new_zipfile_serialization=zipped)
    for path in (tmp_path / name, tmp_path):
        with pytest.raises(ValueError, match=rf"only safetensors files are read.*{re.escape(name)}.*convert it"):
            find_tensors(path)


def test_a_pointer_of_git_lfs_is_named(tmp_path):
    pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{'0' * 64}\nsize 4\n"
    (tmp_path / SINGLE).write_text(pointer)
    with pytest.raises(ValueError, match=r"a pointer of Git LFS.*git lfs pull"):
        find_tensors(tmp_path)


def test_pickles_and_gguf_beside_a_safetensors_checkpoint_do_not_matter(tmp_path, qwen3):
    save_file(qwen3.composite(), tmp_path / SINGLE)
    (tmp_path / "pytorch_model.bin").write_bytes(b"PK\x03\x04")
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    assert len(find_tensors(tmp_path)) == len(qwen3.state)


@pytest.mark.parametrize("length", [0x0280, 0x0380, 0x0480, 0x04034B50 & 0xFFFF, 8, 2])
def test_the_length_of_a_header_is_not_taken_for_another_format(tmp_path, length):
    (tmp_path / SINGLE).write_bytes(length.to_bytes(8, "little") + b"{}".ljust(length))
    refuse_other_format(tmp_path / SINGLE)
