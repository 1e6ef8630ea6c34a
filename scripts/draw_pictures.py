"""Draw the demo's pictures, scripts/pictures/*.png; every run writes the same bytes."""

import argparse
import math
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

FOLDER = Path(__file__).parent / "pictures"


def landscape(width: int = 640, height: int = 448) -> Image.Image:
    """Draw three ranges of hills under a low sun."""
    sky = np.linspace((255, 183, 120), (70, 110, 190), height)[::-1]
    image = Image.fromarray(np.broadcast_to(sky[:, None], (height, width, 3)).astype(np.uint8))
    draw = ImageDraw.Draw(image)
    draw.ellipse((width * 0.62, height * 0.30, width * 0.74, height * 0.30 + width * 0.12), fill=(255, 236, 170))
    for level, colour in ((0.55, (96, 120, 130)), (0.68, (62, 96, 84)), (0.82, (34, 64, 46))):
        ridge = [
            (x, height * (level + 0.06 * math.sin(x / width * 9 + level * 20) + 0.02 * math.sin(x / 17 + level * 7)))
            for x in range(width + 1)
        ]
        draw.polygon([*ridge, (width, height), (0, height)], fill=colour)
    return image


def shapes(side: int = 448) -> Image.Image:
    """Draw a disc, a rectangle, a triangle and lines on a grey ground."""
    image = Image.new("RGB", (side, side), (225, 225, 220))
    draw = ImageDraw.Draw(image)
    draw.ellipse((40, 40, 200, 200), fill=(214, 69, 65))
    draw.rectangle((250, 60, 410, 190), fill=(44, 105, 176))
    draw.polygon([(120, 410), (40, 250), (210, 260)], fill=(240, 180, 40))
    for i in range(6):
        draw.line((250 + 28 * i, 250, 250 + 28 * i, 410), fill=(40, 40, 40), width=4 + 2 * i)
    return image


def page(width: int = 384, height: int = 544) -> Image.Image:
    """Draw a printed page: a title, lines of words, a bar chart."""
    rng = np.random.default_rng(7)
    image = Image.new("L", (width, height), 250)
    draw = ImageDraw.Draw(image)
    draw.rectangle((40, 36, 250, 56), fill=20)
    for line in range(17):
        x, y = 40, 84 + 14 * line
        while x < width - 60:
            length = int(rng.integers(10, 46))
            draw.rectangle((x, y, min(x + length, width - 40), y + 6), fill=70)
            x += length + 7
    for bar, value in enumerate((60, 110, 85, 140, 40)):
        draw.rectangle((60 + 54 * bar, 500 - value, 96 + 54 * bar, 500), fill=90 + 25 * bar)
    draw.line((48, 500, width - 40, 500), fill=20, width=2)
    return image


def panorama(width: int = 1120, height: int = 160) -> Image.Image:
    """Draw a skyline at night, seven times wider than high, with a transparent sky."""
    rng = np.random.default_rng(3)
    image = Image.new("RGBA", (width, height), (0, 0, 0, 0))
    draw = ImageDraw.Draw(image)
    x = 0
    while x < width:
        w, h = int(rng.integers(30, 90)), int(rng.integers(40, 140))
        draw.rectangle((x, height - h, x + w, height), fill=(34, 40, 62, 255))
        for window_x in range(x + 6, x + w - 8, 14):
            for window_y in range(height - h + 8, height - 8, 16):
                if rng.random() < 0.55:
                    draw.rectangle((window_x, window_y, window_x + 6, window_y + 8), fill=(250, 214, 120, 255))
        x += w + int(rng.integers(0, 12))
    return image


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=FOLDER, help="folder to draw into (default: %(default)s)")
    folder = parser.parse_args().out
    folder.mkdir(parents=True, exist_ok=True)
    for draw in (landscape, shapes, page, panorama):
        draw().save(folder / f"{draw.__name__}.png", optimize=True)


if __name__ == "__main__":
    main()
