"""Resizing decoded frames, normalising them and cutting them into the tower's patches."""

import math

import torch
from torch import Tensor

from qwenvit.arguments import Impl
from qwenvit.ops import reference
from qwenvit.ops.checks import check, check_floating, check_tensor
from qwenvit.ops.dispatch import use_triton
from qwenvit.ops.resampling import RESIZE_RULES, ResizeRule, resize_plan


def resize_patches(
    frames: Tensor,
    height: int,
    width: int,
    levels: Tensor,
    *,
    rule: ResizeRule,
    vertical_first: bool = False,
    patch_size: int,
    temporal_patch_size: int,
    merge_size: int,
    out: Tensor | None = None,
    impl: Impl = "auto",
) -> Tensor:
    """Resize 8-bit frames by bicubic interpolation with antialiasing, normalise them and cut them into patches.

    The bytes equal those of Pillow's or torch's resize on the CPU. Bytes are normalised by a table, so that the values
    are exactly those that the caller computed for each byte.

    I/O: reads the frames, writes and reads the bytes between the passes, writes the patches.

    Args:
        frames: `[F, 3, H, W]` uint8 with any strides. The last frame is repeated to fill its group of
            `temporal_patch_size`: a single frame is a still.
        height: after resizing, in pixels; a multiple of `patch_size · merge_size`.
        width: after resizing, likewise.
        levels: `[3, 256]`: the normalised value of each byte of red, green and blue; float32, bfloat16 or float16.
        rule: `"pillow"` for `Image.resize(…, BICUBIC)`, `"torch"` for `F.interpolate` of uint8 on the CPU.
        vertical_first: run the vertical pass before the horizontal one, as Pillow 13 does for some sizes. Each pass
            rounds to 8 bits, so the order matters.
        patch_size: P, side of a patch in pixels.
        temporal_patch_size: T, frames in a patch.
        merge_size: side of a merged token in patches.
        out: where to write; None allocates.
        impl: `"triton"`, `"reference"` or `"auto"` (Triton on a CUDA device).

    Returns:
        `[patches, 3·T·P·P]` in the dtype of `levels`, in merge-block order.

    Raises:
        TypeError: an argument has another type or dtype.
        ValueError: an unknown rule; sizes that do not fit or are not positive; shapes, devices or strides that do not
            fit together; `"triton"` is asked for gradients; the current stream is being captured in a CUDA graph.
    """
    if not isinstance(frames, Tensor) or frames.dtype != torch.uint8:
        got = frames.dtype if isinstance(frames, Tensor) else type(frames).__name__
        raise TypeError(f"frames: expected a uint8 tensor [frames, 3, height, width], got {got}")
    fits = frames.ndim == 4 and frames.shape[1] == 3 and frames.numel() > 0
    check(fits, "frames", "[frames, 3, height, width] with at least one pixel", list(frames.shape))
    check(rule in RESIZE_RULES, "rule", f"one of {RESIZE_RULES}", repr(rule))
    sizes = {"patch_size": patch_size, "temporal_patch_size": temporal_patch_size, "merge_size": merge_size}
    for name, size in sizes.items():
        check(isinstance(size, int) and size > 0, name, "a positive integer", repr(size))
    factor = patch_size * merge_size
    for name, size in (("height", height), ("width", width)):
        check(isinstance(size, int) and size > 0 and size % factor == 0, name, f"a positive multiple of {factor}", size)
    check_floating("levels", levels, "[3, 256]")
    check_tensor("levels", levels, (3, 256), None, frames)
    grid = (math.ceil(len(frames) / temporal_patch_size), height // patch_size, width // patch_size)
    shape = (math.prod(grid), 3 * temporal_patch_size * patch_size**2)
    if out is None:
        out = levels.new_empty(shape)
    check_tensor("out", out, shape, levels.dtype, frames)
    if frames.is_cuda and torch.cuda.is_current_stream_capturing():
        raise ValueError("frames: expected no capture in a CUDA graph, which would keep the address of a cached table")
    plan = resize_plan((frames.shape[2], frames.shape[3]), (height, width), rule, vertical_first, pinned=frames.is_cuda)
    if not use_triton(impl, levels, out):
        return out.copy_(reference.resize_patches(frames, plan, levels, patch_size, temporal_patch_size, merge_size))
    from qwenvit.kernels.preprocess import resize as kernels

    tables = plan.tables(plan.table.to(frames.device, non_blocking=True))
    passes = [(one.vertical, one.precision, table) for one, table in zip(plan.passes, tables, strict=True)]
    kernels.resize_patches(frames, passes, levels, out, grid, patch_size, temporal_patch_size, merge_size)
    return out
