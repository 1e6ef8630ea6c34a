"""What has to be equal, to the last bit, before `bench_encode.py` reports a time."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from encode_bench.stages import decode, on_device, preprocess, tower_batches
from peers.transformers_processors import process
from qwenvit import Encoder
from qwenvit.outputs import Embeddings

COMPARED_IMAGES = 3
"""Images of a folder whose embeddings are compared."""


def pixel_failures(encoder: Encoder, processor: Any, path: Path) -> list[str]:
    """Compare the pixel values of one image: ours on the CPU, ours on the tower's device, and transformers'.

    Args:
        encoder: whose image processor.
        processor: transformers', from `build_processor`.
        path: the image.

    Returns:
        A line for each pair that is not equal.
    """
    ours, grid = encoder.image_processor(path)
    theirs, their_grid = process(processor, path, "cpu")
    on_gpu, gpu_grid = preprocess(encoder, on_device(encoder, decode(path)))
    found = []
    if not same([ours, grid], [theirs, their_grid]):
        found.append(f"{path.name}: pixel values differ from transformers' on the CPU")
    if not same([ours.to(encoder.dtype), grid], [on_gpu.cpu(), gpu_grid.cpu()]):
        found.append(f"{path.name}: pixel values on the {encoder.device.type} differ from those on the CPU")
    return found


def token_failures(encoder: Encoder, paths: Sequence[Path]) -> list[str]:
    """Compare `encode` of the first images with the tower's outputs for their pixel values."""
    paths = list(paths[:COMPARED_IMAGES])
    if same(layers_of(encoder.encode(paths)), tower_layers(encoder, tower_batches(encoder, paths))):
        return []
    return [f"{paths[0].name} to {paths[-1].name}: encode differs from the tower for the same pixel values"]


def layers_of(embeddings: Embeddings) -> list[Tensor]:
    return [embeddings.packed, *embeddings.deepstack]


@torch.no_grad()
def tower_layers(encoder: Encoder, inputs: Sequence[tuple[Tensor, Tensor]]) -> list[Tensor]:
    """Return the tokens and DeepStack features of all batches."""
    outputs = [encoder(pixels, grid) for pixels, grid in inputs]
    layers = ([output.pooler_output, *output.deepstack_features] for output in outputs)
    return [torch.cat(parts) for parts in zip(*layers, strict=True)]


def same(some: Sequence[Tensor], others: Sequence[Tensor]) -> bool:
    """Whether all tensors are equal to the last bit."""
    return all(a.dtype == b.dtype and torch.equal(a, b) for a, b in zip(some, others, strict=True))
