"""transformers' tower: eager under each attention function, compiled, and compiled in a CUDA graph.

The tower receives pixel values and the grid, and computes every position inside the call, as its users run it. The
compiled tower receives everything that depends on the grid alone as precomputed inputs; torch.compile breaks the graph
otherwise.
"""

import importlib
from collections.abc import Callable, Collection, Iterable
from typing import Any

import torch
import torch.fx.experimental._config
from torch import Tensor, nn

from common.hf_towers import forward, sharing_copy
from common.tower_inputs import Case, Outputs, PrepareCall, TowerCall
from peers.attention import Attention, fa2, fa3, fa4
from peers.cuda_graph import capture
from peers.rivals import RIVAL_NAMES
from qwenvit.config.vision_config import VisionConfig


def custom_operation(attention: Attention) -> Attention:
    """Return an attention function as an operation that torch.compile does not trace into."""
    operation = torch.library.custom_op(f"bench_e2e::{attention.__name__}", attention, mutates_args=())
    operation.register_fake(lambda q, *_: torch.empty_like(q, memory_format=torch.contiguous_format))
    return operation


EAGER = {"fa2": fa2, "fa3": fa3, "fa4": fa4}
"""Attention functions by the word that `--rivals` takes."""
COMPILED = {"fa2": fa2, "fa3": custom_operation(fa3), "fa4": custom_operation(fa4)}
"""The same for a compiled tower. torch.compile knows FA2's operation, which is torch's own."""


def register_attention(name: str, attention: Callable[..., Tensor]) -> str:
    """Register an attention function over `[S, H, D]` with transformers; return its name.

    The name has to contain "flash": transformers then passes `cu_seq_lens_q` and `max_length_q`.
    """
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    def run(_: nn.Module, q: Tensor, k: Tensor, v: Tensor, *__: object, **kwargs: Any) -> tuple[Tensor, None]:
        q, k, v = (x[0].transpose(0, 1) for x in (q, k, v))
        return attention(q, k, v, kwargs["cu_seq_lens_q"], kwargs["max_length_q"])[None], None

    ALL_ATTENTION_FUNCTIONS.register(name, run)
    return name


def eager(tower: nn.Module, attention: str) -> PrepareCall:
    """Run transformers' tower in eager mode with the named attention function."""

    def prepare(case: Case, pixels: Tensor) -> TowerCall:
        grid = case.grid_thw()

        def call() -> Outputs:
            tower.config._attn_implementation = attention
            _, tokens, deepstack = forward(tower, pixels, grid)
            return [tokens, *deepstack]

        return call

    return prepare


def precomputed_inputs(case: Case, config: VisionConfig, device: torch.device) -> dict[str, Any]:
    """Compute what transformers' tower derives from the grid, by its own functions, keyed by its argument names.

    Raises:
        ValueError: this transformers has no arguments for precomputed positions.
    """
    try:
        vision = importlib.import_module("transformers.vision_utils")
        interpolate = vision.get_vision_interpolation_indices_and_weights
    except (ImportError, AttributeError) as error:
        raise ValueError("this transformers takes no precomputed positions") from error
    grid, merge, side = case.grid_thw().to(device), config.spatial_merge_size, config.position_grid
    inputs = {"cu_seqlens": vision.get_vision_cu_seqlens(grid)}
    inputs["max_seqlen"] = int(inputs["cu_seqlens"].diff().max())
    inputs["position_ids"] = vision.get_vision_position_ids(grid, merge)
    if config.window_size is not None:
        index, windows = vision.get_vision_window_index(grid, merge, config.window_size, config.patch_size)
        inputs |= {"window_index": index.to(device), "cu_window_seqlens": windows.to(device)}
        inputs["max_window_seqlen"] = int(windows.diff().max())
    if config.num_position_embeddings is not None:
        interpolation = interpolate(grid, side, mode="bilinear", align_corners=True, spatial_merge_size=merge)
        inputs |= dict(zip(("interp_indices", "interp_weights"), interpolation, strict=True))
    return inputs


def compile_tower(tower: nn.Module, attention: str, **options: Any) -> Callable[..., Any]:
    """Compile a copy of transformers' tower that shares its weights and has a config of its own."""
    twin = sharing_copy(tower)
    twin.config._attn_implementation = attention
    # A single image's sequence length equals its number of patches; a batch's does not.
    torch.fx.experimental._config.use_duck_shape = False
    return torch.compile(twin, fullgraph=True, **{"dynamic": True, **options})


def compiled(tower: Callable[..., Any], config: VisionConfig, in_graph: bool) -> PrepareCall:
    """Run a tower from `compile_tower`, in a CUDA graph if `in_graph`."""

    def prepare(case: Case, pixels: Tensor) -> TowerCall:
        inputs = precomputed_inputs(case, config, pixels.device)
        # The tower requires a grid and does not read it: all that depends on it is precomputed.
        unused_grid = torch.zeros(2, 3, dtype=torch.int64, device=pixels.device)

        @torch.no_grad()
        def call() -> Outputs:
            output = tower(pixels, grid_thw=unused_grid, **inputs)
            return [output.pooler_output, *(getattr(output, "deepstack_features", None) or [])]

        return capture(call) if in_graph else call

    return prepare


def transformers_rivals(
    tower: nn.Module, config: VisionConfig, kinds: Iterable[str], loaded: Collection[str]
) -> dict[str, PrepareCall]:
    """Return transformers' tower in the ways named by `kinds`, by the rival's name.

    Args:
        tower: transformers' tower.
        config: its config.
        kinds: keys of `RIVAL_NAMES`; timm is built elsewhere, and `fa3` and `fa4` are left out where not loaded.
            `compiled` is built with each of the two that is loaded, and with FlashAttention 2 where neither is.
        loaded: those of `fa3` and `fa4` that `peers.attention.load_libraries` has loaded.

    Raises:
        ValueError: a kind that nothing builds.
    """
    rivals: dict[str, PrepareCall] = {}
    for kind in kinds:
        if kind == "sdpa":
            rivals[RIVAL_NAMES[kind]] = eager(tower, "sdpa")
        elif kind == "fa2" or kind in loaded:
            rivals[RIVAL_NAMES[kind]] = eager(tower, register_attention(f"flash_{kind}", EAGER[kind]))
        elif kind == "compiled":
            for library in loaded or ["fa2"]:
                name = register_attention(f"flash_{library}_compiled", COMPILED[library])
                compiled_tower = compile_tower(tower, name)
                rival = f"{RIVAL_NAMES[kind]} {library.upper()}"
                rivals[rival] = compiled(compiled_tower, config, in_graph=False)
                rivals[f"{rival} + graph"] = compiled(compiled_tower, config, in_graph=True)
        elif kind not in RIVAL_NAMES:
            raise ValueError(f"kinds: expected some of {', '.join(RIVAL_NAMES)}, got {kind!r}")
    return rivals
