"""An adapter's files: absent, damaged, of another kind, or with others beside them that it needs."""

import os
import shutil
from types import NoneType

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from qwenvit.weights.adapters.adapter import (
    ADAPTER_CONFIG,
    ADAPTER_FILE,
    OTHER_WEIGHTS,
    PICKLE_FILE,
    adapter_alone_error,
    read_adapter,
    refuse_other_weights,
)
from support.tiny_adapters import base_model, configure, merged_by_us, wrap

FAMILY = "qwen3_vl"


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved")
    targets = ["blocks.0.attn.qkv", "pos_embed", "patch_embed.proj", "layers.0.self_attn.q_proj"]
    wrap(base_model(FAMILY), target_modules=targets, modules_to_save=["merger"], r=3).save_pretrained(folder)
    return folder


@pytest.fixture
def adapter(saved, tmp_path):
    """The folder of an adapter, to be changed."""
    return shutil.copytree(saved, tmp_path / "adapter")


def test_no_config(adapter):
    (adapter / ADAPTER_CONFIG).unlink()
    with pytest.raises(FileNotFoundError, match=f"adapter: .* got no {ADAPTER_CONFIG}"):
        read_adapter(adapter)


def test_no_weights(adapter):
    (adapter / ADAPTER_FILE).unlink()
    with pytest.raises(FileNotFoundError, match=f"expected {ADAPTER_FILE} beside"):
        read_adapter(adapter)


def test_a_pickle(adapter):
    (adapter / ADAPTER_FILE).unlink()
    (adapter / PICKLE_FILE).write_bytes(b"")
    with pytest.raises(ValueError, match="pickle"):
        read_adapter(adapter)


@pytest.mark.parametrize("keep", [0, 4, 200, -1])
def test_a_truncated_file(adapter, keep):
    file = adapter / ADAPTER_FILE
    file.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(ValueError, match=ADAPTER_FILE):
        read_adapter(adapter)


@pytest.mark.parametrize("name", [ADAPTER_CONFIG, ADAPTER_FILE])
def test_a_pipe(adapter, name):
    (adapter / name).unlink()
    os.mkfifo(adapter / name)
    with pytest.raises(ValueError, match="named pipe"):
        read_adapter(adapter)


@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=150)
@given(name=st.sampled_from([ADAPTER_CONFIG, ADAPTER_FILE]), place=st.integers(0, 2500), byte=st.integers(0, 255))
def test_any_damaged_byte_is_harmless_or_refused(adapter, name, place, byte):
    sound, refusal = (adapter / name).read_bytes(), None
    place %= len(sound)
    (adapter / name).write_bytes(sound[:place] + bytes([byte]) + sound[place + 1 :])
    try:
        merged_by_us(read_adapter(adapter), FAMILY, base_model(FAMILY))
    except ValueError as error:
        refusal = error
    finally:
        (adapter / name).write_bytes(sound)
    assert type(refusal) in (NoneType, ValueError)  # UnicodeError and the like do not name the file
    assert refusal is None or str(adapter) in str(refusal)


@pytest.mark.parametrize("name", OTHER_WEIGHTS)
def test_weights_that_other_trainers_put_beside_it(adapter, name):
    (adapter / name).write_bytes(b"")
    with pytest.raises(ValueError, match=f"{name} beside the adapter has weights that were trained in full"):
        read_adapter(adapter)
    with pytest.raises(ValueError, match=f"org/adapter: {name}"):
        refuse_other_weights("org/adapter", ["README.md", name])


def test_an_adapter_alone_says_how_to_load_it(adapter):
    configure(adapter, base_model_name_or_path="Qwen/Qwen3-VL-2B-Instruct")
    error = str(adapter_alone_error(adapter))
    assert f"from_pretrained('Qwen/Qwen3-VL-2B-Instruct', adapter={str(adapter)!r})" in error
    assert "base_model_name_or_path" in error
    configure(adapter, base_model_name_or_path=None)
    assert "from_pretrained(base, adapter=" in str(adapter_alone_error(adapter))
