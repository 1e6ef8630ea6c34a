"""cuBLAS' workspaces: the graphs that use them are gone, others use them too, and then torch frees them."""

import gc
import weakref
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest
import torch

from qwenvit.graphs import graphed_tower, workspace
from qwenvit.graphs.graph import UnownedTensor
from qwenvit.graphs.workspace import reserve_workspaces
from support.towers import fast_encoder_on_gpu, narrow, random_pixels

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
GENERATIONS = ((64, 66), (92, 130), (130, 64))
"""Patches on a side of square images. The second of a pair drops the graphs of the first: either it needs a larger
pool, or, if it is smaller, the test moves the weights."""


def encoder(dtype):
    """Return a tower whose products are so deep, and of so few tiles, that cuBLAS splits their sums."""
    config = narrow("qwen3_vl", depth=2, intermediate_size=8192, out_hidden_size=128)
    return fast_encoder_on_gpu(config, dtype)


def pixels_of(side, enc):
    return random_pixels(side * side, enc.config, side).to("cuda", enc.dtype)


def encode_twice(enc, side):
    """Run an image twice, so that its capacity has a graph of its own; return the tokens."""
    pixels, grid = pixels_of(side, enc), torch.tensor([[1, side, side]])
    enc(pixels, grid)
    output = enc(pixels, grid)
    torch.cuda.synchronize()
    return output.pooler_output


def pool_blocks(state):
    """Return the address and size of each block of this state in pools of graphs."""
    segments = [segment for segment in torch.cuda.memory_snapshot() if tuple(segment["segment_pool_id"]) != (0, 0)]
    return {
        (block["address"], block["size"])
        for segment in segments
        for block in segment["blocks"]
        if block["state"] == state
    }


def free_workspaces():
    """Free all workspaces, as torch.compile does; return those that were in pools of graphs."""
    before = pool_blocks("active_allocated")
    torch._C._cuda_clearCublasWorkspaces()
    torch.cuda.synchronize()
    return before - pool_blocks("active_allocated")


def bytes_at(block):
    address, size = block
    return UnownedTensor(address, torch.Size([size]), torch.uint8).tensor(torch.device("cuda", 0))


def is_mapped(block):
    """Whether a block's memory is still torch's."""
    address, size = block
    segments = torch.cuda.memory_snapshot()
    return any(
        segment["address"] <= address and address + size <= segment["address"] + segment["total_size"]
        for segment in segments
    )


@needs_gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_freed_workspaces_stay_with_the_graphs_that_use_them(dtype, monkeypatch):
    """Two threads capture, and capture again after their graphs were dropped; then torch frees the workspaces.

    What graphs write to must not go back to CUDA with the memory that is free then: others would get it. Sentinels in
    memory that is allocated afterwards stay as they are, and results are the same bits.
    """
    monkeypatch.setattr(graphed_tower, "MAX_GRAPHS", 3)  # of about five that a generation captures
    gc.collect()
    torch._C._cuda_clearCublasWorkspaces()  # those of other tests
    torch.cuda.empty_cache()
    enc, written = encoder(dtype), 0
    with ThreadPoolExecutor(1) as first, ThreadPoolExecutor(1) as second:

        def capture(side):
            work = {side: first, 16: second}
            return {size: thread.submit(encode_twice, enc, size).result() for size, thread in work.items()}

        for side, next_side in GENERATIONS:
            capture(side)
            dropped = weakref.WeakSet(graph.graph for graph in enc.tower.graphs._graphs.values())
            if next_side < side:
                weight = enc.tower.blocks[0].mlp.fc1.weight
                weight.data = weight.data.clone()
            expected = capture(next_side)
            assert not dropped
            workspaces = free_workspaces()
            for block in workspaces:
                bytes_at(block).fill_(0xA5)
            for size in expected:
                encode_twice(enc, size)
            used = [block for block in workspaces if (bytes_at(block) != 0xA5).any()]
            written += len(used)
            torch.cuda.empty_cache()
            assert [block for block in used if not is_mapped(block)] == []
            sentinels = [torch.full((2**25,), 0xA5, dtype=torch.uint8, device="cuda") for _ in range(24)]
            for size, tokens in expected.items():
                assert torch.equal(encode_twice(enc, size), tokens)
            assert all((part == 0xA5).all() for part in sentinels)
            del sentinels
    if not written:
        pytest.skip(f"needs products in {dtype} for which cuBLAS uses a workspace that torch keeps")


@pytest.fixture
def pools(monkeypatch):
    """Return a list of the captures' pools and graphs; a capture fails while `pools.fails`."""

    class Captures(list):
        fails = False

    captures = Captures()

    class StubGraph:
        def capture_begin(self, pool, capture_error_mode):  # noqa: ARG002
            self.own_pool = object() if pool is None else pool
            captures.append((self.own_pool, weakref.ref(self)))
            if captures.fails:
                raise MemoryError

        def capture_end(self):
            pass

        def pool(self):
            return self.own_pool

    monkeypatch.setattr(torch, "cuda", SimpleNamespace(CUDAGraph=StubGraph))
    monkeypatch.setattr(workspace, "_owners", {})
    monkeypatch.setattr(workspace, "_all_owners", set())
    return captures


def reserve(stream):
    return reserve_workspaces(SimpleNamespace(cuda_stream=stream), torch.zeros(1, dtype=torch.bfloat16))


def test_each_stream_has_one_pool_that_always_has_a_graph(pools):
    for stream in (1, 2, 1, 2, 1):
        reserve(stream)
    assert [pool is pools[number % 2][0] for number, (pool, _) in enumerate(pools)] == [True] * 5
    assert pools[0][0] is not pools[1][0]
    assert [graph() is not None for _, graph in pools] == [True, True, False, False, False]


def test_after_a_failure_a_stream_has_a_new_pool_and_the_old_one_is_kept(pools):
    """torch may refuse captures in the pool of a failed one, and live graphs may use workspaces in it."""
    reserve(1)
    pools.fails = True
    with pytest.raises(MemoryError):
        reserve(1)
    pools.fails = False
    reserve(1)
    reserve(1)
    assert pools[0][0] is pools[1][0]
    assert pools[2][0] is pools[3][0]
    assert pools[2][0] is not pools[0][0]
    assert pools[0][1]() is not None
    assert pools[2][1]() is not None
