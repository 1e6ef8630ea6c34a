"""Jobs on a GPU: their rows are what the encoder returns, to the last bit, while copies and writing overlap with it."""

import time

import pytest
import torch
from safetensors.torch import load_file

from qwenvit import encode_dataset, load_embeddings
from qwenvit import item_stream as item_stream_module
from qwenvit.datasets import shard_stream
from support.jobs import make_pictures, rows_of
from support.towers import fast_encoder_on_gpu, narrow

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
OPTIONS = {"min_pixels": 4096}
"""Small images stay small."""


@pytest.fixture(scope="module")
def encoder():
    """Return an encoder with the fast tower of two blocks and DeepStack, in bfloat16."""
    config = narrow("qwen3_vl", depth=2, out_hidden_size=256)
    return fast_encoder_on_gpu(config)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    return make_pictures(tmp_path_factory.mktemp("gpu") / "pictures", 60)


def check(encoder, pictures, output, pool):
    """Compare every row with the encoder's own result for its picture alone."""
    found = load_embeddings(output)
    vectors = {name: row["pooled"] for name, row in rows_of(output).items()}
    assert len(found) == len(vectors) == 60
    for name, item in found.items():
        alone = encoder.encode(pictures / name, keep_patches=True, **OPTIONS)
        assert torch.equal(item.tokens, alone[0].tokens.cpu()), name
        assert all(map(torch.equal, item.deepstack, (layer.cpu() for layer in alone[0].deepstack))), name
        assert vectors[name] == alone.pooled(pool).cpu().numpy().tobytes(), name


@pytest.mark.parametrize("pool", ["mean", "patches"])
def test_rows_are_what_the_encoder_returns(encoder, pictures, tmp_path, monkeypatch, pool):
    """With small batches, and a writer that is slower than the device."""
    monkeypatch.setattr(item_stream_module, "PATCHES_PER_BATCH", 100)
    write, reports = shard_stream.ShardStream._write, []
    monkeypatch.setattr(shard_stream.ShardStream, "_write", lambda *a: time.sleep(0.01) or write(*a))
    for _ in range(3):  # without graphs, in captures, in replays; and pinned memory is used again
        output = tmp_path / str(len(reports))
        encode_dataset(pictures, output, model=encoder, pool=pool, shard_images=7, progress=reports.append, **OPTIONS)
        check(encoder, pictures, output, pool)
    assert all(0 <= report.waiting <= 1 for report in reports)
    assert reports[-1].waiting < 1


def test_vectors_alone(encoder, pictures, tmp_path):
    encode_dataset(pictures, tmp_path / "out", model=encoder, pool="mean", tokens=False, **OPTIONS)
    (shard,) = (tmp_path / "out").glob("*.safetensors")
    assert load_file(shard).keys() == {"pooled"}
    expected = encoder.encode(sorted(pictures.iterdir()), **OPTIONS).pooled("mean").cpu()
    assert torch.equal(load_file(shard)["pooled"], expected)


def test_two_processes_share_a_gpu(encoder, pictures, tmp_path):
    encoder.save_pretrained(tmp_path / "model")
    settings = {"devices": ["cuda:0", "cuda:0"], "dtype": "bfloat16", "impl": "triton", "pool": "mean"}
    manifest = encode_dataset(
        pictures, tmp_path / "out", model=tmp_path / "model", shard_images=7, **settings, **OPTIONS
    )
    assert (manifest.complete, manifest.counts["images"], manifest.counts["failed"]) == (True, 60, 0)
    check(encoder, pictures, tmp_path / "out", "mean")
