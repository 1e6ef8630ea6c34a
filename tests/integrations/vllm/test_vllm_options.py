"""The plugin's options, and how they reach every process: with vLLM's `ModelConfig`."""

import pickle
from types import SimpleNamespace

import pytest

from qwenvit.integrations.vllm.options import Options, OptionsReader, options_of, read_options


def test_options_left_out_are_the_default_ones():
    assert read_options({}) == read_options({"qwenvit": {}}) == read_options({"other": 1}) == Options()
    assert Options() == Options(tower="auto", pixels=None, impl="auto")
    assert read_options(object()) == Options()  # vLLM lets platforms have a class of their own there


def test_options_are_read():
    given = {"tower": "attention", "pixels": False, "impl": "reference"}
    assert read_options({"qwenvit": given}) == Options("attention", False, "reference")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"towr": "auto"}, r"qwenvit: expected keys among \['tower', 'pixels', 'impl'\], got \['towr'\]"),
        ({"tower": "fast"}, r"qwenvit\.tower: expected one of \('auto', 'tower', 'attention'\), got 'fast'"),
        ({"tower": ["tower"]}, r"qwenvit\.tower: expected one of .*, got \['tower'\]"),
        ({"impl": None}, r"qwenvit\.impl: expected one of \('auto', 'triton', 'reference'\), got None"),
        ({"pixels": "yes"}, r"qwenvit\.pixels: expected true or false, got 'yes'"),
        ({"pixels": 1}, r"qwenvit\.pixels: expected true or false, got 1"),
        (True, r"qwenvit: expected an object with options, got True"),
    ],
)
def test_unknown_keys_and_values_are_refused(given, message):
    with pytest.raises(ValueError, match=f"additional_config: {message}"):
        read_options({"qwenvit": given})


def test_the_reader_keeps_options_with_the_model_config_and_calls_vllm_own_hook():
    vllm_config = SimpleNamespace(additional_config={"qwenvit": {"pixels": True}}, model_config=SimpleNamespace())
    seen = []
    vllm_own = SimpleNamespace(verify_and_update_config=seen.append, verify_and_update_model_config=seen.append)
    for own in (None, vllm_own):
        OptionsReader(own).verify_and_update_config(vllm_config)
        OptionsReader(own).verify_and_update_model_config(vllm_config.model_config)
        travelled = pickle.loads(pickle.dumps(vllm_config.model_config))
        assert options_of(travelled) == Options(pixels=True)
    assert seen == [vllm_config, vllm_config.model_config]
    assert options_of(SimpleNamespace()) == Options()
