#!/usr/bin/env python
"""See which pixels a token depends on: `python scripts/examples/saliency.py cat.jpg --model Qwen/Qwen3-VL-8B-Instruct`.

A script in cells (`# %%`). The gradient of a token flows through the reference tower and the preprocessing to the
image's own pixels.
"""

# %% Settings
import argparse

import numpy as np
import torch
from PIL import Image, ImageOps

import qwenvit
from qwenvit.features.pictures import similarity_pictures
from qwenvit.features.sheet import contact_sheet, fit, outline_cell, stretch

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("image", help="an image file")
parser.add_argument("-m", "--model", default="demo", help="a checkpoint; 'demo' has random weights")
parser.add_argument("--token", metavar="ROW,COLUMN", help="of merged tokens; default: the one in the middle")
parser.add_argument("--max-tokens", type=int, default=256, help="tokens of the image; the memory grows with them")
parser.add_argument("-o", "--output", default="saliency.png")
settings = parser.parse_args()

enc = qwenvit.Encoder.from_pretrained(settings.model, impl="reference")  # the reference tower has gradients
enc.tower.gradient_checkpointing = True  # less memory; the same gradients

# %% The image: floats in [0, 1] that require gradients.
with Image.open(settings.image) as opened:
    picture = ImageOps.exif_transpose(opened).convert("RGB")
image = torch.from_numpy(np.array(picture)).permute(2, 0, 1).to(enc.device).float() / 255
image.requires_grad_()


# %% From pixels to the tokens `[rows, columns, width]`: every step is differentiable.
def tokens_of(image):
    pixel_values, grid = enc.image_processor(
        image,
        differentiable=True,
        do_rescale=False,
        channels="first",
        resize="torch",
        max_tokens=settings.max_tokens,
        device=enc.device,
    )
    merge = enc.config.spatial_merge_size
    return enc(pixel_values, grid).pooler_output.unflatten(0, (int(grid[0, 1]) // merge, int(grid[0, 2]) // merge))


tokens = tokens_of(image)
rows, columns, _ = tokens.shape
row, column = map(int, settings.token.split(",")) if settings.token else (rows // 2, columns // 2)
token = tokens[row, column].float()

# %% How much does each pixel change the token's length? The gradient is that of the image as it was given.
token.norm().backward()
saliency = image.grad.norm(dim=0)  # [height, width]
print(f"token {row},{column} of {rows} x {columns}; gradient {list(image.grad.shape)}")

# %% A change of one level in 255, along the gradient and at random: how far does the token move?
with torch.no_grad():
    signs = {"gradient": image.grad.sign(), "random": torch.rand_like(image).sub(0.5).sign()}
    moved = {}
    for name, sign in signs.items():
        changed = (image + sign / 255).clamp(0, 1)
        moved[name] = float((tokens_of(changed)[row, column].float().norm() - token.norm()).abs() / token.norm())
print("length changed by", ", ".join(f"{share:.2%} ({name})" for name, share in moved.items()))

# %% The picture: one cell for each patch, on a scale of powers of ten.
patches = torch.nn.functional.adaptive_avg_pool2d(saliency[None], (2 * rows, 2 * columns))[0]
(heat,) = similarity_pictures([patches.clamp(min=float(patches.max()) * 1e-3).log10()])
shown = fit(picture, 480)
marked = outline_cell(shown, (rows, columns), (row, column))
drawn = outline_cell(stretch(heat, shown.size), (rows, columns), (row, column))
captions = [f"token {row},{column}", "gradient of its length: light is the largest, dark 1/1000"]
contact_sheet([[marked, drawn]], captions).save(settings.output)
print("->", settings.output)
