"""`scripts/examples/serve.py` as a process of its own, with a real client."""

import importlib.util
import io
import re
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import requests
import safetensors.torch
import torch
from PIL import Image

from support.demo import demo_encoder

pytest.importorskip("fastapi", reason="needs fastapi: pip install 'qwenvit[serve]'")
SCRIPT = Path(__file__).parents[2] / "scripts/examples/serve.py"
MAX_TOKENS = 16


@pytest.fixture(scope="module")
def url(tmp_path_factory):
    log = tmp_path_factory.mktemp("serve") / "log"
    command = [sys.executable, str(SCRIPT), "--device", "cpu", "--port", "0"]
    command += ["--max-bytes", "100000", "--max-tokens", str(MAX_TOKENS)]
    with log.open("w") as stream, subprocess.Popen(command, stdout=stream, stderr=stream) as server:
        try:
            for _ in range(600):
                if found := re.search(r"running on (http://\S+)", log.read_text()):
                    break
                assert server.poll() is None, log.read_text()
                time.sleep(0.2)
            yield found[1]
            server.send_signal(signal.SIGTERM)
            assert server.wait(60) in (0, -signal.SIGTERM), log.read_text()
            assert "Traceback" not in log.read_text()
        finally:
            server.kill()


@pytest.fixture(scope="module")
def demo():
    return demo_encoder()


def png(index):
    pixels = np.random.default_rng(index).integers(0, 256, (40 + 30 * index, 90, 3), dtype=np.uint8)
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, "PNG")
    return stream.getvalue()


def test_images_of_many_clients_get_their_own_embeddings(url, demo):
    images = [png(index) for index in range(8)]
    with ThreadPoolExecutor(8) as clients:
        answers = list(clients.map(lambda image: requests.post(f"{url}/embed", image, timeout=60), images))
    for image, answer in zip(images, answers, strict=True):
        assert answer.status_code == 200, answer.text
        tensors = safetensors.torch.load(answer.content)
        truth = demo(*demo.image_processor(image, max_tokens=MAX_TOKENS))
        assert len(tensors["tokens"]) <= MAX_TOKENS
        torch.testing.assert_close(tensors["tokens"], truth.pooler_output, rtol=1e-4, atol=1e-5)
        assert len(tensors) == 1 + len(truth.deepstack_features)


@pytest.mark.parametrize("pool", ["mean", "patches"])
def test_vectors_in_npy(url, demo, pool):
    answer = requests.post(f"{url}/embed", png(3), params={"pool": pool, "format": "npy"}, timeout=60)
    vector = np.load(io.BytesIO(answer.content), allow_pickle=False)
    truth = demo(*demo.image_processor(png(3), max_tokens=MAX_TOKENS))
    rows = truth.pooler_output if pool == "mean" else truth.last_hidden_state
    expected = torch.nn.functional.normalize(rows.double().mean(0), dim=0)
    np.testing.assert_allclose(vector, expected.numpy(), rtol=1e-4, atol=1e-6)


def test_what_cannot_be_embedded_is_refused_and_the_server_goes_on(url):
    post = lambda data, **params: requests.post(f"{url}/embed", data, params=params, timeout=60)  # noqa: E731
    for broken in (b"no picture", b"", png(1)[:200]):
        answer = post(broken)
        assert answer.status_code == 422
        assert "image" in answer.json()["detail"]
    assert post(bytes(100_001)).status_code == 413
    assert post(iter([bytes(60_000)] * 2)).status_code == 413  # in chunks, without a length
    assert post(png(0), pool="max").status_code == 422
    health = requests.get(f"{url}/health", timeout=60)
    assert health.status_code == 200
    assert health.json()["waiting"] == 0
    assert post(png(0)).status_code == 200


def test_an_image_that_is_too_much_fails_alone(demo, monkeypatch):
    """Of a batch that fails as a whole, each image is tried again by itself."""
    spec = importlib.util.spec_from_file_location("serve_example", SCRIPT)
    serve = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "serve_example", serve)
    spec.loader.exec_module(serve)
    embed = serve.Batcher._embed

    def overflowing(self, jobs):
        if any(job.image == b"too much" for job in jobs):
            raise OverflowError("the features exceed the range of float16")
        embed(self, jobs)

    monkeypatch.setattr(serve.Batcher, "_embed", overflowing)
    jobs = [serve.Job(image, None) for image in (png(0), b"too much", png(1), png(2))]
    jobs[3].result.cancel()  # its client is gone
    batcher = serve.Batcher(demo, 8, MAX_TOKENS)
    for job in jobs:
        batcher.jobs.put(job)
    batcher.jobs.put(None)
    batcher.thread.join(60)
    assert len(jobs[0].result.result(0)["tokens"])
    assert len(jobs[2].result.result(0)["tokens"])
    with pytest.raises(ValueError, match="too much for this server"):
        jobs[1].result.result(0)
