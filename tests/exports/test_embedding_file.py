"""`load_embeddings`: what `qwenvit encode` wrote, and nothing else."""

import json
import os

import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import qwenvit
from qwenvit import cli
from qwenvit.outputs import VideoTimes
from support.embeddings import embeddings, save_embeddings
from support.towers import SMALL


def same(found, expected):
    assert found.keys() == expected.keys()
    for name, item in expected.items():
        assert torch.equal(found[name].tokens, item.tokens)
        assert len(found[name].deepstack) == len(item.deepstack)
        assert all(map(torch.equal, found[name].deepstack, item.deepstack))
        for field in ("grid", "config", "is_video", "times"):
            assert getattr(found[name], field) == getattr(item, field)


@pytest.mark.filterwarnings("ignore:model='demo'")
@pytest.mark.parametrize("target", ["out.safetensors", "folder"])
def test_what_the_command_writes_is_loaded_and_exported(tmp_path, target, capsys):
    photos, target = tmp_path / "photos", tmp_path / target
    (photos / "trip").mkdir(parents=True)
    Image.linear_gradient("L").resize((320, 256)).convert("RGB").save(photos / "a.png")
    Image.radial_gradient("L").resize((256, 512)).save(photos / "trip" / "b.png")
    arguments = ["-m", "demo", "--device", "cpu", "--max-tokens", "40", "-o", str(target)]
    assert cli.main(["encode", str(photos), *arguments]) == 0
    names = ["a.png", "trip/b.png"]
    encoder = qwenvit.Encoder.from_pretrained("demo", device="cpu")
    expected = {name: encoder.encode(photos / name, max_tokens=40)[0] for name in names}
    items = qwenvit.load_embeddings(str(target))
    same(items, expected)
    item = items["trip/b.png"]
    assert torch.equal(item.spatial(), expected["trip/b.png"].spatial())
    assert item.to_vllm()["image"]["image_grid_thw"].tolist() == expected["trip/b.png"].grid_thw.tolist()


@pytest.mark.parametrize("family", SMALL)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_family_images_and_videos(tmp_path, family, dtype):
    images = embeddings(config=SMALL[family], dtype=dtype)
    times = VideoTimes((0.1, 1.3), 2 / 3)
    video = embeddings([(2, 4, 4)], SMALL[family], dtype, video=True, times=times)[0]
    unknown = embeddings([(1, 4, 4)], SMALL[family], dtype, video=True)[0]
    items = {"a": images[0], "b/c": images[1], "clip": video, "frames": unknown}
    save_embeddings(tmp_path / "all.safetensors", items)
    same(qwenvit.load_embeddings(tmp_path / "all.safetensors"), items)


def test_copies_on_the_cpu_keep_nothing_of_their_batch():
    item = embeddings()[1]
    copy = item.cpu()
    same({"": copy}, {"": item})
    for ours, theirs in zip([copy.tokens, *copy.deepstack], [item.tokens, *item.deepstack], strict=True):
        assert ours.untyped_storage().nbytes() == theirs.nbytes < theirs.untyped_storage().nbytes()


@pytest.mark.skipif(os.name != "posix", reason="named pipes")
def test_a_named_pipe_is_refused_without_waiting(tmp_path):
    os.mkfifo(tmp_path / "a.safetensors")
    for path in (tmp_path, tmp_path / "a.safetensors"):
        with pytest.raises(ValueError, match=r"a\.safetensors: expected .*a regular file, got a named pipe"):
            qwenvit.load_embeddings(path)


def test_metadata_that_means_two_things_is_refused(tmp_path):
    path = tmp_path / "a.safetensors"
    save_embeddings(path, {"a": embeddings()[0]})
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    grids = metadata["grids"].removesuffix("}") + ', "a": [1, 2, 2]}'
    save_file(load_file(path), path, metadata | {"grids": grids})
    with pytest.raises(ValueError, match=r"expected a file of `qwenvit encode`, .*'a' twice"):
        qwenvit.load_embeddings(path)


def test_other_files_are_refused(tmp_path):
    path = tmp_path / "a.safetensors"
    with pytest.raises(ValueError, match="expected a folder with files of embeddings, got none"):
        qwenvit.load_embeddings(tmp_path)
    with pytest.raises(FileNotFoundError):
        qwenvit.load_embeddings(path)
    tensors = {"a/tokens": torch.ones(4, 40)}
    for metadata in (None, {"grids": json.dumps({"a": [1, 2, 2]})}, {"grids": "broken"}):
        save_file(tensors, path, metadata)
        with pytest.raises(ValueError, match=r"a\.safetensors: expected a file of `qwenvit encode`"):
            qwenvit.load_embeddings(path)
    path.write_bytes(b"no safetensors")
    with pytest.raises(ValueError, match="expected a file of `qwenvit encode`"):
        qwenvit.load_embeddings(path)
    save_embeddings(path, {"a": embeddings()[0]})
    assert len(load_file(path)) == 4
    path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(ValueError, match="expected a file of `qwenvit encode`"):
        qwenvit.load_embeddings(path)
