"""One engine of vLLM in a process of its own: `python -m vllm_bench.engine_process DESCRIPTOR OPTIONS`.

DESCRIPTOR is that of a connection to `engines.Engine`, OPTIONS the arguments of `vllm.LLM` as JSON. The process sends
`(True, figures)` or `(False, traceback)` when it is ready and after each request; a request is a method's name and
keyword arguments.
"""

import json
import os
import signal
import sys
import time
import traceback
from collections.abc import Iterator, Sequence
from multiprocessing.connection import Connection
from typing import Any

import torch
from vllm import LLM, SamplingParams
from vllm.multimodal.processing import BaseMultiModalProcessor

from vllm_bench.engine_options import LOG_PROBABILITIES
from vllm_bench.prompts import Asked, prompt, request
from vllm_bench.stages import PROCESSOR, WHOLE


class Session:
    """An engine, and what the benchmark asks of it."""

    def __init__(self, options: dict[str, Any]) -> None:
        start = time.perf_counter()
        self.engine = LLM(**options)
        self.load_seconds = time.perf_counter() - start

    def worker(self, call: str, **arguments: Any) -> Any:
        """Call a method of `BenchWorker`."""
        return self.engine.collective_rpc(call, kwargs=arguments)[0]

    def describe(self) -> dict[str, Any]:
        """Return `BenchWorker.bench_model`, and the seconds it took to start."""
        return self.worker("bench_model") | {"load_seconds": self.load_seconds}

    def graphs(self) -> dict[str, Any]:
        """Return `BenchWorker.bench_graphs`; {} where vLLM has no CUDA graphs for its tower."""
        return self.worker("bench_graphs") or {}

    def generate(self, requests: list[Any], log_probabilities: int | None = None) -> Any:
        """Return the first token of each request."""
        sampling = SamplingParams(
            temperature=0, max_tokens=1, ignore_eos=True, detokenize=False, logprobs=log_probabilities
        )
        return self.engine.generate(requests, sampling, use_tqdm=False)

    def first_token_times(self, asked: Sequence[Asked], warm: int) -> list[float]:
        """Return the wall seconds of requests sent one at a time, but for the first `warm` of them."""
        return [self._seconds([one]) for one in [request(*each) for each in asked]][warm:]

    def crowd_time(self, asked: Sequence[Asked]) -> float:
        """Return the wall seconds of requests sent all at once."""
        return self._seconds([request(*each) for each in asked])

    def _seconds(self, requests: list[Any]) -> float:
        start = time.perf_counter()
        self.generate(requests)
        return time.perf_counter() - start

    def stage_times(self, asked: Sequence[Asked], warm: int) -> list[dict[str, float]]:
        """Return the seconds of each stage of each request but the first `warm`, the GPU synchronised around each."""
        times: dict[str, float] = {}
        found, hooks = [], list(processors_with_apply(BaseMultiModalProcessor))
        own = {kind: kind.apply for kind in hooks}
        self.worker("bench_watch", on=True)
        try:
            for kind in hooks:
                kind.apply = outermost(own[kind], times)  # type: ignore[method-assign]
            for one in [request(*each) for each in asked]:
                whole = self._seconds([one])
                found.append(times | {WHOLE: whole} | self.worker("bench_take_times"))
                times.clear()
        finally:
            for kind in hooks:
                kind.apply = own[kind]  # type: ignore[method-assign]
            self.worker("bench_watch", on=False)
        return found[warm:]

    def log_probabilities(self, asked: Sequence[Asked], kept: str) -> dict[str, Any]:
        """Return the log-probabilities of each request's first token, and how its pixels came.

        Args:
            asked: the requests, sent one at a time.
            kept: the file that receives the embeddings of their images.

        Returns:
            `first`: by token, of the most likely ones, for each request; `count`, `bytes`: see `bench_kept`.
        """
        self.worker("bench_keep", on=True)
        try:
            first = self._first_tokens([request(*each) for each in asked])
        finally:
            self.worker("bench_keep", on=False)
        return {"first": first} | self.worker("bench_kept", path=kept)

    def log_probabilities_of_embeddings(self, path: str, images: Sequence[int]) -> list[dict[str, float]]:
        """Return the same for embeddings in a file of `Truth.write_requests`, `images` of them in each request."""
        parts = zip(torch.load(path), images, strict=True)
        return self._first_tokens([{"prompt": prompt(n), "multi_modal_data": {"image": one}} for one, n in parts])

    def _first_tokens(self, requests: list[Any]) -> list[dict[str, float]]:
        found = []
        for one in requests:
            (output,) = self.generate([one], LOG_PROBABILITIES)
            found.append({str(token): each.logprob for token, each in output.outputs[0].logprobs[0].items()})
        return found


def processors_with_apply(kind: type) -> Iterator[type]:
    """Yield a class and those derived from it that define `apply` themselves."""
    if "apply" in vars(kind):
        yield kind
    for derived in kind.__subclasses__():
        yield from processors_with_apply(derived)


def outermost(apply: Any, times: dict[str, float]) -> Any:
    """Return a timed `apply` that does not count what it calls of the classes above it."""

    def run(*args: Any, **kwargs: Any) -> Any:
        before, start = times.get(PROCESSOR, 0.0), time.perf_counter()
        out = apply(*args, **kwargs)
        times[PROCESSOR] = before + time.perf_counter() - start
        return out

    return run


def serve(connection: Connection, options: dict[str, Any]) -> None:
    """Start the engine, then answer requests as long as there is someone to ask."""
    try:
        session = Session(options)
        connection.send((True, session.describe()))
    except Exception:  # noqa: BLE001 (the benchmark reports it)
        connection.send((False, traceback.format_exc()))
        return
    while True:
        try:
            method, arguments = connection.recv()
        except EOFError:  # the benchmark has ended
            return
        try:
            connection.send((True, getattr(session, method)(**arguments)))
        except Exception:  # noqa: BLE001
            connection.send((False, traceback.format_exc()))


def main() -> None:
    descriptor, options = sys.argv[1:]
    os.set_inheritable(int(descriptor), False)
    serve(Connection(int(descriptor)), json.loads(options))
    sys.stdout.flush()
    # vLLM's own shutdown may wait for its processes; without one they would keep the GPU's memory.
    os.killpg(0, signal.SIGKILL)


if __name__ == "__main__":  # a process that vLLM starts may import this file
    main()
