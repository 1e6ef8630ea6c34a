"""M-RoPE positions of text-and-vision sequences: two launches, nothing read back.

Every position is a closed form of three counts: how many text, image and video tokens come before a token. A text
token moves the sequence on by one position, an image or video by its longer side, so

    start(token) = text tokens before it in its row + extents of the images and videos that ended before it in its row

and the image a token belongs to is found by its rank among all image tokens, in a table of the grids' running sums.
`_count_tokens` writes, for each chunk of a row, its three counts, and the two tables; `_place_tokens` sums the counts
before its own chunk and writes positions. A grid that does not fit the tokens gives wrong positions, never an
address outside.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

CHUNK = 256
"""Tokens a program. GPU time of both launches on an H200, 8k to 32k tokens: 128: 9–12 µs, 256: 10–13, 512: 13–16,
1024: 18–22; but the sum over earlier chunks grows with their square, so not the smallest."""
SCAN = 128
"""Chunk counts, grids or rows read at a time by the loops over them."""


@triton.jit
def _tabulate(
    grid_ptr,  # image or video grids, shape (n, 3): frame groups, rows and columns of patches
    n,
    table_ptr,  # int64, shape (2, n + 1): tokens, and extents, of the items before each item
    MERGE: tl.constexpr,
    FRAMES_APART: tl.constexpr,
    SCAN: tl.constexpr,
):
    tokens = tl.zeros([], tl.int64)
    extent = tl.zeros([], tl.int64)
    tl.store(table_ptr, tokens)
    tl.store(table_ptr + n + 1, extent)
    for i_first in range(0, n, SCAN):
        o_item = i_first + tl.arange(0, SCAN)
        m_item = o_item < n
        b_t = tl.load(grid_ptr + 3 * o_item, mask=m_item, other=0).to(tl.int64)
        b_h = tl.load(grid_ptr + 3 * o_item + 1, mask=m_item, other=0).to(tl.int64) // MERGE
        b_w = tl.load(grid_ptr + 3 * o_item + 2, mask=m_item, other=0).to(tl.int64) // MERGE
        b_tokens = b_t * b_h * b_w
        b_extent = tl.maximum(b_h, b_w)
        if FRAMES_APART:
            b_extent *= b_t
        tl.store(table_ptr + o_item + 1, tokens + tl.cumsum(b_tokens, 0), mask=m_item)
        tl.store(table_ptr + n + 1 + o_item + 1, extent + tl.cumsum(b_extent, 0), mask=m_item)
        tokens += tl.sum(b_tokens, 0)
        extent += tl.sum(b_extent, 0)


@triton.jit
def _kinds(
    tokens_ptr,  # token ids or token types, shape (B, S)
    mask_ptr,  # nonzero where a token is kept, shape (B, S); None where all are
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
    mask_ptr,  # shape (n_rows, S); None where every token is kept
    image_grid_ptr,  # shape (n_images, 3)
    video_grid_ptr,  # shape (n_videos, 3)
    counts_ptr,  # int64, shape (3, n_rows * n_chunks): text, image and video tokens of each chunk; then both tables
    deltas_ptr,  # int64, shape (n_rows,)
    S,
    n_images,
    n_videos,
    image_token,
    video_token,
    MERGE: tl.constexpr,
    FRAMES_APART: tl.constexpr,
    CHUNK: tl.constexpr = CHUNK,
    SCAN: tl.constexpr = SCAN,
):
    i_chunk = tl.program_id(0)
    n_chunks = tl.cdiv(S, CHUNK)
    n_counts = tl.num_programs(0) - 1  # the last program tabulates
    n_rows = n_counts // n_chunks
    if i_chunk < n_counts:
        o_token = (i_chunk % n_chunks) * CHUNK + tl.arange(0, CHUNK)
        m_kept, m_image, m_video = _kinds(
            tokens_ptr, mask_ptr, i_chunk // n_chunks, o_token, S, image_token, video_token
        )
        images = tl.sum(m_image.to(tl.int64), 0)
        videos = tl.sum(m_video.to(tl.int64), 0)
        tl.store(counts_ptr + i_chunk, tl.sum(m_kept.to(tl.int64), 0) - images - videos)
        tl.store(counts_ptr + n_counts + i_chunk, images)
        tl.store(counts_ptr + 2 * n_counts + i_chunk, videos)
    else:
        image_table_ptr = counts_ptr + 3 * n_counts
        video_table_ptr = image_table_ptr + 2 * (n_images + 1)
        _tabulate(image_grid_ptr, n_images, image_table_ptr, MERGE, False, SCAN)
        _tabulate(video_grid_ptr, n_videos, video_table_ptr, MERGE, FRAMES_APART, SCAN)
        for i_first in range(0, n_rows, SCAN):
            o_row = i_first + tl.arange(0, SCAN)
            tl.store(deltas_ptr + o_row, tl.full([SCAN], -(2**63), tl.int64), mask=o_row < n_rows)


@triton.jit
def _locate(
    b_rank,  # vision tokens of this kind before a token: a block or a scalar
    grid_ptr,  # shape (n, 3)
    n,
    table_ptr,  # as `_tabulate` wrote it, shape (2, n + 1)
    MERGE: tl.constexpr,
    FRAMES_APART: tl.constexpr,
):
    """The item a rank falls into, its place there, and the extents of all that ended before."""
    b_item = b_rank * 0
    b_past = b_item + n + 1
    span = n + 1
    while span > 1:  # bisect: table[item] <= rank < table[past]
        span = (span + 1) // 2
        b_middle = (b_item + b_past) // 2
        m_right = tl.load(table_ptr + b_middle) <= b_rank
        b_item = tl.where(m_right, b_middle, b_item)
        b_past = tl.where(m_right, b_past, b_middle)
    m_item = b_item < n  # ranks past the last grid belong to none
    b_h = tl.load(grid_ptr + 3 * b_item + 1, mask=m_item, other=0).to(tl.int64) // MERGE
    b_w = tl.load(grid_ptr + 3 * b_item + 2, mask=m_item, other=0).to(tl.int64) // MERGE
    b_within = tl.where(m_item, b_rank - tl.load(table_ptr + b_item), 0)
    b_frame = b_within // tl.maximum(b_h * b_w, 1)
    b_within -= b_frame * b_h * b_w
    b_y = b_within // tl.maximum(b_w, 1)
    b_x = b_within - b_y * b_w
    b_extent = tl.load(table_ptr + n + 1 + b_item)
    if FRAMES_APART:
        b_extent += b_frame * tl.maximum(b_h, b_w)
    return b_item, b_frame, b_y, b_x, b_extent


@triton.jit(do_not_specialize=["scale", "S", "n_images", "n_videos", "image_token", "video_token"])
def _place_tokens(
    tokens_ptr,  # this and the next three as in `_count_tokens`
    mask_ptr,
    image_grid_ptr,
    video_grid_ptr,
    seconds_ptr,  # seconds between frame groups of each video, shape (n_videos,); None for 1 each
    counts_ptr,  # as `_count_tokens` wrote it
    positions_ptr,  # int64, shape (3, n_rows, S)
    deltas_ptr,  # int64, shape (n_rows,)
    scale,  # temporal positions a second
    S,
    n_images,
    n_videos,
    image_token,
    video_token,
    MERGE: tl.constexpr,
    FRAMES_APART: tl.constexpr,
    CHUNK: tl.constexpr = CHUNK,
    SCAN: tl.constexpr = SCAN,
):
    i_chunk = tl.program_id(0)
    n_chunks = tl.cdiv(S, CHUNK)
    n_counts = tl.num_programs(0)
    i_row = i_chunk // n_chunks
    i_row_chunk = i_row * n_chunks
    text_before = tl.zeros([], tl.int64)
    images_before = tl.zeros([], tl.int64)
    images_before_row = tl.zeros([], tl.int64)
    videos_before = tl.zeros([], tl.int64)
    videos_before_row = tl.zeros([], tl.int64)
    kept_in_row = tl.zeros([], tl.int64)
    for i_first in range(0, i_row_chunk + n_chunks, SCAN):
        o_chunk = i_first + tl.arange(0, SCAN)
        m_row = (o_chunk >= i_row_chunk) & (o_chunk < i_row_chunk + n_chunks)
        m_before = o_chunk < i_chunk
        m_known = o_chunk < i_row_chunk + n_chunks
        b_text = tl.load(counts_ptr + o_chunk, mask=m_row, other=0)
        b_images = tl.load(counts_ptr + n_counts + o_chunk, mask=m_known, other=0)
        b_videos = tl.load(counts_ptr + 2 * n_counts + o_chunk, mask=m_known, other=0)
        text_before += tl.sum(tl.where(m_before, b_text, 0), 0)
        images_before += tl.sum(tl.where(m_before, b_images, 0), 0)
        videos_before += tl.sum(tl.where(m_before, b_videos, 0), 0)
        images_before_row += tl.sum(tl.where(m_row, 0, b_images), 0)
        videos_before_row += tl.sum(tl.where(m_row, 0, b_videos), 0)
        kept_in_row += tl.sum(tl.where(m_row, b_text + b_images + b_videos, 0), 0)

    o_token = (i_chunk % n_chunks) * CHUNK + tl.arange(0, CHUNK)
    m_kept, m_image, m_video = _kinds(tokens_ptr, mask_ptr, i_row, o_token, S, image_token, video_token)
    b_image = m_image.to(tl.int64)
    b_video = m_video.to(tl.int64)
    b_text = m_kept.to(tl.int64) - b_image - b_video
    b_text_before = text_before + tl.cumsum(b_text, 0) - b_text
    b_image_rank = images_before + tl.cumsum(b_image, 0) - b_image
    b_video_rank = videos_before + tl.cumsum(b_video, 0) - b_video

    image_table_ptr = counts_ptr + 3 * n_counts
    video_table_ptr = image_table_ptr + 2 * (n_images + 1)
    _, b_image_frame, b_image_y, b_image_x, b_image_extent = _locate(
        b_image_rank, image_grid_ptr, n_images, image_table_ptr, MERGE, False
    )
    _, _, _, _, b_image_extent_row = _locate(images_before_row, image_grid_ptr, n_images, image_table_ptr, MERGE, False)
    b_video_item, b_video_frame, b_video_y, b_video_x, b_video_extent = _locate(
        b_video_rank, video_grid_ptr, n_videos, video_table_ptr, MERGE, FRAMES_APART
    )
    _, _, _, _, b_video_extent_row = _locate(
        videos_before_row, video_grid_ptr, n_videos, video_table_ptr, MERGE, FRAMES_APART
    )
    b_start = b_text_before + (b_image_extent - b_image_extent_row) + (b_video_extent - b_video_extent_row)

    if FRAMES_APART:
        b_time = b_video_frame * 0
    elif seconds_ptr is not None:  # both products in torch's own type promotion and rounding, as in transformers
        b_seconds = tl.load(seconds_ptr + b_video_item, mask=m_video & (b_video_item < n_videos), other=0)
        if b_seconds.dtype.is_floating():
            high: tl.constexpr = tl.float64 if b_seconds.dtype == tl.float64 else tl.float32
            b_interval = (b_seconds.to(high) * scale.to(high)).to(b_seconds.dtype)
            b_time = (b_video_frame.to(b_seconds.dtype).to(high) * b_interval.to(high)).to(b_seconds.dtype).to(tl.int64)
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

    # A maximum of integers is the same in any order; a row of padding alone has a delta of 0.
    b_top = tl.where(m_kept, tl.maximum(b_time, tl.maximum(b_y, b_x)) + 1 - kept_in_row, -(2**63))
    top = tl.where(kept_in_row == 0, 0, tl.max(b_top, 0))
    tl.atomic_max(deltas_ptr + i_row, top)


@torch.compiler.disable  # Inductor drops constexprs that have defaults (torch 2.11), and then cannot compile the launch
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
    frames_apart: bool,
) -> tuple[Tensor, Tensor]:
    """`(positions [3, B, S], deltas [B, 1])`, int64, with no host synchronisation; see `qwenvit.ops.rope_index`.

    I/O: reads tokens and mask twice (2·B·S of each), writes 24·B·S bytes of positions. Bisecting n grids costs
    log2(n) cached reads a token.
    """
    n_rows, S = tokens.shape
    n_images = 0 if image_grid_thw is None else image_grid_thw.shape[0]
    n_videos = 0 if video_grid_thw is None else video_grid_thw.shape[0]
    n_counts = -(-S // CHUNK) * n_rows
    tokens = tokens.contiguous()
    mask = None if mask is None else mask.contiguous()
    image_grid = tokens if image_grid_thw is None else image_grid_thw.contiguous()  # never read where there is none
    video_grid = tokens if video_grid_thw is None else video_grid_thw.contiguous()
    seconds = None if seconds is None else seconds.contiguous()
    counts = tokens.new_empty(3 * n_counts + 2 * (n_images + 1) + 2 * (n_videos + 1), dtype=torch.int64)
    positions = tokens.new_empty((3, n_rows, S), dtype=torch.int64)
    deltas = tokens.new_empty((n_rows, 1), dtype=torch.int64)
    sizes = (S, n_images, n_videos, image_token, video_token, merge, frames_apart)
    with torch.cuda.device_of(tokens):  # Triton launches on the current device, which need not be the tensors'
        _count_tokens[(n_counts + 1,)](tokens, mask, image_grid, video_grid, counts, deltas, *sizes)
        _place_tokens[(n_counts,)](
            tokens, mask, image_grid, video_grid, seconds, counts, positions, deltas, scale, *sizes
        )
    return positions, deltas
