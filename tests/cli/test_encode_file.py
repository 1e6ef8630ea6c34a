"""`qwenvit encode` into one file: never in the place of more or of something else, and whole or not at all."""

import errno

import pytest
import torch
from safetensors.torch import load_file

import qwenvit
from qwenvit.cli import single_file
from qwenvit.datasets import image_batches
from support.encode_command import run

pytestmark = pytest.mark.filterwarnings("ignore:model='demo'")


def test_a_file_with_fewer_images_never_replaces_one_with_more(capsys, photos, tmp_path):
    target = tmp_path / "out.safetensors"
    run(capsys, photos, "-o", target)
    before = target.read_bytes()
    code, out, err = run(capsys, photos / "0.png", "-o", target)
    assert (code, out) == (1, "")
    assert "has 5 images, and the inputs are 1" in err
    (photos / "3.png").write_bytes(b"broken")
    code, out, _ = run(capsys, photos, "-o", target)
    assert code == 1
    assert "4 of 5 images -> " in out
    assert target.read_bytes() == before
    assert len(qwenvit.load_embeddings(tmp_path / "out.incomplete.safetensors")) == 4
    code, _, _ = run(capsys, photos / "0.png", "-o", target, "--overwrite")
    assert code == 0
    assert list(qwenvit.load_embeddings(target)) == ["0.png"]
    assert sorted(one.name for one in tmp_path.iterdir()) == ["out.incomplete.safetensors", "out.safetensors", "photos"]


def test_a_file_of_something_else_is_not_replaced(capsys, photos, tmp_path):
    target = tmp_path / "model.safetensors"
    for content in (b"", b"something", (8).to_bytes(8, "little") + b"{}      "):
        target.write_bytes(content)
        code, _, err = run(capsys, photos, "-o", target)
        assert code == 1
        assert "is no file of embeddings" in err
        assert target.read_bytes() == content


def test_more_than_a_handful_of_images_go_into_one_file_in_batches(capsys, photos, tmp_path, monkeypatch):
    run(capsys, photos, "-o", tmp_path / "one.safetensors")
    monkeypatch.setattr(single_file, "HANDFUL", 2)
    (photos / "3.png").write_bytes(b"broken")
    code, _, err = run(capsys, photos, "-o", tmp_path / "batches.safetensors")
    assert code == 1
    assert "error: 3.png: " in err
    alone, batches = (load_file(tmp_path / f"{name}.safetensors") for name in ("one", "batches"))
    assert batches.keys() == {name for name in alone if not name.startswith("3.png")}
    assert all(torch.equal(batches[name], alone[name]) for name in batches)


@pytest.mark.parametrize("error", [OverflowError, MemoryError, torch.OutOfMemoryError])
def test_a_batch_that_is_too_much_for_one_file_is_encoded_one_by_one(capsys, photos, tmp_path, monkeypatch, error):
    monkeypatch.setattr(single_file, "HANDFUL", 2)
    stream, encode, alone = image_batches.encode_stream, qwenvit.Encoder.encode, []

    def too_much(encoder, items, *arguments, **options):
        drawn = list(items)
        yield next(stream(encoder, drawn[:1], *arguments, **options))
        raise error("too much")

    def one(self, image, **options):
        alone.append(image)
        if str(image).endswith("3.png"):
            raise error("too much")
        return encode(self, image, **options)

    monkeypatch.setattr(image_batches, "encode_stream", too_much)
    monkeypatch.setattr(qwenvit.Encoder, "encode", one)
    code, _, err = run(capsys, photos, "-o", tmp_path / "out.safetensors")
    assert code == 1
    assert "error: 3.png: too much" in err
    assert len(qwenvit.load_embeddings(tmp_path / "out.safetensors")) == 4
    assert alone


def test_a_full_disk_leaves_the_file_that_was_there_and_nothing_beside_it(capsys, photos, tmp_path, monkeypatch):
    target = tmp_path / "out.safetensors"
    run(capsys, photos, "-o", target)
    before, open_writer = target.read_bytes(), single_file.open_writer

    def fill(*arguments):
        writer, added = open_writer(*arguments), []
        add = writer.add

        def add_three(item):
            added.append(item)
            if len(added) > 3:
                raise OSError(errno.ENOSPC, "No space left on device")
            add(item)

        monkeypatch.setattr(writer, "add", add_three)
        return writer

    monkeypatch.setattr(single_file, "open_writer", fill)
    code, _, err = run(capsys, photos, "-o", target)
    assert code == 1
    assert "qwenvit: error: [Errno 28] No space left on device" in err
    assert target.read_bytes() == before
    assert sorted(one.name for one in tmp_path.iterdir()) == ["out.safetensors", "photos"]


def test_a_file_that_cannot_be_made_is_known_before_the_model_is_loaded(capsys, photos, tmp_path, monkeypatch):
    monkeypatch.setattr(single_file, "load", lambda _: pytest.fail("loaded"))
    (tmp_path / "file").touch()
    for target in (tmp_path / "file" / "out.safetensors", tmp_path / f"{'x' * 300}" / "out.safetensors"):
        code, out, err = run(capsys, photos, "-o", target)
        assert (code, out) == (1, "")
        assert "qwenvit: error: " in err
