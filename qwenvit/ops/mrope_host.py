"""M-RoPE positions on the host: whole-array numpy, no loop over tokens, images or frames.

Tokens are many and runs of equal kind (text, image, video, padding) few, so all arithmetic happens on the runs, then on
their frame groups, then on their rows of tokens; what is left for the tokens is to write down where positions jump,
and one running sum. In numpy rather than torch, on the tensors' own memory: the run tables have some dozen entries, on
which the same in torch took 350 to 480 µs a call where this takes 190 to 300, and it waits for no thread pool.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Ints = NDArray[Any]
Interval = NDArray[Any] | Tensor | int
Seconds = Tensor | Sequence[float | Tensor] | NDArray[Any]
"""What `second_per_grid_ts` may be."""
TEXT, IMAGE, VIDEO, PADDING = range(4)  # the first three as `mm_token_type_ids` has them
MOST_SECONDS = 2**31
"""Between two frame groups; what lies beyond is a mistake, and its positions would leave 64 bits."""
NAMES = {IMAGE: "image", VIDEO: "video"}


def check_values(
    types: Tensor | None,
    mask: Tensor | None,
    image_grid_thw: Tensor | None,
    video_grid_thw: Tensor | None,
    seconds: Seconds | None,
    merge: int,
) -> None:
    """Refuse values that no sequence could have; whether grids and tokens agree, `rope_index` finds out.

    Raises:
        ValueError: token types other than 0, 1, 2, sizes below 1 or that do not merge, seconds below 0 or absurd.
    """
    if types is not None:
        values = types.cpu().numpy()  # numpy's minimum of 32k integers takes 6 µs, torch's comparisons 170
        if values.min() < 0 or values.max() > VIDEO:
            kept = values if mask is None else values[_is_kept(mask)]
            if (odd := kept[(kept < 0) | (kept > VIDEO)]).size:
                raise ValueError(f"mm_token_type_ids: expected 0 (text), 1 (image) or 2 (video), got {odd[0]}")
    for name, grid in (("image_grid_thw", image_grid_thw), ("video_grid_thw", video_grid_thw)):
        if grid is not None:
            sizes = grid.cpu().numpy()
            if sizes.size and (sizes.min() < 1 or (sizes % (1, merge, merge)).any()):
                item = int(((sizes < 1).any(axis=1) | (sizes % (1, merge, merge)).any(axis=1)).argmax())
                raise ValueError(
                    f"{name}: expected positive sizes, rows and columns multiples of {merge}; "
                    f"item {item}: {sizes[item].tolist()}"
                )
    if seconds is not None:
        if not isinstance(seconds, Tensor) or seconds.dtype not in (torch.float32, torch.float64):
            seconds = torch.as_tensor(seconds, dtype=torch.float64)
        between = seconds.detach().cpu().numpy()
        if between.size and not (between.min() >= 0 and between.max() < MOST_SECONDS):  # nor NaN, which passes neither
            item = int((~((between >= 0) & (between < MOST_SECONDS))).argmax())
            raise ValueError(f"second_per_grid_ts: expected seconds, 0 or more, got {between[item]} for video {item}")


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
    frames_apart: bool,
) -> tuple[Tensor, Tensor]:
    """`(positions [3, B, S], deltas [B, 1])`, int64, on the tensors' device; see `qwenvit.ops.rope_index`.

    Raises:
        ValueError: the grids do not stand for the tokens that are there.
    """
    flat = tokens.cpu().reshape(-1).numpy()
    kinds: Ints = (flat == video_token).view(np.int8)
    kinds += kinds  # VIDEO
    kinds += (flat == image_token).view(np.int8)
    if mask is not None:
        np.putmask(kinds, ~_is_kept(mask).reshape(-1), PADDING)
    items = {IMAGE: _items(image_grid_thw, merge), VIDEO: _items(video_grid_thw, merge)}
    for which, sizes in items.items():
        if sizes.prod(axis=1, dtype=np.float64).sum() > kinds.size:  # before anything is made of that size
            raise ValueError(_misfit(kinds.reshape(tokens.shape), which, sizes))
    if frames_apart:
        items[VIDEO] = np.repeat(items[VIDEO], items[VIDEO][:, 0], axis=0)
        items[VIDEO][:, 0] = 1
    positions, deltas = _positions(kinds.reshape(tokens.shape), items, _interval(seconds, scale))
    return torch.from_numpy(positions).to(tokens.device), torch.from_numpy(deltas).to(tokens.device)


def _is_kept(mask: Tensor) -> NDArray[np.bool_]:
    if mask.is_floating_point():  # of which numpy lacks some
        mask = mask != 0
    return mask.cpu().numpy() != 0


def _interval(seconds: Tensor | None, scale: int) -> Interval:
    """Temporal positions between the frame groups of each video, or of all."""
    if seconds is None:
        return scale
    if seconds.dtype in (torch.float32, torch.float64):
        return seconds.cpu().numpy() * scale
    return seconds.cpu() * scale  # torch's own promotion and rounding; numpy has no bfloat16


def _items(grid_thw: Tensor | None, merge: int) -> Ints:
    """`[items, 3]` frame groups, rows and columns of tokens."""
    if grid_thw is None:
        return np.empty((0, 3), np.int64)
    return grid_thw.cpu().numpy().astype(np.int64) // (1, merge, merge)


def _positions(kinds: Ints, items: dict[int, Ints], interval: Interval, given: Ints | None = None) -> tuple[Ints, Ints]:
    """Positions and deltas of `kinds`; errors count in the rows as `given`, where these were moved together."""
    rows, columns = kinds.shape
    start, length, kind = _runs(kinds, items)
    row, text, padding = start // columns, kind == TEXT, kind == PADDING
    if (padding[1:-1] & (row[:-2] == row[2:])).any():  # padding between kept tokens of one row
        return _closed_up(kinds, items, interval)

    # Every run as a grid: text and padding as one row of tokens.
    grid = np.ones((3, len(kind)), np.int64)
    grid[2] = length
    for which, sizes in items.items():
        of_kind = kind == which
        if np.count_nonzero(of_kind) != len(sizes):
            raise ValueError(_misfit(kinds if given is None else given, which, sizes))
        grid[:, of_kind] = sizes.T
    t, h, w = grid
    if (misfit := t * h * w != length).any():
        which = int(kind[misfit.argmax()])
        raise ValueError(_misfit(kinds if given is None else given, which, items[which]))

    # Where each run starts: after the runs before it in its row, each as long as its longer side.
    extent = np.maximum(h, w)
    extent[padding] = 0
    base = extent.cumsum() - extent
    first = (start % columns == 0).nonzero()[0]  # the first run of each row
    base -= base[first][row]
    base[padding] = 0

    # Frame groups: positions of their first tokens, and how far their last ones lie above them.
    run = np.repeat(np.arange(len(kind)), t)
    last = t.cumsum() - 1
    value = np.empty((3, len(run)), np.int64)
    value[:] = base[run]
    number = np.arange(len(run)) - (last - t + 1)[run]  # of each frame group in its item
    if len(items[VIDEO]) and len(run) > len(kind):
        number = _times(number, kind[run] == VIDEO, t[kind == VIDEO], interval)
    value[0] += number
    rise = grid - 1
    rise[0] = 0
    rise[:2, text] = rise[2, text]
    rise[2, padding] = 0
    top = np.maximum(base + extent, value[0][last] + ~padding)
    deltas = np.maximum.reduceat(top, first) - np.add.reduceat(length * ~padding, first)

    # Steps from each token to the next: text climbs on every axis, vision by columns, then by rows, then by frames.
    height = h[run]
    width = np.repeat(w[run], height)  # of each row of tokens
    at = width.cumsum() - width
    step = np.empty((3, kinds.size), np.int64)
    step[:2] = kinds.reshape(-1) == TEXT
    step[2] = kinds.reshape(-1) != PADDING
    step[1, at] = 1
    step[2, at] = 1 - width
    value[:, 1:] -= (value + rise[:, run])[:, :-1]
    step[:, at[height.cumsum() - height]] = value
    return np.cumsum(step, axis=1, out=step).reshape(3, rows, columns), deltas[:, None]


def _runs(kinds: Ints, items: dict[int, Ints]) -> tuple[Ints, Ints, Ints]:
    """Start, length and kind of each run of equal tokens in a row, cut where items touch that the grids tell apart."""
    flat = kinds.reshape(-1)
    change = np.empty(flat.size + 1, bool)
    np.not_equal(flat[1:], flat[:-1], out=change[1:-1])
    change[:: kinds.shape[1]] = True
    edges = change.nonzero()[0]
    for which, sizes in items.items():
        if np.count_nonzero(flat[edges[:-1]] == which) == len(sizes):
            continue
        places = (flat == which).nonzero()[0]  # items that touch: cut where the grids say
        ends = sizes.prod(axis=1).cumsum()
        change[places[ends[ends < len(places)]]] = True
        edges = change.nonzero()[0]
    return edges[:-1], np.diff(edges), flat[edges[:-1]]


def _times(number: Ints, video: Ints, frames: Ints, interval: Interval) -> Ints:
    """Temporal place of each frame group in its item: its number, times the interval of its video."""
    if isinstance(interval, int):
        number[video] *= interval
    elif isinstance(interval, Tensor):
        spaced = torch.from_numpy(number[video]) * interval.repeat_interleave(torch.from_numpy(frames))
        number[video] = spaced.long().numpy()
    else:  # in the interval's own dtype and rounded towards zero, as transformers does
        number[video] = number[video].astype(interval.dtype) * np.repeat(interval, frames)
    return number


def _closed_up(kinds: Ints, items: dict[int, Ints], interval: Interval) -> tuple[Ints, Ints]:
    """Rows with masked tokens between kept ones: moved together, placed, and spread out again."""
    order = np.argsort(kinds == PADDING, axis=1, kind="stable")
    positions, deltas = _positions(np.take_along_axis(kinds, order, axis=1), items, interval, given=kinds)
    spread = np.zeros_like(positions)
    np.put_along_axis(spread, order[None], positions, axis=2)
    return spread, deltas


def _misfit(kinds: Ints, which: int, sizes: Ints) -> str:
    """What to tell the user about grids that are not those of the tokens."""
    name, size = NAMES[which], sizes.astype(np.float64).prod(axis=1)  # absurd sizes do not wrap around
    kept = (kinds.reshape(-1) != PADDING).nonzero()[0]
    ranks = (kinds.reshape(-1)[kept] == which).nonzero()[0]
    places = kept[ranks]
    if size.sum() != len(places):
        return (
            f"{name}_grid_thw: its grids stand for {size.sum():.0f} {name} tokens, the sequences hold {len(places)} "
            "(tokens that attention_mask leaves out do not count)"
        )
    rows = places // kinds.shape[1]
    runs_on = (np.diff(ranks, append=-1) == 1) & (np.diff(rows, append=-1) == 0)
    ends = size.cumsum().astype(np.int64)
    runs_on[ends - 1] = True
    broken = int((~runs_on).argmax())
    item = int(np.searchsorted(ends, broken, side="right"))
    row, column = divmod(int(places[broken]), kinds.shape[1])
    t, h, w = sizes[item]
    return (
        f"{name}_grid_thw: item {item} is {t} x {h} x {w} tokens (frame groups x rows x columns), but its run of "
        f"{name} tokens ends before that, at token {column} of row {row}"
    )
