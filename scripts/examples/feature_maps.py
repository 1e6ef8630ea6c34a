#!/usr/bin/env python
"""Look at what layers see: `python scripts/examples/feature_maps.py cat.jpg dog.jpg --model Qwen/Qwen3-VL-8B-Instruct`.

A script in cells (`# %%`): run it whole, or cell by cell in an editor that knows them.
"""

# %% Settings
import argparse

import torch
from PIL import Image, ImageOps

import qwenvit
from qwenvit.features.pictures import pca_pictures, similarity_maps, similarity_pictures
from qwenvit.features.sheet import contact_sheet, outline_cell

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("images", nargs="+", help="image files, of any sizes")
parser.add_argument("-m", "--model", default="demo", help="a checkpoint; 'demo' has random weights")
parser.add_argument("-o", "--output", default="feature-maps.png")
settings = parser.parse_args()

enc = qwenvit.Encoder.from_pretrained(settings.model)
depth = enc.config.depth

# %% Maps of three layers. Indices are those of transformers' hidden_states: 0 is the first block's input, -1 the last
# block's output. One call for all images: they share batches, and each gets a map of its own size.
layers = (depth // 4, depth // 2, -1)
features = enc.features(settings.images, layers, max_pixels=512 * 512)
for name, item in zip(settings.images, features, strict=True):
    print(name, "layers", item.layers, "maps", [list(one.shape) for one in item.maps], item.maps[0].dtype)

# %% Channels are not alike: a few may be far larger than the rest, and then they decide every distance.
for index, layer in enumerate(features[0].layers):
    rows = torch.cat([item.maps[index].flatten(0, 1) for item in features]).float()
    spread = rows.std(0)
    print(f"layer {layer}: largest channel {spread.max() / spread.median():.1f} times the median one")

# %% Principal components: one PCA for all images of a layer, so that a colour means the same in each.
columns = [pca_pictures([item.maps[index] for item in features], cell=8) for index in range(len(layers))]

# %% How similar is every patch to the one in the middle of the first image?
last = [item.maps[-1] for item in features]
row, column = last[0].shape[0] // 2, last[0].shape[1] // 2
similar = similarity_maps(last, last[0][row, column])
columns.append(similarity_pictures(similar, cell=8))

# %% For pixel-wise work, maps become [1, channels, H, W], as segmentation heads take them.
dense = torch.nn.functional.interpolate(last[0].permute(2, 0, 1)[None].float(), scale_factor=4, mode="bilinear")
print("for a head:", list(dense.shape))

# %% The sheet: a row an image.
sheet = []
for index, name in enumerate(settings.images):
    maps = [pictures[index] for pictures in columns]
    with Image.open(name) as image:
        upright = ImageOps.exif_transpose(image).convert("RGB")  # files are rotated by EXIF before the tower sees them
        sheet.append([upright.resize(maps[0].size), *maps])
sheet[0] = [outline_cell(one, last[0].shape[:2], (row, column)) for one in sheet[0]]
captions = ["", *(f"layer {layer}" for layer in features[0].layers), "cosine to the outlined patch"]
contact_sheet(sheet, captions, [[name] for name in settings.images]).save(settings.output)
print("->", settings.output)
