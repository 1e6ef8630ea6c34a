import json
import os
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file

from qwenvit.weights.index import parse_index, read_index
from qwenvit.weights.local import find_tensors

INDEX = "model.safetensors.index.json"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "expected JSON"),
        ("[]", "expected a JSON object, got list"),
        ("{}", "weight_map: expected an object with the file of each tensor, got none"),
        ('{"weight_map": {}}', "weight_map: expected .*, got {}"),
        ('{"weight_map": ["a"]}', r"weight_map: expected .*, got \['a'\]"),
        ('{"weight_map": {"a": 1}}', "weight_map: 'a': expected the name of a file beside it, got '1'"),
        ('{"weight_map": {"a": "1.safetensors", "a": "2.safetensors"}}', ".*each key of an object once, got 'a' twice"),
    ],
)
def test_what_is_no_index_is_refused(tmp_path, text, message):
    (tmp_path / INDEX).write_text(text)
    with pytest.raises(ValueError, match=f"^{re.escape(str(tmp_path / INDEX))}: {message}"):
        read_index(tmp_path / INDEX)


PARTS = st.sampled_from(["", ".", "..", "a", "a.safetensors", "C:", "~"])


@given(
    shard=st.lists(PARTS, min_size=2, max_size=4).flatmap(
        lambda parts: st.sampled_from("/\\\0:").map(lambda s: s.join(parts))
    )
    | st.sampled_from(["", ".", ".."])
)
def test_names_with_folders_are_refused(tmp_path_factory, shard):
    with pytest.raises(ValueError, match=r"'visual\.a': expected the name of a file beside it"):
        parse_index({"weight_map": {"lm_head": "b.safetensors", "visual.a": shard}}, tmp_path_factory.getbasetemp())


def test_no_index_reaches_a_tower_elsewhere(tmp_path, qwen3):
    model, other = tmp_path / "model", tmp_path / "other"
    model.mkdir(), other.mkdir()
    tensors = qwen3.composite()
    save_file(tensors, other / "x.safetensors")
    for shard in (str(other / "x.safetensors"), "../other/x.safetensors"):
        (model / INDEX).write_text(json.dumps({"weight_map": dict.fromkeys(tensors, shard)}))
        with pytest.raises(ValueError, match=re.escape(f"file beside it, got {shard!r}")):
            find_tensors(model)
    # A link is the owner's own: so are files in the Hub's cache.
    (model / "x.safetensors").symlink_to(other / "x.safetensors")
    (model / INDEX).write_text(json.dumps({"weight_map": dict.fromkeys(tensors, "x.safetensors")}))
    assert len(find_tensors(model)) == len(qwen3.state)


@pytest.mark.skipif(os.name != "posix", reason="named pipes and devices")
@pytest.mark.parametrize("kind", ["named pipe", "device", "folder"])
@pytest.mark.parametrize("name", [INDEX, "shard.safetensors"])
def test_files_of_other_kinds_are_refused_without_waiting(tmp_path, qwen3, kind, name):
    tensors = qwen3.composite()
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": dict.fromkeys(tensors, "shard.safetensors")}))
    save_file(tensors, tmp_path / "shard.safetensors")
    (tmp_path / name).unlink()
    match kind:
        case "named pipe":
            os.mkfifo(tmp_path / name)
        case "device":
            (tmp_path / name).symlink_to("/dev/zero")
        case "folder":
            (tmp_path / name).mkdir()
    with pytest.raises(ValueError, match=f"{name}: expected a regular file, got a {kind}"):
        find_tensors(tmp_path)


@pytest.mark.skipif(os.name != "posix", reason="named pipes")
@pytest.mark.parametrize("make", [os.mkfifo, lambda path: path.symlink_to("absent")])
def test_a_file_that_cannot_be_read_is_not_passed_over_for_another(tmp_path, qwen3, make):
    save_file(qwen3.composite(), tmp_path / "model.safetensors")
    make(tmp_path / "model_visual.safetensors")
    with pytest.raises((ValueError, FileNotFoundError), match=r"model_visual\.safetensors"):
        find_tensors(tmp_path)
