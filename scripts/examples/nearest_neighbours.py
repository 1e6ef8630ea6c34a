#!/usr/bin/env python
"""Find the images of a folder that are most like one: `python scripts/examples/nearest_neighbours.py cat.jpg PHOTOS`.

A script in cells (`# %%`). Vectors of these towers find what looks alike; they were not trained against text, and do
not rank images by words. For more images than memory holds: `qwenvit encode PHOTOS -o out --pool mean --no-tokens`.
"""

# %% Settings
import argparse
from pathlib import Path

from PIL import Image, ImageOps

import qwenvit
from qwenvit.features.sheet import contact_sheet, fit
from qwenvit.preprocess.image_file import SUFFIXES

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("query", type=Path, help="an image file")
parser.add_argument("folder", type=Path, help="searched recursively")
parser.add_argument("-m", "--model", default="demo", help="a checkpoint; 'demo' has random weights")
parser.add_argument("-k", type=int, default=5, help="neighbours to show")
parser.add_argument("--mode", choices=["mean", "patches"], default="mean", help="what to average: tokens, or patches")
parser.add_argument("-o", "--output", default="neighbours.png")
settings = parser.parse_args()

enc = qwenvit.Encoder.from_pretrained(settings.model)

# %% One vector an image. Broken files are skipped with a warning; their entry is None.
images = (path for path in settings.folder.rglob("*") if path.suffix.lower() in SUFFIXES)
files = sorted(path for path in images if path.resolve() != settings.query.resolve())
if not files:
    raise SystemExit(f"{settings.folder}: no folder with other images")
out = enc.encode(
    [settings.query, *files],
    max_pixels=512 * 512,
    keep_patches=settings.mode == "patches",
    on_error="skip",
    progress=True,
)
if out[0] is None:
    raise SystemExit(f"{settings.query}: {out.errors[0]}")
vectors = out.pooled(settings.mode, normalize=True)  # a skipped image has no row
names = [path for path, item in zip([settings.query, *files], out, strict=True) if item is not None]

# %% Cosines. Those of one tower are close together: compare them with one another, not with 1.
cosines = (vectors[1:] @ vectors[0]).cpu()

# %% The nearest ones.
best = cosines.argsort(descending=True, stable=True)[: settings.k].tolist()
for rank, index in enumerate(best, 1):
    print(f"{rank}. {names[1 + index]} {cosines[index]:.3f}")

# %% A picture of them.
shown = [names[0], *(names[1 + index] for index in best)]
captions = [settings.query.name, *(f"{cosines[index]:.3f} {names[1 + index].name}" for index in best)]
pictures = []
for path in shown:
    with Image.open(path) as image:
        pictures.append(fit(ImageOps.exif_transpose(image), 224))
contact_sheet([pictures], captions=[captions]).save(settings.output)
print("->", settings.output)
