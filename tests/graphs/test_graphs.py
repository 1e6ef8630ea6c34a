"""CUDA graphs of the fast tower: any grids through any graph, moved weights, threads, memory."""

import copy
import threading

import pytest
import torch

from qwenvit import Encoder
from qwenvit.graphs import device_plan
from qwenvit.graphs.capacity import MAX_GRAPH_PATCHES
from qwenvit.plan.grid_plan import GridPlan
from qwenvit.plan.inputs import check_grid
from qwenvit.towers.reference import ReferenceTower
from support.towers import FULL, fast_encoder_on_gpu, narrow, random_pixels

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
SAME_TOTAL = ([[1, 8, 32]], [[1, 32, 8]], [[1, 16, 16]], [[4, 8, 8]], [[1, 8, 8], [2, 12, 8]], [[1, 2, 2]] * 64)


def encoder(family="qwen2_5_vl", dtype=torch.bfloat16):
    middle = {"intermediate_size": 512} if FULL[family].traits.gated_mlp else {}
    config = narrow(family, depth=4, out_hidden_size=64, **middle)
    return fast_encoder_on_gpu(config, dtype)


def pixels_of(grid, enc, seed=0):
    patches = int(torch.tensor(grid).prod(1).sum())
    return random_pixels(patches, enc.config, seed).to("cuda", enc.dtype)


def capture(enc, grid, pixels):
    """Run a batch twice: the second time in a row, its capacity has a graph of its own. Return the second output."""
    enc(pixels, torch.tensor(grid))
    output = enc(pixels, torch.tensor(grid))
    assert enc.tower.graphs._prepare(check_grid(grid, 2)).capacity in [key[0] for key in enc.tower.graphs._graphs]
    return output


def check(enc, grid, pixels, output):
    expected = enc.tower(pixels, GridPlan.build(grid, enc.config, "cuda"))
    assert torch.equal(output.pooler_output, expected.pooler_output), grid
    assert torch.equal(output.last_hidden_state, expected.last_hidden_state), grid
    for ours, theirs in zip(output.deepstack_features, expected.deepstack_features, strict=True):
        assert torch.equal(ours, theirs), grid


@needs_gpu
@pytest.mark.parametrize("family", ["qwen2_vl", "qwen2_5_vl", "qwen3_vl"])
def test_layouts_of_equal_size_are_not_confused(family):
    """One graph runs all of them, and later calls do not overwrite results. 256 patches: no spare capacity."""
    enc = encoder(family)
    outputs = []
    for seed, grid in enumerate(SAME_TOTAL * 3):
        pixels = pixels_of(grid, enc, seed)
        outputs.append((grid, pixels, enc(pixels, torch.tensor(grid))))
    for grid, pixels, output in outputs:
        check(enc, grid, pixels, output)


@needs_gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("family", ["qwen2_vl", "qwen2_5_vl", "qwen3_vl"])
def test_a_graph_that_is_shared_gives_the_same_bits_as_its_own(family, dtype):
    """Pixel values as a tensor on either device, or as what writes them to rows whose old values are arbitrary."""
    enc = encoder(family, dtype)
    other = torch.full((44 * 44, enc.config.patch_dim), torch.nan, device="cuda", dtype=dtype)
    for grid in ([[1, 20, 26]], [[1, 30, 28], [3, 4, 6]]):
        pixels = pixels_of(grid, enc)
        forms = {
            "GPU": pixels,
            "CPU": pixels.cpu(),
            "fp32": pixels.float(),
            "callable": lambda rows, pixels=pixels: rows.copy_(pixels),
        }
        for name, pixel_values in forms.items():
            enc.tower.graphs = None  # meet everything anew
            enc(other, torch.tensor([[1, 44, 44]]))  # the first of all gets a graph of its own
            for meeting in ("shared", "own", "own again"):
                output = enc._run(pixel_values, check_grid(grid, 2))
                own = enc.tower.graphs._prepare(check_grid(grid, 2)).capacity
                assert (own in [key[0] for key in enc.tower.graphs._graphs]) == (meeting != "shared"), (name, meeting)
                check(enc, grid, pixels, output)


@needs_gpu
def test_weights_that_move_between_the_first_and_the_second_meeting():
    enc, grid = encoder(), [[1, 8, 8]]
    pixels = pixels_of(grid, enc)
    check(enc, grid, pixels, enc(pixels, torch.tensor(grid)))
    weight = enc.tower.blocks[1].attn.qkv.weight
    weight.data = weight.data * 2
    torch.cuda.empty_cache()
    for _ in range(2):
        check(enc, grid, pixels, enc(pixels, torch.tensor(grid)))
    assert enc.tower.graphs._graphs


@needs_gpu
def test_sizes_that_come_once_share_graphs():
    enc, sides = encoder(), range(16, 130, 2)
    for side in sides:
        grid = [[1, side, side]]
        pixels = pixels_of(grid, enc)
        check(enc, grid, pixels, enc(pixels, torch.tensor(grid)))
    assert len(enc.tower.graphs._graphs) < len(sides) / 2


@needs_gpu
def test_spare_capacity_changes_results_by_rounding_only():
    """Matrix products of another height may add in another order; fp32 shows no other difference."""
    enc = encoder(dtype=torch.float32)
    generator = torch.Generator().manual_seed(0)
    for seed in range(25):
        count = int(torch.randint(1, 5, (), generator=generator))
        grid = torch.randint(1, 12, (count, 3), generator=generator) * torch.tensor([0, 2, 2])
        grid[:, 0] = torch.randint(1, 4, (count,), generator=generator)
        pixels = pixels_of(grid.tolist(), enc, seed)
        expected = enc.tower(pixels, GridPlan.build(grid, enc.config, "cuda"))
        for _ in range(3):  # in a shared graph and in its own
            output = enc(pixels, grid)
            torch.testing.assert_close(output.pooler_output, expected.pooler_output, rtol=1e-4, atol=1e-5)


@needs_gpu
@pytest.mark.parametrize("family", ["qwen2_vl", "qwen2_5_vl", "qwen3_vl"])
def test_values_in_the_spare_capacity_change_nothing(family):
    """A graph's later tensors overwrite its pixel values, so rows past the last patch have arbitrary values."""
    enc = encoder(family)
    for full, grid in (([[1, 34, 32]], [[1, 38, 28]]), ([[1, 32, 32], [2, 4, 4]], [[1, 34, 30], [2, 4, 4]])):
        pixels, before, outputs = pixels_of(grid, enc), pixels_of(full, enc), []
        assert len(pixels) < len(before)
        capture(enc, grid, pixels)
        capacities = {enc.tower.graphs._prepare(check_grid(items, 2)).capacity for items in (full, grid)}
        assert len(capacities) == 1
        capture(enc, full, before)
        for value in (0.0, torch.nan):
            enc(torch.full_like(before, value), torch.tensor(full))
            outputs.append(enc(pixels, torch.tensor(grid)))
        assert outputs[0].last_hidden_state.isfinite().all()
        assert torch.equal(outputs[0].last_hidden_state, outputs[1].last_hidden_state)
        assert torch.equal(outputs[0].pooler_output, outputs[1].pooler_output)
        for one, other in zip(outputs[0].deepstack_features, outputs[1].deepstack_features, strict=True):
            assert torch.equal(one, other)


@needs_gpu
def test_threads_and_streams_are_serialized():
    enc = encoder()
    grids = [[[1, 16, 16]], [[2, 8, 16]], [[1, 12, 20]], [[1, 4, 4]] * 9]
    results, failures = {}, []

    def work(number):
        try:
            stream = torch.cuda.Stream()
            grid = grids[number % 4]
            with torch.cuda.stream(stream), torch.inference_mode(number % 2 == 0):
                for round_number in range(8):
                    pixels = pixels_of(grid, enc, 100 * number + round_number)
                    results[number, round_number] = (grid, pixels, enc(pixels, torch.tensor(grid)))
                stream.synchronize()
        except Exception as error:  # noqa: BLE001  (nobody would see a thread's exception)
            failures.append(error)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    torch.cuda.synchronize()
    assert len(results) == 48
    for grid, pixels, output in results.values():
        expected = enc(pixels.clone(), torch.tensor(grid))
        assert torch.equal(output.pooler_output, expected.pooler_output)


@needs_gpu
def test_a_tower_that_was_converted_gets_new_graphs():
    enc = encoder()
    pixels = pixels_of([[1, 8, 8]], enc)
    assert capture(enc, [[1, 8, 8]], pixels).pooler_output.dtype == torch.bfloat16
    enc.tower.float()
    for output in (enc(pixels, torch.tensor([[1, 8, 8]])), capture(enc, [[1, 8, 8]], pixels)):
        assert output.pooler_output.dtype == torch.float32
        check(enc, [[1, 8, 8]], pixels.float(), output)


@needs_gpu
def test_a_tower_that_was_converted_part_by_part_gets_new_graphs():
    """The tower's own `_apply` is not called."""
    enc = encoder()
    capture(enc, [[1, 8, 8]], pixels_of([[1, 8, 8]], enc))
    for part in enc.tower.children():
        part.float()
    for grid in ([[1, 8, 8]], [[1, 32, 32]], [[1, 32, 32]]):
        pixels = pixels_of(grid, enc)
        check(enc, grid, pixels, enc(pixels, torch.tensor(grid)))


@needs_gpu
def test_a_moved_weight_is_read_at_its_new_address():
    """Its old memory stays allocated: graphs are replayed before the check for moved weights."""
    enc, grid = encoder(), [[1, 8, 8]]
    pixels = pixels_of(grid, enc)
    capture(enc, grid, pixels)
    weight = enc.tower.blocks[1].attn.qkv.weight
    weight.data = weight.data * 2
    torch.cuda.empty_cache()
    check(enc, grid, pixels, enc(pixels, torch.tensor(grid)))
    weight.mul_(0.5)
    check(enc, grid, pixels, enc(pixels, torch.tensor(grid)))
    enc.tower.blocks[1].attn.proj.weight.requires_grad_()
    with pytest.raises(ValueError, match="parameters: expected none"):
        enc(pixels, torch.tensor(grid))


@needs_gpu
def test_rising_sizes_take_no_more_memory_than_the_largest():
    def held(sizes):
        enc = encoder()
        torch.cuda.empty_cache()
        before = torch.cuda.memory_reserved()
        for side in sizes:
            capture(enc, [[1, side, side]], pixels_of([[1, side, side]], enc))
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        return torch.cuda.memory_reserved() - before

    assert held(range(8, 182, 2)) <= held([180]) + 40 * 2**20  # a pool that grows takes the next power of two


@needs_gpu
def test_workspaces_of_cublas_may_be_cleared():
    """torch.compile clears them for its own graphs."""
    enc, grid = encoder(), [[1, 32, 32]]
    pixels = pixels_of(grid, enc)
    expected = capture(enc, grid, pixels).pooler_output
    torch._C._cuda_clearCublasWorkspaces()
    torch.cuda.empty_cache()
    poison = [torch.full((2**22,), torch.nan, device="cuda") for _ in range(16)]
    assert torch.equal(enc(pixels, torch.tensor(grid)).pooler_output, expected)
    assert all(part.isnan().all() for part in poison)


@needs_gpu
def test_garbage_is_not_collected_during_a_capture(monkeypatch):
    """CUDA aborts a capture during which its thread frees another graph."""
    enc, garbage = encoder(), [encoder()]
    capture(garbage[0], [[1, 8, 8]], pixels_of([[1, 8, 8]], enc))

    def litter(*arguments):
        if torch.cuda.is_current_stream_capturing() and garbage:
            cycle = [garbage.pop()]
            cycle.append(cycle)
            del cycle
            assert len([[] for _ in range(100_000)]) > 0  # enough objects to trigger a collection
        return compute(*arguments)

    compute = device_plan.compute_plan
    monkeypatch.setattr(device_plan, "compute_plan", litter)
    pixels = pixels_of([[1, 16, 16]], enc)
    output = capture(enc, [[1, 16, 16]], pixels)
    assert not garbage
    check(enc, [[1, 16, 16]], pixels, output)


@needs_gpu
def test_a_move_to_the_same_device_keeps_the_graphs():
    enc, grid = encoder(), [[1, 8, 8]]
    pixels = pixels_of(grid, enc)
    capture(enc, grid, pixels)
    graphs, captured = enc.tower.graphs, dict(enc.tower.graphs._graphs)
    enc.tower.to("cuda", torch.bfloat16)
    assert enc.tower.graphs is graphs
    assert graphs._graphs == captured
    check(enc, grid, pixels, enc(pixels, torch.tensor(grid)))


@needs_gpu
def test_graphs_belong_to_the_tower():
    """Encoders of one tower share its graphs, which free their memory when the tower leaves the GPU."""
    torch.cuda.empty_cache()
    before = torch.cuda.memory_reserved()
    enc, grid = encoder(), [[1, 64, 64]]
    pixels = pixels_of(grid, enc)
    expected = capture(enc, grid, pixels).pooler_output.clone()
    graphs = enc.tower.graphs
    assert torch.equal(Encoder(enc.tower)(pixels, torch.tensor(grid)).pooler_output, expected)
    assert enc.tower.graphs is graphs
    enc.tower.cpu()
    del graphs, pixels, expected
    torch.cuda.empty_cache()
    assert torch.cuda.memory_reserved() <= before + 40 * 2**20  # cuBLAS keeps its workspace


@needs_gpu
def test_a_copy_has_graphs_of_its_own():
    enc = encoder()
    grid = [[1, 8, 8]]
    pixels = pixels_of(grid, enc)
    before = capture(enc, grid, pixels)
    other = copy.deepcopy(enc)
    for parameter in other.tower.parameters():
        parameter.mul_(0.5)
    check(other, grid, pixels, capture(other, grid, pixels))
    assert torch.equal(enc(pixels, torch.tensor(grid)).pooler_output, before.pooler_output)


@needs_gpu
def test_warmup_captures_what_later_calls_use():
    enc = encoder()
    count = enc.warmup(300)
    captured = set(enc.tower.graphs._graphs)
    assert len(captured) == count + 1  # and the one that sizes the pool
    for side in range(2, 36, 2):
        capture(enc, [[1, side, side]], pixels_of([[1, side, side]], enc))
    assert set(enc.tower.graphs._graphs) == captured
    with pytest.raises(ValueError, match=f"max_tokens: expected at most {MAX_GRAPH_PATCHES // 4}"):
        enc.warmup(10**6)
    with pytest.raises(ValueError, match="max_tokens: expected a positive number of tokens, got 0"):
        enc.warmup(0)


@needs_gpu
def test_batches_too_large_for_a_graph():
    enc = encoder()
    grid = [[1, 200, 200]]
    pixels = pixels_of(grid, enc)
    for pixel_values in (pixels, pixels.cpu(), lambda rows: rows.copy_(pixels)):
        for _ in range(2):
            check(enc, grid, pixels, enc._run(pixel_values, check_grid(grid, 2)))
    assert not enc.tower.graphs._graphs


@needs_gpu
def test_gradients_are_refused():
    enc = encoder()
    with pytest.raises(ValueError, match="pixel_values, parameters: expected none"):
        enc(pixels_of([[1, 4, 4]], enc).requires_grad_(), torch.tensor([[1, 4, 4]]))


def test_the_reference_tower_has_nothing_to_warm_up():
    config = narrow("qwen2_vl", depth=1, intermediate_size=320, out_hidden_size=8)
    assert Encoder(ReferenceTower(config)).warmup(1000) == 0
