"""vLLM's models, taking RGB bytes where their processor has left the pixels to the tower's side."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from qwenvit.integrations.vllm.pixel_rule import RGB, RGB_SIZE, PixelRule, select_images

GRID = "image_grid_thw"


class PixelModel:
    """In front of a model class of vLLM: images that come as bytes get pixel values, then vLLM's methods run.

    Attributes:
        qwenvit_pixels: how; None where they cannot.
    """

    qwenvit_pixels: PixelRule | None = None

    def embed_multimodal(self, **kwargs: object) -> Any:
        """Return the embeddings of images and videos."""
        return super().embed_multimodal(**self._with_pixel_values(kwargs))  # type: ignore[misc]

    def select_encoder_cudagraph_items(self, mm_kwargs: dict[str, Any], indices: list[int]) -> Any:
        """Return the inputs of some images or videos, for vLLM's CUDA graphs of its own tower.

        vLLM calls this before everything else that reads pixel values, and works on what it returns.
        """
        if RGB in mm_kwargs:
            rgb, sizes = select_images(mm_kwargs[RGB], mm_kwargs[RGB_SIZE], indices)
            grids = mm_kwargs[GRID].tolist()
            return {
                "pixel_values": self._rule.pixel_values(rgb, sizes, [grids[index] for index in indices]),
                GRID: [grids[index] for index in indices],
            }
        return super().select_encoder_cudagraph_items(mm_kwargs, indices)  # type: ignore[misc]

    @property
    def _rule(self) -> PixelRule:
        if self.qwenvit_pixels is None:
            raise ValueError(f"{RGB}: expected pixel values, which this model's processor does not let it compute")
        return self.qwenvit_pixels

    def _with_pixel_values(self, kwargs: dict[str, Any]) -> dict[str, Any]:
        """Put pixel values in the place of bytes; vLLM embeds modalities in the order of these keys."""
        if RGB not in kwargs:
            return kwargs
        grids: Tensor | Sequence[Sequence[int]] = kwargs[GRID]
        grids = grids.tolist() if isinstance(grids, Tensor) else grids
        pixel_values = self._rule.pixel_values(kwargs[RGB], kwargs[RGB_SIZE], grids)
        return {
            "pixel_values" if key == RGB else key: pixel_values if key == RGB else value
            for key, value in kwargs.items()
            if key != RGB_SIZE
        }
