"""What `bench_e2e.py` measures qwenvit against: transformers' tower in five ways, timm's, and vLLM's own figures.

transformers' tower runs as its users run it: pixel values and the grid in, every position computed in the call. Where
it is compiled, what depends on the grid alone is given to it, computed before, since nothing else compiles whole.
"""

import copy
import importlib
from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.fx.experimental._config
from torch import Tensor, nn

from common.hf_towers import forward
from e2e.cases import Case
from e2e.timing import Outputs
from peers.attention import fa2, fa3
from qwenvit.config.vision_config import VisionConfig

Call = Callable[[], Outputs]
Prepare = Callable[[Case, Tensor], Call]
"""Case and pixel values -> the call to time; ValueError with the reason where there is none."""

FLAGS = (
    "transformers: its tower in eager mode, `tower(pixel_values, grid_thw)`; FA2 is "
    "`torch.nn.attention.varlen.varlen_attn`, FA3 is `_vllm_fa3_C.fwd`, either as an attention function named "
    "`flash_…`. compiled: `torch.compile(tower, fullgraph=True, dynamic=True)` with FA3 (FA2 without it), positions, "
    "`cu_seqlens` and `max_seqlen` computed before; + graph: the same in a CUDA graph of exactly this input. timm: "
    "`qwen3_vit_*_enc` (no DeepStack, one image), each block compiled for this size, in a CUDA graph. vLLM: what its "
    "own tower took in another process of the same machine; graph is the faster of a CUDA graph of exactly this input "
    "and its own manager's."
)
SDPA, TIMM = "transformers sdpa", "timm"
NAMES = {"sdpa": SDPA, "fa2": "transformers FA2", "fa3": "transformers FA3", "compiled": "transformers compiled",
         "timm": TIMM}  # fmt: skip


@torch.library.custom_op("bench_e2e::fa3", mutates_args=())
def fa3_op(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, longest: int) -> Tensor:
    """FlashAttention 3 as one operation to torch.compile."""
    return fa3(q, k, v, cu_seqlens, longest)


@fa3_op.register_fake
def _(q: Tensor, *_: object) -> Tensor:
    return torch.empty_like(q, memory_format=torch.contiguous_format)


def register(name: str, attention: Callable[..., Tensor]) -> str:
    """Make an attention function over `[S, H, D]` known to transformers; its name is to hold "flash"."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    def run(_: nn.Module, q: Tensor, k: Tensor, v: Tensor, *__: object, **kwargs: Any) -> tuple[Tensor, None]:
        q, k, v = (x[0].transpose(0, 1) for x in (q, k, v))
        return attention(q, k, v, kwargs["cu_seq_lens_q"], kwargs["max_length_q"])[None], None

    ALL_ATTENTION_FUNCTIONS.register(name, run)
    return name


def eager(tower: nn.Module, attention: str) -> Prepare:
    """transformers' tower as it is, under an attention function."""

    def prepare(case: Case, pixels: Tensor) -> Call:
        grid = case.grid_thw()

        def call() -> Outputs:
            tower.config._attn_implementation = attention
            _, tokens, deepstack = forward(tower, pixels, grid)
            return [tokens, *deepstack]

        return call

    return prepare


def metadata(case: Case, config: VisionConfig, device: torch.device) -> dict[str, Any]:
    """What transformers' tower computes from the grid, by its own functions and under the names it looks for.

    Raises:
        ValueError: a transformers that computes it within the tower.
    """
    try:
        vision = importlib.import_module("transformers.vision_utils")
        interpolate = vision.get_vision_interpolation_indices_and_weights
    except (ImportError, AttributeError) as error:
        raise ValueError("this transformers takes no precomputed positions") from error
    grid, merge, side = case.grid_thw().to(device), config.spatial_merge_size, config.position_grid
    given = {"cu_seqlens": vision.get_vision_cu_seqlens(grid)}
    given["max_seqlen"] = int(given["cu_seqlens"].diff().max())
    given["position_ids"] = vision.get_vision_position_ids(grid, merge)
    if config.window_size is not None:
        index, windows = vision.get_vision_window_index(grid, merge, config.window_size, config.patch_size)
        given |= {"window_index": index.to(device), "cu_window_seqlens": windows.to(device)}
        given["max_window_seqlen"] = int(windows.diff().max())
    if config.num_position_embeddings is not None:
        taps = interpolate(grid, side, mode="bilinear", align_corners=True, spatial_merge_size=merge)
        given |= dict(zip(("interp_indices", "interp_weights"), taps, strict=True))
    return given


def compile_whole(tower: nn.Module, attention: str, **options: Any) -> Callable[..., Any]:
    """transformers' tower under torch.compile, with the same weights and a config of its own."""
    own = copy.deepcopy(tower, {id(parameter): parameter for parameter in tower.parameters()})
    own.config._attn_implementation = attention
    torch.fx.experimental._config.use_duck_shape = False  # one image's length equals its patches; a batch's does not
    return torch.compile(own, fullgraph=True, **{"dynamic": True, **options})


def compiled(fast: Callable[..., Any], config: VisionConfig, graph: bool) -> Prepare:
    """What `compile_whole` made, and whether it goes into a CUDA graph."""

    def prepare(case: Case, pixels: Tensor) -> Call:
        given = metadata(case, config, pixels.device)
        unread = torch.zeros(2, 3, dtype=torch.int64, device=pixels.device)  # all that comes of a grid is given

        @torch.no_grad()
        def call() -> Outputs:
            output = fast(pixels, grid_thw=unread, **given)
            return [output.pooler_output, *(getattr(output, "deepstack_features", None) or [])]

        return captured(call) if graph else call

    return prepare


def captured(call: Call) -> Call:
    """The same in a CUDA graph, which reads the very tensors that the call holds; results are copied out."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        outputs = call()

    def replay(_: Call = call) -> Outputs:  # holds the call, without whose tensors the graph would read others' memory
        graph.replay()
        return [output.clone() for output in outputs]

    return replay


def transformers_rivals(
    tower: nn.Module, config: VisionConfig, kinds: Iterable[str], with_fa3: bool
) -> dict[str, Prepare]:
    """Those asked for, by name."""
    rivals: dict[str, Prepare] = {}
    for kind in kinds:
        if kind == "sdpa":
            rivals[NAMES[kind]] = eager(tower, "sdpa")
        elif kind == "fa2" or (kind == "fa3" and with_fa3):
            rivals[NAMES[kind]] = eager(tower, register(f"flash_{kind}", {"fa2": fa2, "fa3": fa3}[kind]))
        elif kind == "compiled":
            fast = compile_whole(tower, register("flash_op", fa3_op if with_fa3 else fa2))
            rivals[NAMES[kind]] = compiled(fast, config, graph=False)
            rivals[f"{NAMES[kind]} + graph"] = compiled(fast, config, graph=True)
    return rivals
