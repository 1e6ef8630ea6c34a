#!/usr/bin/env python
"""Measure what vectors of a tower are good for, on images that ship with scikit-learn; print a Markdown table.

    pip install '.[examples]'
    python scripts/examples/compare_vectors.py --model Qwen/Qwen3-VL-8B-Instruct

- digits: 1,797 handwritten digits of 8×8 pixels. The share whose class the five nearest ones name, in five folds.
- crops: 120 pieces of two photographs, and the same pieces moved by 6 of 96 pixels and darkened by 20 %. The share of
  moved pieces whose nearest piece is their own.

Nearest is by cosine. Random weights are a baseline and no result.
"""

# %% Settings
import argparse

import numpy as np
import torch
from sklearn.datasets import load_digits, load_sample_images
from sklearn.model_selection import StratifiedKFold, cross_val_score
from sklearn.neighbors import KNeighborsClassifier, NearestNeighbors
from torch.nn.functional import interpolate

import qwenvit

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("-m", "--model", default="demo", help="a checkpoint; 'demo' has random weights")
parser.add_argument("--digits", type=int, default=1797, help="how many of them")
parser.add_argument("--crops", type=int, default=120, help="how many of them")
parser.add_argument("--side", type=int, default=128, help="pixels to which every image is enlarged")
settings = parser.parse_args()

enc = qwenvit.Encoder.from_pretrained(settings.model)
middle = enc.config.depth // 2

# %% The images, uint8 [N, 3, side, side].
digits = load_digits()
classes = digits.target[: settings.digits]
small = torch.from_numpy(digits.images[: settings.digits]).float()[:, None] * (255 / 16)


def enlarged(images: torch.Tensor) -> torch.Tensor:
    large = interpolate(images.float(), (settings.side, settings.side), mode="bicubic")
    return large.clamp(0, 255).byte().expand(-1, 3, -1, -1)


photos = [torch.from_numpy(photo.copy()).permute(2, 0, 1) for photo in load_sample_images().images]
places = [
    (photo, top, left)
    for top in range(0, photos[0].shape[1] - 102, 54)
    for left in range(0, photos[0].shape[2] - 102, 54)
    for photo in photos
][: settings.crops]
pieces = torch.stack([photo[:, y : y + 96, x : x + 96] for photo, y, x in places])
moved = torch.stack([photo[:, y + 6 : y + 102, x + 6 : x + 102] for photo, y, x in places]) * 0.8


# %% Vectors of each kind.
def vectors(images: torch.Tensor) -> dict[str, np.ndarray]:
    area = settings.side**2
    bounds = {"min_pixels": area, "max_pixels": area, "channels": "first"}
    out = enc.encode(list(images), keep_patches=True, **bounds)
    tokens = enc.config.merge_unit
    sizes = [int(grid.prod()) // tokens for grid in out.grid_thw]
    kinds = {
        "pixels, shrunk to 8×8": interpolate(images.float(), (8, 8), mode="area").flatten(1),
        "patches of the last block, mean": out.pooled("patches"),
        f"patches of layer {middle}, mean": torch.stack(
            [item.maps[0].float().mean((0, 1)) for item in enc.features(list(images), (middle,), **bounds)]
        ),
        "tokens, mean": out.pooled("mean"),
        "tokens, one after another": torch.stack([item.tokens.float().flatten() for item in out]),
    }
    for level, features in enumerate(out.deepstack):
        kinds[f"DeepStack {level}, mean"] = torch.stack([one.float().mean(0) for one in features.split(sizes)])
    return {name: of_kind.cpu().numpy() for name, of_kind in kinds.items()}


# %% The table.
folds = StratifiedKFold(5, shuffle=True, random_state=0)
of_digits, of_pieces, of_moved = vectors(enlarged(small)), vectors(enlarged(pieces)), vectors(enlarged(moved))
print(f"{settings.model}: {len(classes)} digits, {len(places)} crops, enlarged to {settings.side}²\n")
print("| vectors | width | digits, % | crops, % |\n|---|---|---|---|")
for name, rows in of_digits.items():
    right = cross_val_score(KNeighborsClassifier(5, metric="cosine"), rows, classes, cv=folds).mean()
    neighbours = NearestNeighbors(n_neighbors=1, metric="cosine").fit(of_pieces[name])
    nearest = neighbours.kneighbors(of_moved[name], return_distance=False)[:, 0]
    found = (nearest == np.arange(len(places))).mean()
    print(f"| {name} | {rows.shape[1]:,} | {100 * right:.1f} | {100 * found:.1f} |")
