"""What qwenvit changes in vLLM's models."""

import gc
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from vllm.config import VllmConfig
from vllm.logger import init_logger
from vllm.model_executor.models.utils import StageMissingLayer

from qwenvit import __version__
from qwenvit.integrations.vllm.mode import Mode, Setup, choose_mode
from qwenvit.integrations.vllm.options import options_of, read_options
from qwenvit.integrations.vllm.pixel_model import PixelModel
from qwenvit.integrations.vllm.pixel_processor import bytes_rule, pixels_obstacle
from qwenvit.integrations.vllm.tower import VllmTower
from qwenvit.towers.choose import Tower

logger = init_logger("vllm.qwenvit")  # below "vllm", whose handlers show it


class QwenvitModel(PixelModel):
    """In front of a model class of vLLM: its vision tower, or the tower's attention, becomes qwenvit's.

    Attributes:
        qwenvit_mode: `"tower"`, `"attention"`, or `"off"` for a tower that is vLLM's own.
    """

    visual: nn.Module
    qwenvit_mode: Mode = "off"
    _tokens_to_profile: int | None = None
    """The most tokens of a batch of images, until CUDA graphs for them are captured in vLLM's profile run."""

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__(vllm_config=vllm_config, prefix=prefix)  # type: ignore[call-arg]
        model_config, options = vllm_config.model_config, read_options(vllm_config.additional_config)
        if isinstance(self.visual, StageMissingLayer):
            if options.tower != "auto" or options.pixels:
                raise ValueError(
                    "additional_config: qwenvit: expected neither tower nor pixels to be asked for, since vLLM has "
                    f"made no vision tower (limit_mm_per_prompt of 0, or language_model_only), got {options}"
                )
            logger.info_once("qwenvit: off; vLLM has made no vision tower", scope="global")
            return
        parameter = next(self.visual.parameters())
        device, dtype = parameter.device, parameter.dtype
        del parameter  # it would keep memory of vLLM's tower
        if options != options_of(model_config):
            raise ValueError(
                f"additional_config: qwenvit: expected no options with {model_config.architecture}, which is loaded as "
                f"another architecture, so that vLLM's processor does not see them, got {options}"
            )
        setup = Setup.read(vllm_config, self.visual)
        choice = choose_mode(options, setup, self.visual, model_config.hf_config.to_dict(), device)
        self.qwenvit_mode = choice.mode
        if choice.make_tower is not None:
            input_norm = getattr(self.visual, "input_norm", None)  # from vLLM 0.30 on
            del self.visual
            gc.collect()  # vLLM's layers refer to themselves; their memory is to be free before ours is taken
            tower = _allocate(choice.make_tower, device, dtype)
            self.visual = VllmTower(tower, input_norm, use_graphs=not model_config.enforce_eager)
            if not model_config.multimodal_config.skip_mm_profiling:
                self._tokens_to_profile = vllm_config.scheduler_config.max_num_encoder_input_tokens
            # Adapters may have parts for the tower, which vLLM leaves out too: it finds no layers for them here.
            self.lora_skip_prefixes = [*getattr(self, "lora_skip_prefixes", ()), "visual."]
            # They are for vLLM's own tower: ours has CUDA graphs of its own.
            vllm_config.compilation_config.cudagraph_mm_encoder = False
            vllm_config.compilation_config.compile_mm_encoder = False
        if choice.mode == "attention" and isinstance(vllm_config.additional_config, dict):
            # It enters the key of vLLM's cache of compiled code, which does not see that a forward is ours.
            key = {"qwenvit_attention": f"{__version__} {choice.impl}"}
            vllm_config.additional_config = vllm_config.additional_config | key
        obstacle = pixels_obstacle(model_config)
        if options.pixels and obstacle:
            raise ValueError(f"additional_config: qwenvit.pixels: images cannot travel as RGB bytes: {obstacle}")
        self.qwenvit_pixels = bytes_rule(model_config)
        pixels = f"as pixel values, because {obstacle}" if obstacle else "as RGB bytes"
        where = f"{dtype} on {device}"
        if choice.mode == "tower" and choice.impl == "triton" and model_config.enforce_eager:
            where += " without CUDA graphs, as enforce_eager asks"
        logger.info_once("qwenvit: %s; %s; images travel %s", choice, where, pixels, scope="global")

    def embed_multimodal(self, **kwargs: Any) -> Any:
        """Embed images and videos as vLLM's model does.

        In vLLM's profile run, graphs for images of any size that vLLM may ask for at once are captured first: vLLM 0.27
        and later then count their memory. With `mm_encoder_tp_mode="data"` each rank captures them, whether it gets an
        item in that run or not.
        """
        if self._tokens_to_profile is not None and isinstance(self.visual, VllmTower):
            grids = [kwargs[name] for name in ("image_grid_thw", "video_grid_thw") if kwargs.get(name) is not None]
            asked = sum(int(torch.as_tensor(grid).prod(-1).sum()) for grid in grids)
            self.visual.warm_up(max(asked, self._tokens_to_profile * self.visual.spatial_merge_size**2))
        self._tokens_to_profile = None
        return super().embed_multimodal(**kwargs)


def _allocate(make_tower: Callable[[], Tower], device: torch.device, dtype: torch.dtype) -> Tower:
    """Return a tower whose weights have memory, and are to be loaded."""
    with torch.inference_mode(False):
        with torch.device("meta"):
            tower = make_tower()
        return tower.to(dtype).to_empty(device=device)
