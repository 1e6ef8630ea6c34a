"""rope_index on a GPU: equal to the CPU, without synchronisation, in CUDA graphs, and with invalid inputs."""

import random

import pytest
import torch

from peers.rope_index import SETUPS, processor_inputs
from qwenvit import rope_index
from support.rope_index_truth import FAMILIES, brute_force, random_rows, same, sequence

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
SECONDS = [0.35, 1.3]
ROWS = [
    [("text", 700), ("image", (1, 20, 24)), ("text", 3), ("video", (3, 8, 6)), ("text", 2)],
    [("video", (2, 8, 4)), ("image", (1, 2, 2)), ("image", (2, 6, 4)), ("text", 30)],
]
"""3 images, two of which touch, and 2 videos."""
OTHER_ROWS = [
    [("text", 2), ("image", (1, 4, 6)), ("image", (1, 4, 4)), ("video", (7, 6, 6)), ("video", (1, 8, 4)), ("text", 90)],
    [("text", 9), ("image", (1, 30, 20))],
]
"""As many images and videos as in `ROWS`."""


@pytest.fixture(params=FAMILIES)
def family(request):
    return request.param


@pytest.fixture
def no_synchronisation():
    """A function that calls another one and makes every synchronisation raise."""

    def run(function):
        function()  # compiles
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            return function()
        finally:
            torch.cuda.set_sync_debug_mode("default")

    return run


def example(family, rows=ROWS, padding="left", length=1200):
    inputs = sequence(rows, family, padding=padding, length=length)
    if family == "qwen2_5_vl":
        inputs["second_per_grid_ts"] = torch.tensor(SECONDS)
    return inputs


def on_gpu(inputs):
    return {key: value.cuda() if isinstance(value, torch.Tensor) else value for key, value in inputs.items()}


@pytest.mark.parametrize("padding", ["left", "right"])
@pytest.mark.parametrize("name", SETUPS)
def test_batches_of_realistic_size(family, name, padding):
    inputs = processor_inputs(name, family, padding=padding)
    got = rope_index(family=family, **on_gpu(inputs))
    assert all(tensor.is_cuda for tensor in got)
    same(got, rope_index(family=family, **inputs))
    same(got, brute_force(family, **inputs))


@pytest.mark.parametrize("padding", ["left", "right", "ragged", "holes"])
def test_padding_with_ids_or_types(family, padding):
    inputs = example(family, padding=padding)
    expected = brute_force(family, **inputs)
    for absent in ("input_ids", "mm_token_type_ids", "neither"):
        changed = on_gpu({key: value for key, value in inputs.items() if key != absent})
        for validate in (None, True, False):
            same(rope_index(family=family, **changed, validate=validate), expected)


def test_random_sequences(family):
    rng = random.Random(0)
    for seed in range(200):
        padding = rng.choice(["left", "right", "ragged", "holes"])
        rows = [*random_rows(rng.randint, touching=True), [("text", 1)]]
        inputs = sequence(rows, family, padding=padding, timestamps=(0, 3), seed=seed)
        if family == "qwen2_5_vl" and inputs["video_grid_thw"] is not None:
            inputs["second_per_grid_ts"] = torch.tensor([5 * rng.random() for _ in inputs["video_grid_thw"]])
        expected = brute_force(family, **inputs)
        same(rope_index(family=family, **on_gpu(inputs)), expected)
        same(rope_index(family=family, **inputs), expected)


@pytest.mark.parametrize(
    "seconds",
    [
        None,
        SECONDS,
        [1, 3],
        torch.tensor(SECONDS),
        torch.tensor(SECONDS, dtype=torch.float64),
        torch.tensor(SECONDS, dtype=torch.bfloat16),
        torch.tensor(SECONDS, dtype=torch.float16),
        torch.tensor([1, 3]),
        torch.tensor([1, 3], dtype=torch.int8),
        torch.tensor(SECONDS + SECONDS)[::2],
    ],
    ids=lambda value: str(getattr(value, "dtype", value)),
)
@pytest.mark.parametrize("tokens_per_second", [2, 25, 257])
def test_seconds_between_frame_groups(seconds, tokens_per_second):
    rows = [[("text", 3), ("video", (600, 2, 2)), ("text", 1)], [("video", (40, 4, 4))]]
    inputs = sequence(rows, "qwen2_5_vl") | {"second_per_grid_ts": seconds}
    expected = brute_force("qwen2_5_vl", **inputs, tokens_per_second=tokens_per_second)
    same(rope_index(family="qwen2_5_vl", **inputs, tokens_per_second=tokens_per_second), expected)
    same(rope_index(family="qwen2_5_vl", **on_gpu(inputs), tokens_per_second=tokens_per_second), expected)


@pytest.mark.parametrize("absent", ["input_ids", "mm_token_type_ids"])
@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.parametrize(
    ("family", "form"), [*((family, "tensor") for family in FAMILIES), ("qwen2_5_vl", "list"), ("qwen2_5_vl", None)]
)
def test_no_host_synchronisation(family, absent, masked, form, no_synchronisation):
    inputs = example(family)
    if form != "tensor":
        inputs["second_per_grid_ts"] = SECONDS if form == "list" else None
    if not masked:
        inputs["mm_token_type_ids"] *= inputs["attention_mask"]  # padding as text
        inputs["input_ids"] *= inputs["attention_mask"]
        inputs["attention_mask"] = None
    expected = brute_force(family, **inputs)
    inputs[absent] = None
    inputs = on_gpu(inputs)
    same(no_synchronisation(lambda: rope_index(family=family, **inputs)), expected)


def test_validation_synchronises(no_synchronisation):
    # Shows that the test above can fail.
    inputs = on_gpu(example("qwen2_5_vl"))
    with pytest.raises(RuntimeError, match="called a synchronizing CUDA operation"):
        no_synchronisation(lambda: rope_index(family="qwen2_5_vl", **inputs, validate=True))


@pytest.mark.parametrize("form", ["tensor", "list"])
def test_returns_while_the_gpu_is_busy(form):
    inputs = example("qwen2_5_vl")
    expected = brute_force("qwen2_5_vl", **inputs)
    inputs = on_gpu(inputs)
    if form == "list":
        inputs["second_per_grid_ts"] = SECONDS
    rope_index(family="qwen2_5_vl", **inputs)
    torch.cuda.synchronize()
    queued = torch.cuda.Event()
    torch.cuda._sleep(2_000_000_000)  # about a second
    queued.record()
    got = rope_index(family="qwen2_5_vl", **inputs)
    assert not queued.query()
    same(got, expected)


@pytest.mark.parametrize("tokens", ["input_ids", "mm_token_type_ids"])
def test_a_captured_graph_replays_on_new_sequences(family, tokens):
    first, second = (example(family, rows) for rows in (ROWS, OTHER_ROWS))
    if family == "qwen2_5_vl":
        second["second_per_grid_ts"] = torch.tensor([2.7, 0.1])
    static = on_gpu({key: value for key, value in first.items() if key in (tokens, "attention_mask") or "grid" in key})
    rope_index(family=family, **static)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = rope_index(family=family, **static)
    for inputs in (second, first, second):
        for tensor in got:
            tensor.fill_(-1)
        for key, tensor in static.items():
            tensor.copy_(inputs[key])
        graph.replay()
        same(got, brute_force(family, **inputs))


@pytest.mark.parametrize("key", ["image_grid_thw", "video_grid_thw"])
def test_validate_refuses_what_the_cpu_refuses(family, key):
    inputs = example(family)
    if family == "qwen2_5_vl":
        inputs["second_per_grid_ts"] = None
    good = inputs[key]
    zero, swapped = good.clone(), good.flip(0)
    zero[0, 0] = 0
    for bad in (None, good[:1], good.repeat(2, 1), zero, swapped, good + 1):
        with pytest.raises(ValueError, match=f"^{key}: ") as expected:
            rope_index(family=family, **inputs | {key: bad})
        with pytest.raises(ValueError, match=f"^{key}: ") as got:
            rope_index(family=family, **on_gpu(inputs | {key: bad}), validate=True)
        assert str(got.value) == str(expected.value)
    inputs["mm_token_type_ids"][1, -1] = 3
    with pytest.raises(ValueError, match=r"^mm_token_type_ids: expected 0"):
        rope_index(family=family, **on_gpu(inputs), validate=True)


def test_devices_must_agree():
    inputs = on_gpu(example("qwen2_5_vl"))
    for key in ("attention_mask", "image_grid_thw", "video_grid_thw", "second_per_grid_ts"):
        with pytest.raises(ValueError, match=f"^{key}: expected device cuda:0, that of the tokens, got cpu"):
            rope_index(family="qwen2_5_vl", **inputs | {key: inputs[key].cpu()})


@pytest.mark.parametrize("validate", [None, False])
def test_invalid_grids_write_nothing_out_of_bounds(family, validate):
    rng = random.Random(1)
    sizes = [0, 1, 2, 3, 4, 100, 2**31 - 1, 2**31, 2**40, 2**62, -1, -2, -4, -(2**40), -(2**63), 2**63 - 1]
    inputs = on_gpu(example(family))
    inputs["second_per_grid_ts"] = None
    # Canaries next to the call's allocations: allocate blocks of the same sizes, and free every other one.
    bytes_of = [3 * 8 * 2400, 512, 1024, 8 * 400]
    canaries = [torch.full((size,), 77, dtype=torch.uint8, device="cuda") for _ in range(40) for size in bytes_of]
    canaries = [canary for index, canary in enumerate(canaries) if index // len(bytes_of) % 2]
    for _ in range(100):
        for key in ("image_grid_thw", "video_grid_thw"):
            count = rng.choice([0, 1, 2, 3, 5, 300])
            grid = [[rng.choice(sizes) for _ in range(3)] for _ in range(count)]
            inputs[key] = torch.tensor(grid, device="cuda", dtype=torch.int64).view(-1, 3)
        positions, deltas = rope_index(family=family, **inputs, validate=validate)
        assert positions.shape == (3, 2, 1200)
        assert deltas.shape == (2, 1)
    torch.cuda.synchronize()
    assert all((canary == 77).all() for canary in canaries)
