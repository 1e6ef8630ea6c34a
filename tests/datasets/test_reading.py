"""The reading examples of `qwenvit/datasets/formats/README.md`, on what a job wrote."""

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from qwenvit.datasets.job import encode_dataset
from support.demo import demo_encoder

PAGE = (Path(__file__).parents[2] / "qwenvit/datasets/formats/README.md").read_text()
SNIPPETS = re.findall(r"^```python\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)


def picture(index):
    return np.random.default_rng(index).integers(0, 256, (40 + 20 * index, 96, 3), dtype=np.uint8)


@pytest.fixture
def demo():
    return demo_encoder(dtype="bfloat16")


def test_the_snippets_find_what_the_encoder_returns(demo, tmp_path, monkeypatch, capsys):
    pytest.importorskip("datasets.config", reason="needs datasets")  # `datasets` alone is also this folder's name
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / "cache"))
    names = ["a.png", "cat.png", "copy of cat.png", "d.png", "e.png", "f.png"]
    (tmp_path / "photos").mkdir()
    for index, name in enumerate(names):
        Image.fromarray(picture(1 if "cat" in name else index)).save(tmp_path / "photos" / name)
    options = {"model": demo, "min_pixels": 4096, "shard_images": 4}
    encode_dataset("photos", "vectors", format="npy", pool="mean", tokens=False, **options)
    encode_dataset("photos", "tokens", **options)
    encode_dataset("photos", "out", format="parquet", pool="patches", **options)
    alone = [demo.encode(tmp_path / "photos" / name, min_pixels=4096, keep_patches=True) for name in names]
    cat = alone[1]

    found = {}
    assert len(SNIPPETS) == 4
    exec(SNIPPETS[0], found)
    expected = torch.cat([one.pooled("mean", normalize=True) for one in alone]).numpy()
    order = [found["ids"].index(name) for name in names]
    np.testing.assert_allclose(found["vectors"][order], expected, rtol=1e-5, atol=1e-6)
    assert {found["ids"][row] for row in found["nearest"][:2]} == {"cat.png", "copy of cat.png"}
    assert "copy of cat.png" in capsys.readouterr().out

    exec(SNIPPETS[1], found)
    ids = found["table"]["id"].to_pylist()
    for name, one in zip(names, alone, strict=True):
        assert np.array_equal(found["vectors"][ids.index(name)], one.pooled("patches")[0].numpy())

    exec(SNIPPETS[2], found)
    assert torch.equal(found["tokens"], cat.packed)
    assert (found["frames"], found["rows"], found["columns"]) == cat[0].grid
    assert torch.equal(found["item"].spatial(), cat[0].spatial())

    exec(SNIPPETS[3], found)
    assert found["tokens"].dtype == torch.bfloat16
    assert torch.equal(found["tokens"], cat.packed)
    assert len(found["rows"]) == len(names)
