"""A sheet of pictures in rows and columns, with captions."""

from collections.abc import Sequence

from PIL import Image, ImageDraw, ImageFont

GAP = 8
"""Pixels between pictures."""
TEXT = 14
"""Pixels of a caption's letters."""
INK, PAPER = (32, 32, 32), (255, 255, 255)


def contact_sheet(
    rows: Sequence[Sequence[Image.Image]], columns: Sequence[str] = (), captions: Sequence[Sequence[str]] = ()
) -> Image.Image:
    """Return pictures in rows and columns on white, `GAP` pixels apart, each at its own size.

    Args:
        rows: the pictures of each row; rows may have different lengths.
        columns: a caption above each column. Default: none.
        captions: a caption below each picture of each row. Default: none. A caption runs on below or above pictures
            without one, and is cut where the next begins.

    Raises:
        ValueError: no pictures.
    """
    if not any(rows):
        raise ValueError(f"rows: expected at least one picture, got {len(rows)} rows without any")
    widths = [max(row[i].width for row in rows if i < len(row)) for i in range(max(map(len, rows)))]
    heights = [max((picture.height for picture in row), default=0) for row in rows]
    above = TEXT + GAP if any(columns) else 0
    below = [TEXT + GAP if any(texts) else 0 for texts in captions[: len(rows)]]
    below += [0] * (len(rows) - len(below))
    lefts = [sum(widths[:column]) + GAP * column for column in range(len(widths))]
    width = lefts[-1] + widths[-1]
    sheet = Image.new("RGB", (width, above + sum(heights) + sum(below) + GAP * (len(rows) - 1)), PAPER)
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(TEXT)

    def write(texts: Sequence[str], y: int) -> None:
        right = width
        for left, lines in reversed(list(zip(lefts, texts, strict=False))):
            text = " ".join(lines.splitlines())  # such as a file's name that has a line break
            while text and draw.textlength(text, font) > right - left:
                text = text[:-2] + "…" if len(text) > 2 else ""
            draw.text((left, y), text, INK, font)
            right = left - GAP if text else right

    write(columns, 0)
    y = above
    for index, row in enumerate(rows):
        for column, picture in enumerate(row):
            sheet.paste(picture, (lefts[column], y))
        if below[index]:
            write(captions[index], y + heights[index] + 2)
        y += heights[index] + below[index] + GAP
    return sheet


def fit(picture: Image.Image, side: int) -> Image.Image:
    """Return a picture scaled so that its longer side has `side` pixels."""
    scale = side / max(picture.size)
    size = (max(round(picture.width * scale), 1), max(round(picture.height * scale), 1))
    return picture.convert("RGB").resize(size, Image.Resampling.LANCZOS)


def stretch(drawn_map: Image.Image, size: tuple[int, int]) -> Image.Image:
    """Return a drawn map at the `(width, height)` of the image that it belongs to; enlarged cells keep sharp edges."""
    smaller = size[0] < drawn_map.width or size[1] < drawn_map.height
    return drawn_map.resize(size, Image.Resampling.BOX if smaller else Image.Resampling.NEAREST)


def outline_cell(picture: Image.Image, grid: tuple[int, int], cell: tuple[int, int]) -> Image.Image:
    """Return a picture with a frame around one cell, in black and white to be seen on any colour.

    Args:
        picture: any picture of the whole grid.
        grid: the rows and columns of cells that it shows.
        cell: the cell's row and column.
    """
    marked = picture.convert("RGB")
    draw = ImageDraw.Draw(marked)
    height, width = picture.height / grid[0], picture.width / grid[1]
    stroke = max(round(max(picture.size) / 300), 1)
    left, right = round(cell[1] * width), round((cell[1] + 1) * width) - 1
    top, bottom = round(cell[0] * height), round((cell[0] + 1) * height) - 1
    for margin, colour in ((2 * stroke, PAPER), (stroke, INK)):
        draw.rectangle((left - margin, top - margin, right + margin, bottom + margin), outline=colour, width=stroke)
    return marked
