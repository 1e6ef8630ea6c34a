"""M-RoPE positions of text-and-vision sequences, in two launches without a host synchronisation.

A token's positions have a closed form in three counts: the text, image and video tokens before it. A text token
advances the sequence by one position, an image or video by its extent (the longer of its height and width), so

    start(token) = text tokens before it in its row + extents of the images and videos that ended before it in its row

A token's image is found from its rank among all image tokens, by bisecting the prefix sums of the images' token counts.
`_count_tokens` writes the three counts of each chunk of a row, and the prefix sums of both modalities. `_place_tokens`
sums the counts before its own chunk and writes positions. Grids that do not match the tokens give wrong positions, but
never an address out of bounds.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from qwenvit.kernels.compile_options import COMPILE_OPTIONS

CHUNK = 256
"""Tokens per program. Smaller chunks are faster at moderate lengths, but the sums over earlier chunks grow with the
square of the number of chunks (TUNING.md)."""
SCAN = 128
"""Block size of the loops over chunk counts, grids and rows."""


@triton.jit
def _write_prefix_sums(
    grid_ptr,  # image or video grids, shape (n, 3): frame groups, rows and columns of patches
    n,
    sums_ptr,  # int64, shape (2, n + 1): the number of tokens, and the sum of extents, of the items before each item
    MERGE: tl.constexpr,
    SEPARATE_FRAME_GROUPS: tl.constexpr,
    SCAN: tl.constexpr,
):
    tokens = tl.zeros([], tl.int64)
    extent = tl.zeros([], tl.int64)
    tl.store(sums_ptr, tokens)
    tl.store(sums_ptr + n + 1, extent)
    for i_first in range(0, n, SCAN):
        o_item = i_first + tl.arange(0, SCAN)
        m_item = o_item < n
        b_t = tl.load(grid_ptr + 3 * o_item, mask=m_item, other=0).to(tl.int64)
        b_h = tl.load(grid_ptr + 3 * o_item + 1, mask=m_item, other=0).to(tl.int64) // MERGE
        b_w = tl.load(grid_ptr + 3 * o_item + 2, mask=m_item, other=0).to(tl.int64) // MERGE
        b_tokens = b_t * b_h * b_w
        b_extent = tl.maximum(b_h, b_w)
        if SEPARATE_FRAME_GROUPS:
            b_extent *= b_t
        tl.store(sums_ptr + o_item + 1, tokens + tl.cumsum(b_tokens, 0), mask=m_item)
        tl.store(sums_ptr + n + 1 + o_item + 1, extent + tl.cumsum(b_extent, 0), mask=m_item)
        tokens += tl.sum(b_tokens, 0)
        extent += tl.sum(b_extent, 0)


@triton.jit
def _load_modality_masks(
    tokens_ptr,  # token ids or token types, shape (B, S)
    mask_ptr,  # nonzero for each unmasked token, shape (B, S); None if no token is masked
    i_row,
    o_token,
    S,
    image_token,
    video_token,
):
    m_token = o_token < S
    o_flat = i_row.to(tl.int64) * S + o_token
    b_token = tl.load(tokens_ptr + o_flat, mask=m_token, other=0)
    m_kept = m_token
    if mask_ptr is not None:
        m_kept = m_kept & (tl.load(mask_ptr + o_flat, mask=m_token, other=0) != 0)
    m_image = m_kept & (b_token == image_token)
    m_video = m_kept & (b_token == video_token)
    return m_kept, m_image, m_video


@triton.jit(do_not_specialize=["S", "n_images", "n_videos", "image_token", "video_token"])
def _count_tokens(
    tokens_ptr,  # token ids or token types, shape (n_rows, S)
    mask_ptr,  # nonzero for each unmasked token, shape (n_rows, S); None if no token is masked
    image_grid_ptr,  # shape (n_images, 3): frame groups, rows and columns of patches
    video_grid_ptr,  # shape (n_videos, 3): frame groups, rows and columns of patches
    counts_ptr,  # int64: text, image and video tokens of each chunk (3, n_rows * n_chunks); then both prefix sums
    deltas_ptr,  # int64, shape (n_rows,)
    S,
    n_images,
    n_videos,
    image_token,
    video_token,
    MERGE: tl.constexpr,
    SEPARATE_FRAME_GROUPS: tl.constexpr,
    CHUNK: tl.constexpr = CHUNK,
    SCAN: tl.constexpr = SCAN,
):
    i_chunk = tl.program_id(0)
    n_chunks = tl.cdiv(S, CHUNK)
    n_counts = tl.num_programs(0) - 1  # the last program writes the prefix sums
    n_rows = n_counts // n_chunks
    if i_chunk < n_counts:
        o_token = (i_chunk % n_chunks) * CHUNK + tl.arange(0, CHUNK)
        m_kept, m_image, m_video = _load_modality_masks(
            tokens_ptr, mask_ptr, i_chunk // n_chunks, o_token, S, image_token, video_token
        )
        images = tl.sum(m_image.to(tl.int64), 0)
        videos = tl.sum(m_video.to(tl.int64), 0)
        tl.store(counts_ptr + i_chunk, tl.sum(m_kept.to(tl.int64), 0) - images - videos)
        tl.store(counts_ptr + n_counts + i_chunk, images)
        tl.store(counts_ptr + 2 * n_counts + i_chunk, videos)
    else:
        image_sums_ptr = counts_ptr + 3 * n_counts
        video_sums_ptr = image_sums_ptr + 2 * (n_images + 1)
        _write_prefix_sums(image_grid_ptr, n_images, image_sums_ptr, MERGE, False, SCAN)
        _write_prefix_sums(video_grid_ptr, n_videos, video_sums_ptr, MERGE, SEPARATE_FRAME_GROUPS, SCAN)
        for i_first in range(0, n_rows, SCAN):
            o_row = i_first + tl.arange(0, SCAN)
            tl.store(deltas_ptr + o_row, tl.full([SCAN], -(2**63), tl.int64), mask=o_row < n_rows)


@triton.jit
def _find_item(
    b_rank,  # number of tokens of this modality before a token: a block or a scalar
    grid_ptr,  # image or video grids, shape (n, 3): frame groups, rows and columns of patches
    n,
    sums_ptr,  # int64, shape (2, n + 1), written by `_write_prefix_sums`
    MERGE: tl.constexpr,
    SEPARATE_FRAME_GROUPS: tl.constexpr,
):
    """Return the item that contains a rank, the rank's frame group, row and column there, and the extents before it."""
    b_item = b_rank * 0
    b_upper = b_item + n + 1
    span = n + 1
    while span > 1:  # bisect: sums[b_item] <= b_rank < sums[b_upper]
        span = (span + 1) // 2
        b_middle = (b_item + b_upper) // 2
        m_right = tl.load(sums_ptr + b_middle) <= b_rank
        b_item = tl.where(m_right, b_middle, b_item)
        b_upper = tl.where(m_right, b_upper, b_middle)
    m_item = b_item < n  # ranks past the last grid belong to no item
    b_h = tl.load(grid_ptr + 3 * b_item + 1, mask=m_item, other=0).to(tl.int64) // MERGE
    b_w = tl.load(grid_ptr + 3 * b_item + 2, mask=m_item, other=0).to(tl.int64) // MERGE
    b_offset = tl.where(m_item, b_rank - tl.load(sums_ptr + b_item), 0)
    b_frame = b_offset // tl.maximum(b_h * b_w, 1)
    b_offset -= b_frame * b_h * b_w
    b_y = b_offset // tl.maximum(b_w, 1)
    b_x = b_offset - b_y * b_w
    b_extent = tl.load(sums_ptr + n + 1 + b_item)
    if SEPARATE_FRAME_GROUPS:
        b_extent += b_frame * tl.maximum(b_h, b_w)
    return b_item, b_frame, b_y, b_x, b_extent


@triton.jit(do_not_specialize=["scale", "S", "n_images", "n_videos", "image_token", "video_token"])
def _place_tokens(
    tokens_ptr,  # token ids or token types, shape (n_rows, S)
    mask_ptr,  # nonzero for each unmasked token, shape (n_rows, S); None if no token is masked
    image_grid_ptr,  # shape (n_images, 3): frame groups, rows and columns of patches
    video_grid_ptr,  # shape (n_videos, 3): frame groups, rows and columns of patches
    seconds_ptr,  # seconds between frame groups of each video, shape (n_videos,); None for 1 each
    counts_ptr,  # int64, written by `_count_tokens`
    positions_ptr,  # int64, shape (3, n_rows, S)
    deltas_ptr,  # int64, shape (n_rows,)
    scale,  # temporal positions per second
    S,
    n_images,
    n_videos,
    image_token,
    video_token,
    MERGE: tl.constexpr,
    SEPARATE_FRAME_GROUPS: tl.constexpr,
    CHUNK: tl.constexpr = CHUNK,
    SCAN: tl.constexpr = SCAN,
):
    i_chunk = tl.program_id(0)
    n_chunks = tl.cdiv(S, CHUNK)
    n_counts = tl.num_programs(0)
    i_row = i_chunk // n_chunks
    i_first_chunk = i_row * n_chunks  # of the row
    text_before = tl.zeros([], tl.int64)
    images_before = tl.zeros([], tl.int64)
    images_before_row = tl.zeros([], tl.int64)
    videos_before = tl.zeros([], tl.int64)
    videos_before_row = tl.zeros([], tl.int64)
    n_kept = tl.zeros([], tl.int64)
    for i_first in range(0, i_first_chunk + n_chunks, SCAN):
        o_chunk = i_first + tl.arange(0, SCAN)
        m_row = (o_chunk >= i_first_chunk) & (o_chunk < i_first_chunk + n_chunks)
        m_before = o_chunk < i_chunk
        m_known = o_chunk < i_first_chunk + n_chunks
        b_text = tl.load(counts_ptr + o_chunk, mask=m_row, other=0)
        b_images = tl.load(counts_ptr + n_counts + o_chunk, mask=m_known, other=0)
        b_videos = tl.load(counts_ptr + 2 * n_counts + o_chunk, mask=m_known, other=0)
        text_before += tl.sum(tl.where(m_before, b_text, 0), 0)
        images_before += tl.sum(tl.where(m_before, b_images, 0), 0)
        videos_before += tl.sum(tl.where(m_before, b_videos, 0), 0)
        images_before_row += tl.sum(tl.where(m_row, 0, b_images), 0)
        videos_before_row += tl.sum(tl.where(m_row, 0, b_videos), 0)
        n_kept += tl.sum(tl.where(m_row, b_text + b_images + b_videos, 0), 0)

    o_token = (i_chunk % n_chunks) * CHUNK + tl.arange(0, CHUNK)
    m_kept, m_image, m_video = _load_modality_masks(tokens_ptr, mask_ptr, i_row, o_token, S, image_token, video_token)
    b_image = m_image.to(tl.int64)
    b_video = m_video.to(tl.int64)
    b_text = m_kept.to(tl.int64) - b_image - b_video
    b_text_before = text_before + tl.cumsum(b_text, 0) - b_text
    b_image_rank = images_before + tl.cumsum(b_image, 0) - b_image
    b_video_rank = videos_before + tl.cumsum(b_video, 0) - b_video

    image_sums_ptr = counts_ptr + 3 * n_counts
    video_sums_ptr = image_sums_ptr + 2 * (n_images + 1)
    _, b_image_frame, b_image_y, b_image_x, b_image_extent = _find_item(
        b_image_rank, image_grid_ptr, n_images, image_sums_ptr, MERGE, False
    )
    _, _, _, _, b_image_extent_row = _find_item(
        images_before_row, image_grid_ptr, n_images, image_sums_ptr, MERGE, False
    )
    b_video_item, b_video_frame, b_video_y, b_video_x, b_video_extent = _find_item(
        b_video_rank, video_grid_ptr, n_videos, video_sums_ptr, MERGE, SEPARATE_FRAME_GROUPS
    )
    _, _, _, _, b_video_extent_row = _find_item(
        videos_before_row, video_grid_ptr, n_videos, video_sums_ptr, MERGE, SEPARATE_FRAME_GROUPS
    )
    b_start = b_text_before + (b_image_extent - b_image_extent_row) + (b_video_extent - b_video_extent_row)

    if SEPARATE_FRAME_GROUPS:
        b_time = b_video_frame * 0
    elif seconds_ptr is not None:  # both products with torch's type promotion and rounding, as in transformers
        b_seconds = tl.load(seconds_ptr + b_video_item, mask=m_video & (b_video_item < n_videos), other=0)
        if b_seconds.dtype.is_floating():
            compute_dtype: tl.constexpr = tl.float64 if b_seconds.dtype == tl.float64 else tl.float32
            b_step = (b_seconds.to(compute_dtype) * scale.to(compute_dtype)).to(b_seconds.dtype)
            b_time = (
                (b_video_frame.to(b_seconds.dtype).to(compute_dtype) * b_step.to(compute_dtype))
                .to(b_seconds.dtype)
                .to(tl.int64)
            )
        else:
            b_time = b_video_frame * (b_seconds * scale.to(b_seconds.dtype))
    else:
        b_time = b_video_frame * scale
    b_time = b_start + tl.where(m_image, b_image_frame, tl.where(m_video, b_time, 0))
    b_y = b_start + tl.where(m_image, b_image_y, tl.where(m_video, b_video_y, 0))
    b_x = b_start + tl.where(m_image, b_image_x, tl.where(m_video, b_video_x, 0))

    m_token = o_token < S
    o_flat = i_row.to(tl.int64) * S + o_token
    o_axis = (n_counts // n_chunks).to(tl.int64) * S
    tl.store(positions_ptr + o_flat, tl.where(m_kept, b_time, 0), mask=m_token)
    tl.store(positions_ptr + o_axis + o_flat, tl.where(m_kept, b_y, 0), mask=m_token)
    tl.store(positions_ptr + 2 * o_axis + o_flat, tl.where(m_kept, b_x, 0), mask=m_token)

    # Integer atomics are deterministic. A row without unmasked tokens has a delta of 0.
    b_delta = tl.where(m_kept, tl.maximum(b_time, tl.maximum(b_y, b_x)) + 1 - n_kept, -(2**63))
    delta = tl.where(n_kept == 0, 0, tl.max(b_delta, 0))
    tl.atomic_max(deltas_ptr + i_row, delta)


@torch.compiler.disable  # Inductor (torch 2.11) drops constexprs that have defaults, and then cannot compile the launch
def launch_rope_index(
    tokens: Tensor,
    image_token: int,
    video_token: int,
    mask: Tensor | None,
    image_grid_thw: Tensor | None,
    video_grid_thw: Tensor | None,
    seconds: Tensor | None,
    scale: int,
    merge: int,
    separate_frame_groups: bool,
) -> tuple[Tensor, Tensor]:
    """Return positions `[3, B, S]` and deltas `[B, 1]`, int64, without a host synchronisation.

    `qwenvit.ops.rope_index` documents the arguments (`separate_frame_groups` is its `frames_apart`).

    I/O: reads tokens and mask twice (2·B·S of each), writes 24·B·S bytes of positions. Bisecting n grids costs
    log2(n) cached reads per token.
    """
    n_rows, S = tokens.shape
    n_images = 0 if image_grid_thw is None else image_grid_thw.shape[0]
    n_videos = 0 if video_grid_thw is None else video_grid_thw.shape[0]
    n_counts = -(-S // CHUNK) * n_rows
    tokens = tokens.contiguous()
    mask = None if mask is None else mask.contiguous()
    image_grid = tokens if image_grid_thw is None else image_grid_thw.contiguous()  # not read: n_images is 0
    video_grid = tokens if video_grid_thw is None else video_grid_thw.contiguous()
    seconds = None if seconds is None else seconds.contiguous()
    counts = tokens.new_empty(3 * n_counts + 2 * (n_images + 1) + 2 * (n_videos + 1), dtype=torch.int64)
    positions = tokens.new_empty((3, n_rows, S), dtype=torch.int64)
    deltas = tokens.new_empty((n_rows, 1), dtype=torch.int64)
    sizes = (S, n_images, n_videos, image_token, video_token, merge, separate_frame_groups)
    with torch.cuda.device_of(tokens):  # Triton launches on the current device, which may not be the tensors'
        _count_tokens[(n_counts + 1,)](tokens, mask, image_grid, video_grid, counts, deltas, *sizes, **COMPILE_OPTIONS)
        _place_tokens[(n_counts,)](
            tokens, mask, image_grid, video_grid, seconds, counts, positions, deltas, scale, *sizes, **COMPILE_OPTIONS
        )
    return positions, deltas
