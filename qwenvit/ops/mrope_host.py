"""M-RoPE positions on the host: whole-array numpy, with no Python loop over tokens, images or frames.

Tokens are many, but runs of equal tokens (text, image, video, padding) are few. So the arithmetic is done on runs, then
on their frame groups, then on the rows of their grids. Only two steps touch every token: writing the step from each
token's position to the next, and one running sum. numpy rather than torch, because the arrays of runs are so short that
torch's cost per call dominates (TUNING.md).
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

IntArray = NDArray[Any]
TemporalStep = NDArray[Any] | Tensor | int
SecondPerGridTs = Tensor | Sequence[float | Tensor] | NDArray[Any]
"""Accepted forms of `second_per_grid_ts`."""
TEXT, IMAGE, VIDEO, PADDING = range(4)
"""Token types; the first three are the values of `mm_token_type_ids`."""
MAX_SECOND_PER_GRID = 2**31
"""Upper bound of `second_per_grid_ts`, so that no position overflows 64 bits."""
MODALITIES = {IMAGE: "image", VIDEO: "video"}


def check_values(
    types: Tensor | None,
    mask: Tensor | None,
    image_grid_thw: Tensor | None,
    video_grid_thw: Tensor | None,
    seconds: SecondPerGridTs | None,
    merge: int,
) -> None:
    """Refuse values that are invalid in any sequence. `host_rope_index` checks that grids and tokens match.

    Args:
        types: `[B, S]` integer token types; None to skip their check.
        mask: `[B, S]`, nonzero for each token that counts; None if all count.
        image_grid_thw: `[images, 3]` integers: frame groups, rows and columns of patches; None for no images.
        video_grid_thw: `[videos, 3]` integers: frame groups, rows and columns of patches; None for no videos.
        seconds: `[videos]` seconds between a video's frame groups; None to skip their check.
        merge: patches merged into one token, along each side.

    Raises:
        ValueError: an unmasked token type is not 0, 1 or 2; a size is below 1, or not divisible by `merge`; seconds
            are negative, NaN, or `MAX_SECOND_PER_GRID` or more.
    """
    if types is not None:
        values = types.cpu().numpy()  # numpy's minimum is many times as fast as torch's comparisons (TUNING.md)
        if values.min() < 0 or values.max() > VIDEO:
            kept = values if mask is None else values[_is_kept(mask)]
            if (invalid := kept[(kept < 0) | (kept > VIDEO)]).size:
                raise ValueError(f"mm_token_type_ids: expected 0 (text), 1 (image) or 2 (video), got {invalid[0]}")
    for name, grid_thw in (("image_grid_thw", image_grid_thw), ("video_grid_thw", video_grid_thw)):
        if grid_thw is not None:
            sizes = grid_thw.cpu().numpy()
            if sizes.size and (sizes.min() < 1 or (sizes % (1, merge, merge)).any()):
                item = int(((sizes < 1).any(axis=1) | (sizes % (1, merge, merge)).any(axis=1)).argmax())
                raise ValueError(
                    f"{name}: expected positive sizes, rows and columns divisible by {merge}, "
                    f"got {sizes[item].tolist()} for item {item}"
                )
    if seconds is not None:
        if not isinstance(seconds, Tensor) or seconds.dtype not in (torch.float32, torch.float64):
            seconds = torch.as_tensor(seconds, dtype=torch.float64)
        values = seconds.detach().cpu().numpy()
        if values.size and not (values.min() >= 0 and values.max() < MAX_SECOND_PER_GRID):  # NaN fails both comparisons
            item = int((~((values >= 0) & (values < MAX_SECOND_PER_GRID))).argmax())
            raise ValueError(f"second_per_grid_ts: expected seconds, 0 or more, got {values[item]} for video {item}")


def host_rope_index(
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
    """Return positions `[3, B, S]` and deltas `[B, 1]`, int64, on the device of `tokens`, computed on the CPU.

    `qwenvit.ops.rope_index` documents the arguments (`separate_frame_groups` is its `frames_apart`).

    Raises:
        ValueError: the grids do not match the tokens.
    """
    flat = tokens.cpu().reshape(-1).numpy()
    types: IntArray = (flat == video_token).view(np.int8)
    types += types  # 1 becomes VIDEO
    types += (flat == image_token).view(np.int8)
    if mask is not None:
        np.putmask(types, ~_is_kept(mask).reshape(-1), PADDING)
    grids = {IMAGE: _token_grids(image_grid_thw, merge), VIDEO: _token_grids(video_grid_thw, merge)}
    for modality, grid in grids.items():
        if grid.prod(axis=1, dtype=np.float64).sum() > types.size:  # before anything of that size is allocated
            raise ValueError(_mismatch_message(types.reshape(tokens.shape), modality, grid))
    if separate_frame_groups:
        grids[VIDEO] = np.repeat(grids[VIDEO], grids[VIDEO][:, 0], axis=0)
        grids[VIDEO][:, 0] = 1
    positions, deltas = _compute_positions(types.reshape(tokens.shape), grids, _temporal_step(seconds, scale))
    return torch.from_numpy(positions).to(tokens.device), torch.from_numpy(deltas).to(tokens.device)


def _is_kept(mask: Tensor) -> NDArray[np.bool_]:
    if mask.is_floating_point():  # in torch: numpy has no bfloat16
        mask = mask != 0
    return mask.cpu().numpy() != 0


def _temporal_step(seconds: Tensor | None, scale: int) -> TemporalStep:
    """Return the temporal positions between two frame groups: `[videos]`, or one number for all videos."""
    if seconds is None:
        return scale
    if seconds.dtype in (torch.float32, torch.float64):
        return seconds.cpu().numpy() * scale
    return seconds.cpu() * scale  # torch's type promotion and rounding, as in transformers; numpy has no bfloat16


def _token_grids(grid_thw: Tensor | None, merge: int) -> IntArray:
    """Return `[items, 3]` int64: frame groups, rows and columns of tokens of each image or video."""
    if grid_thw is None:
        return np.empty((0, 3), np.int64)
    return grid_thw.cpu().numpy().astype(np.int64) // (1, merge, merge)


def _compute_positions(
    types: IntArray, grids: dict[int, IntArray], temporal_step: TemporalStep, original_types: IntArray | None = None
) -> tuple[IntArray, IntArray]:
    """Return positions `[3, B, S]` and deltas `[B, 1]`, int64.

    Args:
        types: `[B, S]` token types.
        grids: `[items, 3]` token grids of images and of videos.
        temporal_step: temporal positions between two frame groups, for all videos or `[videos]`.
        original_types: `[B, S]` token types before compaction, for error messages; None if `types` are original.

    Raises:
        ValueError: the grids do not match the tokens.
    """
    n_rows, n_columns = types.shape
    run_start, run_length, run_type = _find_runs(types, grids)
    run_row, is_text, is_padding = run_start // n_columns, run_type == TEXT, run_type == PADDING
    if (is_padding[1:-1] & (run_row[:-2] == run_row[2:])).any():  # padding between unmasked tokens of a row
        return _compute_compacted_positions(types, grids, temporal_step)

    # Give every run a grid; text and padding are one row of tokens.
    run_grid = np.ones((3, len(run_type)), np.int64)
    run_grid[2] = run_length
    for modality, grid in grids.items():
        of_modality = run_type == modality
        if np.count_nonzero(of_modality) != len(grid):
            raise ValueError(_mismatch_message(types if original_types is None else original_types, modality, grid))
        run_grid[:, of_modality] = grid.T
    t, h, w = run_grid
    if (mismatch := t * h * w != run_length).any():
        modality = int(run_type[mismatch.argmax()])
        raise ValueError(
            _mismatch_message(types if original_types is None else original_types, modality, grids[modality])
        )

    # The first position of each run is the sum of the extents of the runs before it in its row.
    extent = np.maximum(h, w)
    extent[is_padding] = 0
    run_position = extent.cumsum() - extent
    first_run = (run_start % n_columns == 0).nonzero()[0]  # of each row
    run_position -= run_position[first_run][run_row]
    run_position[is_padding] = 0

    # The position of each frame group's first token, and how far above it the group's last token is.
    group_run = np.repeat(np.arange(len(run_type)), t)
    last_group = t.cumsum() - 1  # of each run
    group_position = np.empty((3, len(group_run)), np.int64)
    group_position[:] = run_position[group_run]
    temporal_offset = np.arange(len(group_run)) - (last_group - t + 1)[group_run]  # the group's index in its run
    if len(grids[VIDEO]) and len(group_run) > len(run_type):
        temporal_offset = _scale_offsets(
            temporal_offset, run_type[group_run] == VIDEO, t[run_type == VIDEO], temporal_step
        )
    group_position[0] += temporal_offset
    last_token_offset = run_grid - 1
    last_token_offset[0] = 0
    last_token_offset[:2, is_text] = last_token_offset[2, is_text]
    last_token_offset[2, is_padding] = 0
    run_end = np.maximum(run_position + extent, group_position[0][last_group] + ~is_padding)
    deltas = np.maximum.reduceat(run_end, first_run) - np.add.reduceat(run_length * ~is_padding, first_run)

    # The step from each token to the next: one on every axis in text; in vision one column, row or frame group further.
    group_height = h[group_run]
    row_width = np.repeat(w[group_run], group_height)  # of each grid row, in tokens
    row_start = row_width.cumsum() - row_width
    step = np.empty((3, types.size), np.int64)
    step[:2] = types.reshape(-1) == TEXT
    step[2] = types.reshape(-1) != PADDING
    step[1, row_start] = 1
    step[2, row_start] = 1 - row_width
    group_position[:, 1:] -= (group_position + last_token_offset[:, group_run])[:, :-1]  # now steps between groups
    step[:, row_start[group_height.cumsum() - group_height]] = group_position
    return np.cumsum(step, axis=1, out=step).reshape(3, n_rows, n_columns), deltas[:, None]


def _find_runs(types: IntArray, grids: dict[int, IntArray]) -> tuple[IntArray, IntArray, IntArray]:
    """Return start (in the flattened batch), length and type of each run of equal tokens within a row.

    Items that touch form one run of equal tokens; their grids say where to split it.
    """
    flat = types.reshape(-1)
    is_edge = np.empty(flat.size + 1, bool)
    np.not_equal(flat[1:], flat[:-1], out=is_edge[1:-1])
    is_edge[:: types.shape[1]] = True
    edges = is_edge.nonzero()[0]
    for modality, grid in grids.items():
        if np.count_nonzero(flat[edges[:-1]] == modality) == len(grid):
            continue
        indices = (flat == modality).nonzero()[0]
        ends = grid.prod(axis=1).cumsum()
        is_edge[indices[ends[ends < len(indices)]]] = True
        edges = is_edge.nonzero()[0]
    return edges[:-1], np.diff(edges), flat[edges[:-1]]


def _scale_offsets(
    index: IntArray, is_video: IntArray, frame_groups: IntArray, temporal_step: TemporalStep
) -> IntArray:
    """Return each frame group's temporal offset: its index in its item, for videos times the video's temporal step.

    Args:
        index: `[groups]` index of each frame group in its item; overwritten.
        is_video: `[groups]`, whether the frame group belongs to a video.
        frame_groups: `[videos]` frame groups of each video.
        temporal_step: temporal positions between two frame groups, for all videos or `[videos]`.
    """
    if isinstance(temporal_step, int):
        index[is_video] *= temporal_step
    elif isinstance(temporal_step, Tensor):
        scaled = torch.from_numpy(index[is_video]) * temporal_step.repeat_interleave(torch.from_numpy(frame_groups))
        index[is_video] = scaled.long().numpy()
    else:  # in the step's own dtype and truncated towards zero, as in transformers
        index[is_video] = index[is_video].astype(temporal_step.dtype) * np.repeat(temporal_step, frame_groups)
    return index


def _compute_compacted_positions(
    types: IntArray, grids: dict[int, IntArray], temporal_step: TemporalStep
) -> tuple[IntArray, IntArray]:
    """Move each row's unmasked tokens to its front, compute positions, and scatter them back."""
    order = np.argsort(types == PADDING, axis=1, kind="stable")
    compacted = np.take_along_axis(types, order, axis=1)
    positions, deltas = _compute_positions(compacted, grids, temporal_step, original_types=types)
    scattered = np.zeros_like(positions)
    np.put_along_axis(scattered, order[None], positions, axis=2)
    return scattered, deltas


def _mismatch_message(types: IntArray, modality: int, grids: IntArray) -> str:
    """Return the error message for grids of one modality that do not match the tokens."""
    name, sizes = MODALITIES[modality], grids.astype(np.float64).prod(axis=1)  # in floats, which do not overflow
    kept = (types.reshape(-1) != PADDING).nonzero()[0]
    ranks = (types.reshape(-1)[kept] == modality).nonzero()[0]
    indices = kept[ranks]
    if sizes.sum() != len(indices):
        return (
            f"{name}_grid_thw: expected grids of {len(indices)} {name} tokens in total, got grids of "
            f"{sizes.sum():.0f} (tokens that attention_mask masks do not count)"
        )
    rows = indices // types.shape[1]
    continues = (np.diff(ranks, append=-1) == 1) & (np.diff(rows, append=-1) == 0)
    ends = sizes.cumsum().astype(np.int64)
    continues[ends - 1] = True
    last = int((~continues).argmax())
    item = int(np.searchsorted(ends, last, side="right"))
    row, column = divmod(int(indices[last]), types.shape[1])
    t, h, w = grids[item]
    return (
        f"{name}_grid_thw: expected a run of {t} x {h} x {w} {name} tokens (frame groups x rows x columns) for item "
        f"{item}, got a run that ends before that, at token {column} of row {row}"
    )
