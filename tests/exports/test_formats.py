"""The formats of vLLM and SGLang, read by readers that know nothing of qwenvit."""

import base64
import io
import json

import numpy as np
import pytest
import torch
from safetensors import safe_open

from qwenvit.outputs import Embeddings, VideoTimes
from support.embeddings import embeddings
from support.towers import SMALL

TIMES = VideoTimes((0.25, 1.25, 2.125), 0.9)
GRIDS = [(1, 4, 6), (1, 8, 4)]


def joined(item):
    return torch.cat([item.tokens, *item.deepstack], dim=1)


def clip(family, **options):
    return embeddings([(3, 4, 6)], SMALL[family], video=True, **options)


@pytest.mark.parametrize("family", SMALL)
def test_vllm_fields(family):
    images = embeddings(GRIDS, SMALL[family])
    data = images.to_vllm()
    assert data.keys() == {"image"}
    assert data["image"].keys() == {"image_embeds", "image_grid_thw"}
    levels = 3 if family in ("qwen3_vl", "qwen3_omni") else 0
    assert data["image"]["image_embeds"].shape == (14, 40 * (1 + levels))
    assert torch.equal(data["image"]["image_embeds"], torch.cat([joined(item) for item in images]))
    assert torch.equal(data["image"]["image_grid_thw"], torch.tensor(GRIDS))
    assert torch.equal(images[1].to_vllm()["image"]["image_embeds"], joined(images[1]))
    assert torch.equal(images[1].to_vllm()["image"]["image_grid_thw"], torch.tensor(GRIDS[1:]))


def test_the_times_of_videos_are_what_each_family_needs():
    text, seconds = {"timestamps": [[0.25, 1.25, 2.125]]}, {"second_per_grid_ts": [0.9]}
    expected = {"qwen2_vl": {}, "qwen2_5_vl": seconds, "qwen2_5_omni": seconds, "qwen3_omni": seconds}
    expected |= {"qwen3_vl": text, "qwen3_5": text}
    for family, fields in expected.items():
        video = clip(family, times=TIMES)
        (found,) = video.to_vllm().values()
        assert torch.equal(found.pop("video_embeds"), joined(video[0]))
        assert found.pop("video_grid_thw").tolist() == [[3, 4, 6]]
        assert found.keys() == fields.keys()
        for name, value in fields.items():
            torch.testing.assert_close(torch.as_tensor(found[name]), torch.tensor(value))
        ((sglang,),) = video.to_sglang().values()
        assert sglang.get("second_per_grid_ts") == fields.get("second_per_grid_ts")


@pytest.mark.parametrize("export", ["to_vllm", "to_vllm_message", "to_sglang"])
def test_a_video_without_the_times_that_its_family_needs_is_refused(export):
    for family in SMALL:
        needed = family != "qwen2_vl" and (export != "to_sglang" or family not in ("qwen3_vl", "qwen3_5"))
        if needed:
            with pytest.raises(ValueError, match=r"video 0: expected times.*encode a video file, or pass frame_times"):
                getattr(clip(family), export)()
        else:
            getattr(clip(family), export)()


def test_images_and_several_videos_at_once():
    images, first = embeddings(GRIDS, SMALL["qwen3_vl"]), clip("qwen3_vl", times=TIMES)
    second = embeddings([(1, 6, 6)], SMALL["qwen3_vl"], video=True, times=VideoTimes((0.0,), 1.0))
    data = Embeddings.concatenate([images, first, second]).to_vllm()
    assert torch.equal(data["image"]["image_embeds"], images.to_vllm()["image"]["image_embeds"])
    assert torch.equal(data["video"]["video_embeds"], torch.cat([joined(first[0]), joined(second[0])]))
    assert data["video"]["video_grid_thw"].tolist() == [[3, 4, 6], [1, 6, 6]]
    assert data["video"]["timestamps"] == [[0.25, 1.25, 2.125], [0.0]]
    data = Embeddings.concatenate([images, clip("qwen3_vl")]).to_sglang()
    assert data.keys() == {"image_data", "video_data"}
    positions = Embeddings.concatenate([embeddings(GRIDS, SMALL["qwen2_5_vl"]), clip("qwen2_5_vl", times=TIMES)])
    assert [fields["second_per_grid_ts"] for (fields,) in positions.to_sglang().values()] == [[0.9]] * 2
    with pytest.raises(ValueError, match="one tower"):
        Embeddings.concatenate([images, embeddings(config=SMALL["qwen3_5"])])


def decoded(text):
    """Decode as a server does, but for bf16 without any pickle."""
    data = base64.b64decode(text, validate=True)
    if data[:6] == b"\x93NUMPY":
        return torch.from_numpy(np.load(io.BytesIO(data), allow_pickle=False))
    return torch.load(io.BytesIO(data), weights_only=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_content_parts(dtype):
    images = embeddings(GRIDS, dtype=dtype)
    parts = json.loads(json.dumps(images.to_vllm_message()))
    assert [part["type"] for part in parts] == ["image_embeds", "image_embeds"]
    for part, item, grid in zip(parts, images, GRIDS, strict=True):
        assert part["image_embeds"].keys() == {"image_embeds", "image_grid_thw"}
        is_npy = base64.b64decode(part["image_embeds"]["image_embeds"]).startswith(b"\x93NUMPY")
        assert is_npy == (dtype != torch.bfloat16)
        tokens = decoded(part["image_embeds"]["image_embeds"])
        assert tokens.dtype == dtype
        assert torch.equal(tokens, joined(item))
        assert decoded(part["image_embeds"]["image_grid_thw"]).tolist() == list(grid)
        # Not the memory of the whole batch, of which an item is a view.
        size = len(base64.b64decode(part["image_embeds"]["image_embeds"]))
        assert size < tokens.nbytes + 2048


def test_content_parts_of_videos():
    (part,) = json.loads(json.dumps(clip("qwen3_vl", times=TIMES).to_vllm_message()))
    fields = {name: decoded(value) for name, value in part["video_embeds"].items()}
    assert part["type"] == "video_embeds"
    assert fields.keys() == {"video_embeds", "video_grid_thw", "timestamps"}
    assert fields["video_grid_thw"].tolist() == [3, 4, 6]
    assert fields["timestamps"].tolist() == [0.25, 1.25, 2.125]
    (part,) = clip("qwen2_5_vl", times=TIMES).to_vllm_message()
    assert decoded(part["video_embeds"]["second_per_grid_ts"]).item() == pytest.approx(0.9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_files_of_vllms_encoder_cache(tmp_path, dtype):
    item = embeddings(GRIDS, dtype=dtype)[1]
    path = item.save_vllm_cache(tmp_path / "shared", "cat-1")
    assert path == tmp_path / "shared" / "cat-1" / "encoder_cache.safetensors"
    with safe_open(path, "pt") as file:
        assert list(file.keys()) == ["ec_cache"]
        assert torch.equal(file.get_tensor("ec_cache"), joined(item))
    other = embeddings(GRIDS, dtype=dtype)[0]
    other.save_vllm_cache(tmp_path / "shared", "cat-1")
    with safe_open(path, "pt") as file:
        assert torch.equal(file.get_tensor("ec_cache"), joined(other))
    assert [file.name for file in path.parent.iterdir()] == ["encoder_cache.safetensors"]


def test_an_interrupted_write_leaves_the_old_file(tmp_path, monkeypatch):
    item = embeddings(GRIDS)[1]
    path = item.save_vllm_cache(tmp_path, "cat")
    before = path.read_bytes()

    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr("os.replace", fail)
    with pytest.raises(OSError, match="disk full"):
        embeddings(GRIDS)[0].save_vllm_cache(tmp_path, "cat")
    assert path.read_bytes() == before
    assert len(list(path.parent.iterdir())) == 1


@pytest.mark.parametrize("uuid", ["", ".", "..", "a/b", "/a", "a\\b", "a\0", 3, None])
def test_a_uuid_that_is_no_name_of_a_folder(tmp_path, uuid):
    with pytest.raises(ValueError, match="uuid: expected the name of a folder"):
        embeddings(GRIDS)[0].save_vllm_cache(tmp_path / "shared", uuid)
    assert not (tmp_path / "shared").exists()


@pytest.mark.parametrize("family", ["qwen2_5_vl", "qwen3_vl"])
def test_sglang_fields(family):
    """As `collect_mm_items_from_processor_output` of SGLang 0.5.23 reads them."""
    images, video = embeddings(GRIDS, SMALL[family]), clip(family, times=TIMES)
    ((fields,),) = images.to_sglang().values()
    assert fields.keys() == {"format", "modality", "precomputed_embeddings", "image_grid_thw"}
    assert (fields["format"], fields["modality"]) == ("processor_output", "IMAGE")
    assert torch.equal(fields["precomputed_embeddings"], torch.cat([joined(item) for item in images]))
    assert fields["image_grid_thw"].tolist() == [list(grid) for grid in GRIDS]
    ((fields,),) = video.to_sglang().values()
    assert fields["modality"] == "VIDEO"
    assert torch.equal(fields["precomputed_embeddings"], joined(video[0]))
    assert fields["video_grid_thw"].tolist() == [[3, 4, 6]]
