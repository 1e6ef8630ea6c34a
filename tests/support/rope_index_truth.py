"""Expected results of rope_index from a token-by-token brute force, and sequences to test on.

Nothing here imports qwenvit, so that its mistakes cannot be in the expected results too.
"""

import random
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from peers.rope_index import TIMESTAMP_FAMILIES, vision_ids

FAMILIES = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_5")
TEXT_IDS = 150_000
"""Ids below this are text in every family."""

Size = tuple[int, int, int]
Row = Sequence[tuple[str, int | Size]]


def brute_force(
    family: str,
    *,
    mm_token_type_ids: Tensor,
    image_grid_thw: Tensor | None = None,
    video_grid_thw: Tensor | None = None,
    second_per_grid_ts: Tensor | Sequence[float] | None = None,
    attention_mask: Tensor | None = None,
    input_ids: Tensor | None = None,
    merge: int = 2,
    tokens_per_second: int = 2,
) -> tuple[Tensor, Tensor]:
    """Return positions and deltas, token by token; also for touching items and for rows without an unmasked token."""
    types = mm_token_type_ids.tolist()
    kept = torch.ones_like(mm_token_type_ids) if attention_mask is None else attention_mask
    grids = {
        1: [] if image_grid_thw is None else image_grid_thw.tolist(),
        2: [] if video_grid_thw is None else video_grid_thw.tolist(),
    }

    def items(modality: int) -> Iterator[tuple[list[tuple[int, int, int]], int]]:
        """Yield each item's token offsets in time, height and width, and its extent.

        An item is an image, a video, or a separate frame group.
        """
        for index, (t, h, w) in enumerate(grids[modality]):
            rows, columns = h // merge, w // merge
            times = [range(t)] if modality == 1 or family not in TIMESTAMP_FAMILIES else [[0]] * t
            if modality == 2 and family == "qwen2_5_vl":
                step = tokens_per_second * (1 if second_per_grid_ts is None else second_per_grid_ts[index])
                times = [[int(torch.tensor(frame) * step) for frame in range(t)]]
            for group in times:
                offsets = [(time, y, x) for time in group for y in range(rows) for x in range(columns)]
                yield offsets, max(rows, columns)

    pending = {1: items(1), 2: items(2)}
    positions = [[[0] * len(row) for row in types] for _ in range(3)]
    deltas = []
    for i_row, row in enumerate(types):
        next_position = start = 0  # of the next text token; of the current item
        remaining: list[tuple[int, int, int]] = []  # offsets of the current item's remaining tokens, last token first
        end = count = 0  # greatest position plus 1; unmasked tokens
        for column, token_type in enumerate(row):
            if not kept[i_row, column]:
                continue
            if token_type == 0:
                assert not remaining, "the sequence leaves an item before its last token"
                offset, start = (0, 0, 0), next_position
                next_position += 1
            else:
                if not remaining:
                    offsets, extent = next(pending[token_type])
                    remaining, start = offsets[::-1], next_position
                    next_position += extent
                offset = remaining.pop()
            for axis in range(3):
                positions[axis][i_row][column] = start + offset[axis]
            end, count = max(end, start + max(offset) + 1), count + 1
        deltas.append([end - count])
    assert all(next(rest, None) is None for rest in pending.values()), "more grids than items"
    return torch.tensor(positions), torch.tensor(deltas)


def same(got: tuple[Tensor, Tensor], expected: tuple[Tensor, Tensor]) -> None:
    """Assert that positions and deltas are int64 and equal to the expected ones, on any device."""
    for name, ours, theirs in zip(("positions", "deltas"), got, expected, strict=True):
        assert ours.dtype == torch.int64, name
        assert torch.equal(ours.cpu(), theirs.cpu().long()), name


def sequence(
    rows: Sequence[Row],
    family: str,
    *,
    padding: str | None = "right",
    length: int | None = None,
    junk: bool = True,
    timestamps: tuple[int, int] = (5, 9),
    merge: int = 2,
    seed: int = 0,
) -> dict[str, Tensor | None]:
    """Return the inputs for rows of `("text", n)`, `("image", (t, h, w))` and `("video", (t, h, w))`.

    Args:
        rows: each row's parts in order, sizes in patches.
        family: the family whose ids to use; it also decides whether timestamps separate a video's frame groups.
        padding: on the `"left"`, `"right"`, both sides (`"ragged"`) or anywhere (`"holes"`); None for no mask.
        length: tokens of a padded row; None for the longest row's.
        junk: whether padding has random token types, which have to be ignored, instead of pad tokens.
        timestamps: fewest and most text tokens between the frame groups of one video.
        merge: patches per token along each side.
        seed: seed of ids, timestamps and padding.
    """
    rng = random.Random(seed)
    grids: dict[str, list[Size]] = {"image": [], "video": []}
    row_types: list[list[int]] = []
    for row in rows:
        row_types.append([])
        for part, size in row:
            if not isinstance(size, tuple):
                row_types[-1] += [0] * size
                continue
            t, h, w = size
            grids[part].append(size)
            frame_group = [1 if part == "image" else 2] * (h * w // merge**2)
            separate = part == "video" and family in TIMESTAMP_FAMILIES
            for index in range(t):
                timestamp = rng.randint(*timestamps) if separate and index else 0
                row_types[-1] += [0] * timestamp + frame_group

    width = length or max(map(len, row_types))
    types = torch.tensor([[rng.choice((0, 0, 1, 2)) if junk else 0 for _ in range(width)] for _ in row_types])
    mask = torch.zeros_like(types)
    for i_row, row in enumerate(row_types):
        n_padding = width - len(row)
        assert n_padding >= 0, "the row is longer than `length`"
        assert n_padding == 0 or padding is not None, "rows of different lengths need a mask"
        first = {"left": n_padding, "ragged": rng.randint(0, n_padding)}.get(padding or "", 0)
        columns = list(range(first, first + len(row)))
        if padding == "holes":
            columns = sorted(rng.sample(range(width), len(row)))
        types[i_row, columns] = torch.tensor(row, dtype=torch.int64)
        mask[i_row, columns] = 1
    ids = torch.randint(0, TEXT_IDS, types.shape, generator=torch.Generator().manual_seed(seed))
    for modality, vision_id in enumerate(vision_ids(family), start=1):
        ids[types == modality] = vision_id
    if not junk:
        ids[mask == 0] = 151643  # the pad token
    return {
        "input_ids": ids,
        "mm_token_type_ids": types,
        "image_grid_thw": torch.tensor(grids["image"]) if grids["image"] else None,
        "video_grid_thw": torch.tensor(grids["video"]) if grids["video"] else None,
        "attention_mask": None if padding is None else mask,
    }


def random_rows(integer: Callable[[int, int], int], *, touching: bool = False, merge: int = 2) -> list[Row]:
    """Return rows of random parts, drawn with `integer(low, high)`.

    With `touching`, rows may be empty, and items of one modality may touch (no text between them), which transformers
    refuses.
    """
    rows: list[Row] = []
    for _ in range(integer(1, 4)):
        row: list[tuple[str, int | Size]] = []
        for _ in range(integer(0 if touching else 1, 6)):
            part = ("text", "image", "video")[integer(0, 2)]
            if part == "text":
                row.append((part, integer(1, 12)))
                continue
            if not touching and row and row[-1][0] == part:
                row.append(("text", integer(1, 3)))
            frames = integer(1, 2 if part == "image" else 5)
            row.append((part, (frames, merge * integer(1, 5), merge * integer(1, 5))))
        rows.append(row)
    return rows
