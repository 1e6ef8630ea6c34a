#!/usr/bin/env python
"""Serve embeddings over HTTP: `pip install 'qwenvit[serve]'`, then `python scripts/examples/serve.py --model MODEL`.

    curl --data-binary @cat.jpg localhost:8000/embed > cat.safetensors             tokens, deepstack.K
    curl --data-binary @cat.jpg 'localhost:8000/embed?pool=mean&format=npy' > cat.npy   one vector

Images that arrive while the tower is busy share its next batch. An example to start from: it has no authentication.
"""

import argparse
import asyncio
import io
import json
import queue
import sys
import threading
from collections.abc import AsyncIterator, Iterable
from concurrent.futures import Future
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

import numpy as np
import uvicorn
from fastapi import FastAPI, HTTPException, Query, Request, Response
from fastapi.concurrency import run_in_threadpool
from safetensors.torch import save
from torch import Tensor

from qwenvit import Encoder
from qwenvit.item_stream import encode_stream

IMAGES_PER_BATCH = 64


@dataclass(frozen=True)
class Job:
    """An image, and where its embeddings go: tensors on the CPU."""

    image: bytes
    pool: str | None
    result: "Future[dict[str, Tensor]]" = field(default_factory=Future)


class Batcher:
    """Embeds images of many requests in one thread, which alone uses the device."""

    def __init__(self, encoder: Encoder, max_waiting: int, max_tokens: int) -> None:
        self.encoder, self.max_tokens = encoder, max_tokens
        self.jobs: queue.Queue[Job | None] = queue.Queue(max_waiting)
        self.thread = threading.Thread(target=self._run, name="batcher", daemon=True)
        self.thread.start()

    def _run(self) -> None:
        while (job := self.jobs.get()) is not None:
            jobs = [job]
            while len(jobs) < IMAGES_PER_BATCH and not self.jobs.empty():
                if (job := self.jobs.get()) is None:
                    self.jobs.put(None)
                    break
                jobs.append(job)
            jobs = [job for job in jobs if job.result.set_running_or_notify_cancel()]  # some clients are gone
            if not self._try(jobs):  # one image may be too much for the whole batch
                for job in jobs:
                    if not job.result.done() and not self._try([job]):
                        job.result.set_exception(ValueError("image: too much for this server"))

    def _try(self, jobs: list[Job]) -> bool:
        try:
            self._embed(jobs)
        except Exception as error:  # noqa: BLE001 every client must get an answer
            print(f"a batch of {len(jobs)} failed: {error!r}", file=sys.stderr)
            return False
        return True

    def _embed(self, jobs: Iterable[Job]) -> None:
        options: dict[str, Any] = {"max_tokens": self.max_tokens, "keep_patches": True}
        for batch in encode_stream(self.encoder, jobs, lambda job: job.image, **options):
            found = batch.embeddings
            vectors = {mode: iter(found.pooled(mode, normalize=True).cpu()) for mode in ("mean", "patches")}
            for position, (job, item) in enumerate(zip(batch.items, found, strict=True)):
                if item is None:
                    job.result.set_exception(found.errors[position])
                    continue
                pooled = {mode: next(rows) for mode, rows in vectors.items()}
                if job.pool:
                    job.result.set_result({"pooled": pooled[job.pool]})
                else:
                    item = item.cpu()
                    layers = {f"deepstack.{level}": layer for level, layer in enumerate(item.deepstack)}
                    job.result.set_result({"tokens": item.tokens, **layers})


def make_app(encoder: Encoder, *, max_bytes: int, max_waiting: int, max_tokens: int) -> FastAPI:
    """Return the server.

    Args:
        encoder: the encoder.
        max_bytes: the largest image file that is taken; 413 otherwise.
        max_waiting: most images that wait for the device; 503 otherwise.
        max_tokens: larger images are shrunk to so many tokens.
    """
    batcher = Batcher(encoder, max_waiting, max_tokens)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        yield
        await run_in_threadpool(batcher.jobs.put, None)
        await run_in_threadpool(batcher.thread.join)

    app = FastAPI(title="qwenvit", lifespan=lifespan)

    @app.get("/health")
    def health() -> dict[str, Any]:
        if not batcher.thread.is_alive():
            raise HTTPException(503, "the thread that embeds has ended")
        return {"tower": repr(encoder), "waiting": batcher.jobs.qsize()}

    @app.post("/embed")
    async def embed(
        request: Request,
        pool: Annotated[Literal["mean", "patches"] | None, Query()] = None,
        format: Annotated[Literal["safetensors", "npy"], Query()] = "safetensors",  # noqa: A002 the parameter's name
    ) -> Response:
        body = bytearray()
        async for chunk in request.stream():  # Content-Length may be wrong or missing
            body += chunk
            if len(body) > max_bytes:
                raise HTTPException(413, f"expected an image file of at most {max_bytes} bytes")
        job = Job(bytes(body), pool)
        try:
            batcher.jobs.put_nowait(job)
        except queue.Full:
            raise HTTPException(503, "too many images wait", {"Retry-After": "1"}) from None
        try:
            tensors = await asyncio.wrap_future(job.result)
        except (OSError, TypeError, ValueError) as error:
            raise HTTPException(422, str(error)) from error
        if format == "npy":
            stream = io.BytesIO()
            np.save(stream, (tensors["pooled"] if pool else tensors["tokens"]).float().numpy())
            return Response(stream.getvalue(), media_type="application/x-npy")
        metadata = {"tower": json.dumps(encoder.config.to_hf())}
        content = save({name: tensor.contiguous() for name, tensor in tensors.items()}, metadata)
        return Response(content, media_type="application/octet-stream")

    return app


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="demo")
    parser.add_argument("--device")
    parser.add_argument("--dtype")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--max-bytes", type=int, default=32 * 2**20)
    parser.add_argument("--max-waiting", type=int, default=256)
    parser.add_argument("--max-tokens", type=int, default=2304)
    arguments = parser.parse_args()
    encoder = Encoder.from_pretrained(arguments.model, device=arguments.device, dtype=arguments.dtype)
    limits = {name: getattr(arguments, name) for name in ("max_bytes", "max_waiting", "max_tokens")}
    # Bodies are read before the queue is asked: this bounds their number.
    most = {"limit_concurrency": 2 * arguments.max_waiting}
    uvicorn.run(make_app(encoder, **limits), host=arguments.host, port=arguments.port, **most)


if __name__ == "__main__":
    main()
