"""Settings of `adapter_config.json` that would change what is merged, or that nobody knows, are refused by name."""

import shutil

import pytest

from qwenvit.weights.adapters.adapter import ADAPTER_CONFIG, read_adapter
from support.tiny_adapters import base_model, configure, wrap


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved")
    wrap(base_model("qwen3_vl"), target_modules=["blocks.0.attn.qkv"], r=3).save_pretrained(folder)
    return folder


@pytest.fixture
def adapter(saved, tmp_path):
    """The folder of an adapter, to be changed."""
    return shutil.copytree(saved, tmp_path / "adapter")


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("use_dora", True),
        ("use_qalora", True),
        ("layer_replication", [[0, 4], [2, 6]]),
        ("alora_invocation_tokens", [1, 2]),
        ("velora_config", {"rank": 1}),
        ("monteclora_config", {"n": 2}),
        ("use_bdlora", {"n": 2}),
        ("arrow_config", {"top_k": 2}),
        ("kasa_config", {"beta": 1.0}),
        ("megatron_config", {"a": 1}),
        ("setting_of_tomorrow", 3),
        ("init_lora_weights", "pissa"),
        ("init_lora_weights", "pissa_niter_4"),
        ("init_lora_weights", "olora"),
        ("init_lora_weights", "corda"),
        ("init_lora_weights", "loftq"),
        ("init_lora_weights", "mica"),
        ("init_lora_weights", 1),
        ("peft_type", "LOHA"),
        ("peft_type", None),
        ("peft_type", ["LORA"]),
        ("bias", "some"),
        ("bias", ["none"]),
        ("lora_bias", "yes"),
        ("use_rslora", 1),
        ("r", 0),
        ("r", None),
        ("r", 2.0),
        ("r", True),
        ("r", "3"),
        ("lora_alpha", None),
        ("lora_alpha", "16"),
        ("lora_alpha", False),
        ("rank_pattern", [1]),
        ("rank_pattern", {"qkv": 1.5}),
        ("rank_pattern", {"qkv": -1}),
        ("alpha_pattern", {"qkv": None}),
        ("modules_to_save", "merger"),
        ("modules_to_save", [1]),
        ("modules_to_save", ["x"] * 2001),
        ("target_parameters", {"a": 1}),
    ],
)
def test_a_setting_is_refused_by_name(adapter, key, value):
    configure(adapter, **{key: value})
    with pytest.raises(ValueError, match=f"{ADAPTER_CONFIG}: {key}"):
        read_adapter(adapter)


@pytest.mark.parametrize("value", [None, False, [], {}, ""])
def test_an_unknown_setting_that_is_off_is_no_matter(adapter, value):
    configure(adapter, setting_of_tomorrow=value)
    read_adapter(adapter)


@pytest.mark.parametrize("start", [True, False, "gaussian", "eva", "orthogonal"])
def test_initialisations_that_leave_the_base_as_it_is(adapter, start):
    configure(adapter, init_lora_weights=start)
    read_adapter(adapter)


@pytest.mark.parametrize("text", ["[]", "{", "\ufeff{}", '{"r": 1, "r": 2}', '{"lora_alpha": NaN}'])
def test_a_config_that_is_no_object_in_json(adapter, text):
    (adapter / ADAPTER_CONFIG).write_text(text)
    with pytest.raises(ValueError, match=ADAPTER_CONFIG):
        read_adapter(adapter)
