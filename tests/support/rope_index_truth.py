"""What the rope index is held to beside transformers: a token-by-token reading, and sequences to compare on.

Nothing here comes from qwenvit, so that a mistake there cannot hide in its own expectation.
"""

import random
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from peers.mrope import FRAMES_APART, vision_ids

FAMILIES = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_5")
TEXT_IDS = 150_000
"""Ids below this stand for text in every family."""

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
    """Positions and deltas by walking the tokens; also for items that touch and for rows without any kept token."""
    types = mm_token_type_ids.tolist()
    kept = torch.ones_like(mm_token_type_ids) if attention_mask is None else attention_mask
    grids = {
        1: [] if image_grid_thw is None else image_grid_thw.tolist(),
        2: [] if video_grid_thw is None else video_grid_thw.tolist(),
    }

    def items(kind: int) -> Iterator[tuple[list[tuple[int, int, int]], int]]:
        """Of each thing that is placed as one: its tokens' offsets in time, height and width, and its extent."""
        for number, (t, h, w) in enumerate(grids[kind]):
            rows, columns = h // merge, w // merge
            times = [range(t)] if kind == 1 or family not in FRAMES_APART else [[0]] * t
            if kind == 2 and family == "qwen2_5_vl":
                interval = tokens_per_second * (1 if second_per_grid_ts is None else second_per_grid_ts[number])
                times = [[int(torch.tensor(frame) * interval) for frame in range(t)]]
            for group in times:
                offsets = [(time, y, x) for time in group for y in range(rows) for x in range(columns)]
                yield offsets, max(rows, columns)

    waiting = {1: items(1), 2: items(2)}
    positions = [[[0] * len(row) for row in types] for _ in range(3)]
    deltas = []
    for i_row, row in enumerate(types):
        following = start = 0  # the position a text token would have now; where the open item began
        inside: list[tuple[int, int, int]] = []  # what is left of that item, last token first
        top = count = 0
        for column, kind in enumerate(row):
            if not kept[i_row, column]:
                continue
            if kind == 0:
                assert not inside, "the sequence leaves an item before its last token"
                offset, start = (0, 0, 0), following
                following += 1
            else:
                if not inside:
                    offsets, extent = next(waiting[kind])
                    inside, start = offsets[::-1], following
                    following += extent
                offset = inside.pop()
            for axis in range(3):
                positions[axis][i_row][column] = start + offset[axis]
            top, count = max(top, start + max(offset) + 1), count + 1
        deltas.append([top - count])
    assert all(next(rest, None) is None for rest in waiting.values()), "more grids than items"
    return torch.tensor(positions), torch.tensor(deltas)


def same(got: tuple[Tensor, Tensor], expected: tuple[Tensor, Tensor]) -> None:
    """Assert that positions and deltas are the expected ones, on whatever device, and int64."""
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
    """The inputs that rows of `("text", n)`, `("image", (t, h, w))` and `("video", (t, h, w))` stand for.

    Args:
        rows: each row's parts in order, sizes in patches.
        family: whose ids to use, and whether a video falls into timestamped frame groups.
        padding: on the `"left"`, `"right"`, both sides (`"ragged"`) or anywhere (`"holes"`); None for no mask.
        length: of the padded rows; None for the longest.
        junk: whether padding holds tokens of any kind, which have to be passed over, rather than pad tokens.
        timestamps: fewest and most text tokens between the frame groups of one video.
        merge: patches a token spans along each side.
        seed: of ids, timestamps and padding.
    """
    rng = random.Random(seed)
    grids: dict[str, list[Size]] = {"image": [], "video": []}
    kinds: list[list[int]] = []
    for row in rows:
        kinds.append([])
        for what, size in row:
            if not isinstance(size, tuple):
                kinds[-1] += [0] * size
                continue
            t, h, w = size
            grids[what].append(size)
            frame = [1 if what == "image" else 2] * (h * w // merge**2)
            apart = what == "video" and family in FRAMES_APART
            for number in range(t):
                stamp = rng.randint(*timestamps) if apart and number else 0
                kinds[-1] += [0] * stamp + frame

    width = length or max(map(len, kinds))
    types = torch.tensor([[rng.choice((0, 0, 1, 2)) if junk else 0 for _ in range(width)] for _ in kinds])
    mask = torch.zeros_like(types)
    for i_row, row in enumerate(kinds):
        room = width - len(row)
        assert room >= 0, "the row is longer than the length asked for"
        assert room == 0 or padding is not None, "rows of different lengths need a mask"
        first = {"left": room, "ragged": rng.randint(0, room)}.get(padding or "", 0)
        places = list(range(first, first + len(row)))
        if padding == "holes":
            places = sorted(rng.sample(range(width), len(row)))
        types[i_row, places] = torch.tensor(row, dtype=torch.int64)
        mask[i_row, places] = 1
    ids = torch.randint(0, TEXT_IDS, types.shape, generator=torch.Generator().manual_seed(seed))
    for kind, vision_id in enumerate(vision_ids(family), start=1):
        ids[types == kind] = vision_id
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
    """Rows of random parts, the numbers from `integer(low, high)`.

    With `touching`, rows may be empty and items of one kind may follow each other without text, which transformers
    refuses.
    """
    rows: list[Row] = []
    for _ in range(integer(1, 4)):
        row: list[tuple[str, int | Size]] = []
        for _ in range(integer(0 if touching else 1, 6)):
            what = ("text", "image", "video")[integer(0, 2)]
            if what == "text":
                row.append((what, integer(1, 12)))
                continue
            if not touching and row and row[-1][0] == what:
                row.append(("text", integer(1, 3)))
            frames = integer(1, 2 if what == "image" else 5)
            row.append((what, (frames, merge * integer(1, 5), merge * integer(1, 5))))
        rows.append(row)
    return rows
