"""The one door to the kernels: each operation here runs in Triton or as its reference, with the same meaning.

`impl="auto"` chooses by the tensors' device alone: Triton on a CUDA device, the reference elsewhere. An explicit
choice never falls back. (Triton's interpreter, `TRITON_INTERPRET=1`, runs `impl="triton"` on CPU tensors.)
"""

from contextlib import AbstractContextManager, nullcontext
from typing import Literal

import torch
from torch import Tensor

from qwenvit import mrope_host, op_references
from qwenvit.arguments import DTYPES, Impl
from qwenvit.config import NORM_EPS

NormKind = Literal["rms", "layer"]


def _use_triton(impl: str, tensor: Tensor) -> bool:
    if impl not in ("auto", "triton", "reference"):
        raise ValueError(f"impl: expected 'auto', 'triton' or 'reference', got {impl!r}")
    return impl == "triton" or (impl == "auto" and tensor.is_cuda)


def _on_device_of(tensor: Tensor) -> AbstractContextManager[object]:
    """Triton launches on the current device, which need not be the tensor's."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext()


def rope_index(
    tokens: Tensor,
    image_token: int,
    video_token: int,
    mask: Tensor | None,
    image_grid_thw: Tensor | None,
    video_grid_thw: Tensor | None,
    interval: Tensor | int,
    merge: int,
    frames_apart: bool,
    impl: Impl = "auto",
) -> tuple[Tensor, Tensor]:
    """M-RoPE positions of each token; `qwenvit.rope_index` is the same with the families' rules and checks.

    Args:
        tokens: `[B, S]` integers, token ids or token types.
        image_token: the value of `tokens` that marks image tokens.
        video_token: the value that marks video tokens.
        mask: `[B, S]`, nonzero where a token counts; None for all.
        image_grid_thw: `[images, 3]` integers in patches, in order of appearance; None for none.
        video_grid_thw: `[videos, 3]`, likewise.
        interval: temporal positions between a video's frame groups, `[videos]` or one for all.
        merge: patches merged into one token, along each side.
        frames_apart: whether text stands between a video's frame groups, so that each is placed like an image.
        impl: `"triton"` trusts its inputs; `"reference"` looks at them and raises ValueError where they disagree.

    Returns:
        Positions `[3, B, S]` (temporal, height, width) and deltas `[B, 1]`, int64, on the device of `tokens`.
    """
    arguments = (tokens, image_token, video_token, mask, image_grid_thw, video_grid_thw, interval, merge, frames_apart)
    if not _use_triton(impl, tokens):
        return mrope_host.rope_index(*arguments)
    from qwenvit.kernels.rope_index import rope_index as launch  # triton is there on Linux alone, and slow to import

    with _on_device_of(tokens):
        return launch(*arguments)


def _check(name: str, tensor: Tensor, shape: tuple[int | None, ...], dtype: torch.dtype | None, like: Tensor) -> None:
    """Refuse what a kernel would misread: shape (None: any size, `...` sizes in front), dtype, device, layout."""
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name}: expected a torch.Tensor, got {type(tensor).__name__}")
    got = tuple(tensor.shape)
    if len(got) != len(shape) or any(want not in (None, size) for want, size in zip(shape, got, strict=True)):
        wanted = ", ".join("any" if size is None else str(size) for size in shape)
        raise ValueError(f"{name}: expected shape [{wanted}], got {list(got)}")
    if dtype is not None and tensor.dtype != dtype:
        raise TypeError(f"{name}: expected {dtype}, got {tensor.dtype}")
    if tensor.device != like.device:
        raise ValueError(f"{name}: expected on {like.device}, got {tensor.device}")
    if not tensor.is_contiguous():
        raise ValueError(f"{name}: expected contiguous, got strides {tensor.stride()} for shape {list(got)}")


def _check_floating(name: str, tensor: Tensor, dims: str) -> None:
    if not isinstance(tensor, Tensor) or tensor.dtype not in DTYPES.values():
        got = tensor.dtype if isinstance(tensor, Tensor) else type(tensor).__name__
        raise TypeError(f"{name}: expected a float32, bfloat16 or float16 tensor {dims}, got {got}")


def _check_norm(x: Tensor, weight: Tensor, bias: Tensor | None, kind: str, width: int) -> None:
    if not x.ndim:
        raise ValueError("x: expected shape [..., C], got a scalar")
    _check("x", x, tuple(x.shape), None, x)
    if kind not in ("rms", "layer"):
        raise ValueError(f"kind: expected 'rms' or 'layer', got {kind!r}")
    _check("weight", weight, (width,), x.dtype, x)
    if bias is not None:
        if kind == "rms":
            raise ValueError(f"bias: RMSNorm has none, expected None, got a tensor {list(bias.shape)}")
        _check("bias", bias, (width,), x.dtype, x)


def norm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    kind: NormKind = "rms",
    eps: float = NORM_EPS,
    impl: Impl = "auto",
) -> Tensor:
    """RMSNorm (arXiv:1910.07467) or LayerNorm (arXiv:1607.06450) over the last dimension, statistics in fp32.

    Args:
        x: `[..., C]`, contiguous, float32, bfloat16 or float16.
        weight: `[C]` in the dtype of `x`.
        bias: same, for LayerNorm; None for none.
        kind: which norm.
        eps: added to the mean square or the variance.
        impl: see the module; `"triton"` is for inference, no gradient flows through it.

    Returns:
        Same shape and dtype as `x`. I/O: reads x, writes as much; about 6 FLOPs an element.
    """
    _check_floating("x", x, "[..., C]")
    _check_norm(x, weight, bias, kind, x.shape[-1] if x.ndim else 1)
    if not _use_triton(impl, x):
        return op_references.norm(x, weight, bias, kind, eps)
    from qwenvit.kernels.norm import norm_op

    return norm_op(x, weight, bias, kind, eps)


def add_norm(
    x: Tensor,
    residual: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    kind: NormKind = "rms",
    eps: float = NORM_EPS,
    impl: Impl = "auto",
) -> tuple[Tensor, Tensor]:
    """The norm of `x + residual`, and that sum.

    Args:
        x: `[..., C]`, as for `norm`.
        residual: as `x`.
        weight: as for `norm`, like the arguments after it.
        bias: see there.
        kind: see there.
        eps: see there.
        impl: see there.

    Returns:
        The norm and the sum, each as `x`. `"triton"` normalises the sum before rounding it, `"reference"` after.
        I/O: reads x and residual, writes as much; about 7 FLOPs an element.
    """
    _check_floating("x", x, "[..., C]")
    _check_norm(x, weight, bias, kind, x.shape[-1])
    _check("residual", residual, tuple(x.shape), x.dtype, x)
    if not _use_triton(impl, x):
        return op_references.add_norm(x, residual, weight, bias, kind, eps)
    from qwenvit.kernels.norm import add_norm_op

    return add_norm_op(x, residual, weight, bias, kind, eps)


def merge_norm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    restore_index: Tensor | None = None,
    kind: NormKind = "rms",
    eps: float = NORM_EPS,
    norm_merged: bool = False,
    merge_unit: int = 4,
    impl: Impl = "auto",
) -> Tensor:
    """A merger up to its first GEMM: norm, patches joined into tokens, tokens put back into reading order.

    Args:
        x: `[patches, C]` as for `norm`, the patches of a token neighbours.
        weight: `[C]`, or `[merge_unit * C]` where the joined token is normalised.
        bias: likewise; None for none.
        restore_index: `[tokens]` int64, the token to put at each place (`GridPlan.restore_index`); its values are
            trusted. None where tokens lie in reading order.
        kind: which norm.
        eps: as for `norm`.
        norm_merged: whether joined tokens are normalised, as by DeepStack's mergers, and not patches.
        merge_unit: patches in a token.
        impl: see `norm`.

    Returns:
        `[patches / merge_unit, merge_unit * C]`. I/O: reads x, writes as much; about 6 FLOPs an element.
    """
    _check_floating("x", x, "[patches, C]")
    _check("x", x, (None, None), None, x)
    patches, width = x.shape
    if merge_unit < 1 or patches % merge_unit:
        raise ValueError(f"merge_unit: expected a divisor of x's {patches} patches, got {merge_unit}")
    _check_norm(x, weight, bias, kind, merge_unit * width if norm_merged else width)
    if restore_index is not None:
        _check("restore_index", restore_index, (patches // merge_unit,), torch.int64, x)
    arguments = (x, weight, bias, restore_index, kind, eps, norm_merged, merge_unit)
    if not _use_triton(impl, x):
        return op_references.merge_norm(*arguments)
    from qwenvit.kernels.spatial_merge import merge_norm_op

    return merge_norm_op(*arguments)


def spatial_merge(
    x: Tensor, mode: Literal["concat", "average"] = "concat", merge_size: int = 2, impl: Impl = "auto"
) -> Tensor:
    """Join square blocks of a feature map.

    Args:
        x: `[H, W, C]` or `[T, H, W, C]`, float32, bfloat16 or float16, with unit stride along C.
        mode: `"concat"` joins the channels of a block in reading order, `"average"` takes their mean.
        merge_size: side of a block; divides H and W.
        impl: see `norm`.

    Returns:
        `[(T,) H / merge_size, W / merge_size, C']` where C' is `merge_size² * C` or C. I/O: reads x, writes the result.
    """
    _check_floating("x", x, "[H, W, C] or [T, H, W, C]")
    if x.ndim not in (3, 4):
        raise ValueError(f"x: expected shape [H, W, C] or [T, H, W, C], got {list(x.shape)}")
    if mode not in ("concat", "average"):
        raise ValueError(f"mode: expected 'concat' or 'average', got {mode!r}")
    if merge_size < 1 or x.shape[-3] % merge_size or x.shape[-2] % merge_size:
        raise ValueError(f"merge_size: expected a divisor of H and W in x {list(x.shape)}, got {merge_size}")
    if x.stride(-1) != 1 and x.shape[-1] > 1:
        raise ValueError(f"x: expected unit stride along C, got strides {x.stride()} for shape {list(x.shape)}")
    if not _use_triton(impl, x):
        return op_references.spatial_merge(x, mode, merge_size)
    from qwenvit.kernels.spatial_merge import spatial_merge_op

    return spatial_merge_op(x, mode, merge_size) if x.ndim == 4 else spatial_merge_op(x[None], mode, merge_size)[0]


def _check_positions(
    table: Tensor, taps: Tensor, tap_weights: Tensor, patches: int | None, width: int | None, like: Tensor
) -> None:
    _check("table", table, (None, width), like.dtype, like)
    _check("taps", taps, (patches, 4), torch.int64, like)
    _check("tap_weights", tap_weights, (len(taps), 4), torch.float32, like)


def _check_order(restore_index: Tensor | None, patches: int, merge_unit: int, like: Tensor) -> None:
    if restore_index is None:
        return
    if merge_unit < 1 or patches % merge_unit:
        raise ValueError(f"merge_unit: expected a divisor of {patches} patches, got {merge_unit}")
    _check("restore_index", restore_index, (patches // merge_unit,), torch.int64, like)


def interpolate_positions(table: Tensor, taps: Tensor, tap_weights: Tensor, impl: Impl = "auto") -> Tensor:
    """Learned positions of patches: four entries of the table, weighted and summed in fp32.

    Args:
        table: `[entries, C]`, float32, bfloat16 or float16.
        taps: `[patches, 4]` int64, entries of the table (`GridPlan.position_taps`); trusted to lie in it.
        tap_weights: `[patches, 4]` fp32 (`GridPlan.position_weights`).
        impl: see `norm`.

    Returns:
        `[patches, C]` in the dtype of `table`. I/O: reads the table and 48 bytes a patch, writes the result; 8 FLOPs
        an element.
    """
    _check_floating("table", table, "[entries, C]")
    _check_positions(table, taps, tap_weights, None, None, table)
    if not _use_triton(impl, table):
        return op_references.interpolate_positions(table, taps, tap_weights)
    from qwenvit.kernels.patch_embed import interpolate_positions_op

    return interpolate_positions_op(table, taps, tap_weights)


def add_positions(
    x: Tensor,
    table: Tensor,
    taps: Tensor,
    tap_weights: Tensor,
    restore_index: Tensor | None = None,
    merge_unit: int = 4,
    impl: Impl = "auto",
) -> Tensor:
    """Embedded patches plus their learned positions, in the tower's order.

    Args:
        x: `[patches, C]`, float32, bfloat16 or float16, in reading order.
        table: `[entries, C]` in the dtype of `x`; see `interpolate_positions`, also for the next two.
        taps: `[patches, 4]`.
        tap_weights: `[patches, 4]`.
        restore_index: `[patches / merge_unit]` int64, the place in the tower's order of each token in reading order
            (`GridPlan.restore_index`); trusted to be a permutation. None for reading order.
        merge_unit: patches in a token.
        impl: see `norm`.

    Returns:
        As `x`. `"triton"` rounds once, after the sum. I/O: reads x, the table and 48 bytes a patch, writes as much as
        x; 9 FLOPs an element.
    """
    _check_floating("x", x, "[patches, C]")
    _check("x", x, (None, None), None, x)
    _check_positions(table, taps, tap_weights, x.shape[0], x.shape[1], x)
    _check_order(restore_index, x.shape[0], merge_unit, x)
    if not _use_triton(impl, x):
        return op_references.add_positions(x, table, taps, tap_weights, restore_index, merge_unit)
    from qwenvit.kernels.patch_embed import add_positions_op

    return add_positions_op(x, table, taps, tap_weights, restore_index, merge_unit)


def patch_embed(
    pixel_values: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    table: Tensor | None = None,
    taps: Tensor | None = None,
    tap_weights: Tensor | None = None,
    restore_index: Tensor | None = None,
    merge_unit: int = 4,
    impl: Impl = "auto",
) -> Tensor:
    """Patches to the tower's first hidden states: linear map, learned positions, window order.

    Args:
        pixel_values: `[patches, K]`, float32, bfloat16 or float16, in reading order; converted to the dtype of
            `weight` as they are read.
        weight: `[C, K]`, the convolution's kernel flattened, with unit stride along K; it sets the dtype. Rows that are
            a multiple of 128 bytes apart (a view of a padded tensor) are read faster.
        bias: `[C]`; None for none.
        table: as for `add_positions`, with the next two; None for no learned positions.
        taps: see there.
        tap_weights: see there.
        restore_index: see there.
        merge_unit: patches in a token.
        impl: see `norm`.

    Returns:
        `[patches, C]`. I/O: reads pixel_values, weight and table, writes the result; 2 · patches · K · C FLOPs.
    """
    _check_floating("weight", weight, "[C, K]")
    _check_floating("pixel_values", pixel_values, "[patches, K]")
    if weight.ndim != 2 or weight.stride(1) != 1:
        got = f"{list(weight.shape)} with strides {weight.stride()}"
        raise ValueError(f"weight: expected shape [C, K] with unit stride along K, got {got}")
    width, patch_dim = weight.shape
    _check("pixel_values", pixel_values, (None, patch_dim), None, weight)
    patches = pixel_values.shape[0]
    if bias is not None:
        _check("bias", bias, (width,), weight.dtype, weight)
    if table is not None and taps is not None and tap_weights is not None:
        _check_positions(table, taps, tap_weights, patches, width, weight)
    elif table is not None or taps is not None or tap_weights is not None:
        given = [name for name, x in (("table", table), ("taps", taps), ("tap_weights", tap_weights)) if x is not None]
        raise ValueError(f"table, taps, tap_weights: expected all three or none, got {', '.join(given)}")
    _check_order(restore_index, patches, merge_unit, weight)
    arguments = (pixel_values, weight, bias, table, taps, tap_weights, restore_index, merge_unit)
    if not _use_triton(impl, weight):
        return op_references.patch_embed(*arguments)
    from qwenvit.kernels.patch_embed import patch_embed_op

    return patch_embed_op(*arguments)
