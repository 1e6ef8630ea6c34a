"""The tower in fp32, and the files of its inputs and outputs that engines are compared by."""

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from common.hf_towers import forward
from common.tower_inputs import Case, pixel_values
from qwenvit import parity
from qwenvit.preprocess.patch_processor import IMAGENET_STANDARD_MEAN, OPENAI_CLIP_MEAN, OPENAI_CLIP_STD
from vllm_bench.cases import Shape
from vllm_bench.prompts import Asked, request
from vllm_bench.weights import seeded_tower


class Truth:
    """transformers' tower in fp32 with the weights that every engine gets, rounded to the engines' dtype."""

    def __init__(self, shape: Shape, device: torch.device | str) -> None:
        self.shape, self.device, self.dtype = shape, device, getattr(torch, shape.dtype)
        self.tower: nn.Module = seeded_tower(shape.vision, self.dtype, device).float()

    def outputs(self, pixels: Tensor, grid: Tensor) -> Tensor:
        """Return tokens and DeepStack features, `[1 + levels, tokens, out]` in fp32.

        Args:
            pixels: pixel values in any dtype; they are rounded to the engines' before.
            grid: `[items, 3]`.
        """
        _, tokens, deepstack = forward(self.tower, pixels.to(self.device, self.dtype).float(), grid)
        return torch.stack([tokens, *deepstack])

    def write_case(self, case: Case, path: Path) -> None:
        """Write the inputs of a case, and `outputs` of them.

        The file has `levels`: patches in uint8, as vLLM's processor returns them since 0.28; `pixel_values`: the same
        normalised, as earlier ones do, in the engines' dtype; `grid`: `[items, 3]`; `truth`: the outputs.
        """
        config, grid = self.shape.vision, case.grid_thw()
        levels = levels_of(pixel_values(case, config, self.device, torch.float32))
        mean, std = (OPENAI_CLIP_MEAN, OPENAI_CLIP_STD) if config.traits.windowed else (IMAGENET_STANDARD_MEAN,) * 2
        pixels = normalise(levels, mean, std).to(self.dtype)
        tensors = {"levels": levels, "pixel_values": pixels, "truth": self.outputs(pixels, grid), "grid": grid}
        torch.save({name: tensor.cpu() for name, tensor in tensors.items()}, path)

    def write_requests(self, asked: Sequence[Asked], checkpoint: Path, path: Path) -> list[Tensor]:
        """Write the images of each request as vLLM's `image_embeds`; return `outputs` of them, in fp32 on the CPU."""
        from transformers import AutoProcessor

        processor = AutoProcessor.from_pretrained(checkpoint).image_processor
        truths, embeds = [], []
        for sides, seed in asked:
            images = request(sides, seed)["multi_modal_data"]["image"]
            processed = processor(images=images, return_tensors="pt")
            truths.append(self.outputs(processed["pixel_values"], processed["image_grid_thw"]).cpu())
            joined = torch.cat(tuple(truths[-1]), dim=1).to(self.dtype)
            embeds.append({"image_embeds": joined, "image_grid_thw": processed["image_grid_thw"]})
        torch.save(embeds, path)
        return truths


def levels_of(normal: Tensor) -> Tensor:
    """Return bytes that are spread over their whole range as normal values are over theirs."""
    return (normal * 64 + 128).clamp(0, 255).to(torch.uint8)


def normalise(levels: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """Return patches in fp32, of which each channel has its mean and standard deviation: `[patches, C·T·P·P]`."""
    shifts, scales = (torch.tensor(each, device=levels.device)[:, None] for each in (mean, std))
    channels = levels.unflatten(1, (len(mean), -1)).float() / 255
    return ((channels - shifts) / scales).flatten(1)


def output_errors(joined: Tensor, truth: Tensor) -> list[float]:
    """Return the relative L2 error of the tokens, and of the features of each DeepStack level.

    Args:
        joined: what vLLM's towers return, `[tokens, out·(1 + levels)]`.
        truth: `[1 + levels, tokens, out]`.
    """
    levels = joined.to(truth).unflatten(1, (len(truth), -1)).unbind(1)
    return [parity.Difference.of(a, b).relative_l2 for a, b in zip(levels, truth, strict=True)]
