"""The pace of a job: how far the device runs ahead of the disk, and how often the manifest is written."""

import threading
from types import SimpleNamespace

from qwenvit.datasets import ledger as ledger_module
from qwenvit.datasets import shard_stream
from qwenvit.datasets.ledger import Encoded
from qwenvit.datasets.manifest import Manifest
from qwenvit.datasets.progress import Meter
from qwenvit.datasets.shard_folder import ShardReport
from qwenvit.outputs import Embeddings
from support.jobs import make_pictures, run_job


def test_the_device_waits_for_a_slow_disk(encoder, pictures, tmp_path, monkeypatch):
    """Batches that wait for the disk are bounded, so memory is."""
    computed, written, ahead = [], [], []
    pooled, write = Embeddings.pooled, shard_stream.ShardStream._write
    gate = threading.Semaphore(0)

    def counted(self, *arguments, **options):
        computed.append(1)
        ahead.append(len(computed) - len(written))
        if len(computed) > 3:
            gate.release()
        return pooled(self, *arguments, **options)

    def slow(self, batch):
        gate.acquire(timeout=0.5)
        write(self, batch)
        written.append(1)

    monkeypatch.setattr(Embeddings, "pooled", counted)
    monkeypatch.setattr(shard_stream.ShardStream, "_write", slow)
    run_job(pictures, tmp_path / "out", model=encoder, devices=None)
    assert len(computed) == len(written) == 7
    assert max(ahead) <= shard_stream.BATCHES_WAITING + 2


def test_the_device_goes_on_while_a_shard_is_brought_to_the_disk(encoder, tmp_path, monkeypatch):
    """One shard's worth of batches further than the batches that may wait for the writer."""
    pictures = make_pictures(tmp_path / "pictures", 9)
    computed, whole, late = [], threading.Event(), []
    pooled, finish = Embeddings.pooled, shard_stream.ShardFile.finish

    def counted(self, *arguments, **options):
        computed.append(1)
        if len(computed) == 8:
            whole.set()
        return pooled(self, *arguments, **options)

    def slow(self):
        late.append(not whole.wait(10))
        return finish(self)

    monkeypatch.setattr(Embeddings, "pooled", counted)
    monkeypatch.setattr(shard_stream.ShardFile, "finish", slow)
    manifest = run_job(pictures, tmp_path / "out", model=encoder, devices=None, shard_images=3)
    assert late == [False] * 3
    assert (manifest.counts["images"], manifest.counts["shards"], manifest.complete) == (9, 3, True)


def test_the_manifest_is_written_now_and_then(encoder, pictures, tmp_path, monkeypatch):
    """After each shard if it is time, and also when it gets to be time later."""
    counts, write = [], Manifest.write
    monkeypatch.setattr(Manifest, "write", lambda self: counts.append(self.counts["images"]) or write(self))
    monkeypatch.setattr(ledger_module, "SECONDS_BETWEEN_WRITES", 100.0)
    run_job(pictures, tmp_path / "rarely", model=encoder, devices=None, shard_images=2)
    assert counts == [0, 7]
    counts.clear()
    monkeypatch.setattr(ledger_module, "SECONDS_BETWEEN_WRITES", 0.0)
    run_job(pictures, tmp_path / "often", model=encoder, devices=None, shard_images=2)
    assert counts[0] == 0
    assert counts[-1] == 7
    assert len(set(counts)) > 2
    folder = tmp_path / "later"
    folder.mkdir()
    now = [0.0]
    monkeypatch.setattr(ledger_module, "time", SimpleNamespace(monotonic=lambda: now[0]))
    monkeypatch.setattr(ledger_module, "SECONDS_BETWEEN_WRITES", 5.0)
    manifest = Manifest(folder, {"format": "npy"}, {}, [])
    ledger = ledger_module.Ledger(manifest, None, Meter(lambda: None, 1, None), None)
    for seconds, message, expected in (
        (0.0, ShardReport(1, 1, 1), [1]),
        (1.0, ShardReport(1, 1, 1), [1]),
        (4.0, Encoded([], 0.0), [1]),
        (6.0, Encoded([], 0.0), [1, 2]),
        (20.0, Encoded([], 0.0), [1, 2]),
    ):
        now[0] = seconds
        if not seconds:
            counts.clear()
        ledger.note(message)
        assert counts == expected, seconds
