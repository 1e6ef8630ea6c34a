"""What `bench_vllm.py` adds to vLLM's worker: seeded weights, the tower alone, and the time of each stage.

vLLM imports this module in the process that has the model (`worker_extension_cls`), and calls the methods by name.
"""

from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from vllm import __version__
from vllm.model_executor.model_loader import register_model_loader
from vllm.model_executor.model_loader.base_loader import BaseModelLoader

from common.timing import wall_seconds
from vllm_bench.engine_options import LOAD_FORMAT
from vllm_bench.stages import ENCODER_STEP, EXECUTE, TEXT, TOWER, timed
from vllm_bench.truth import output_errors
from vllm_bench.weights import seeded_weights


@register_model_loader(LOAD_FORMAT)
class SeededLoader(BaseModelLoader):
    """Load the weights of `seeded_weights` as vLLM loads those of a checkpoint."""

    def download_model(self, model_config: Any) -> None:
        """Do nothing: the weights are made here."""

    def load_weights(self, model: nn.Module, model_config: Any) -> None:
        """Load all weights.

        Raises:
            ValueError: the model says that it was not given all of its parameters.
        """
        device = next(model.parameters()).device
        loaded = model.load_weights(seeded_weights(Path(model_config.model), model_config.dtype, device))
        missing = {name for name, _ in model.named_parameters()} - loaded
        if missing:
            raise ValueError(
                f"load_weights: expected all parameters, did not get {len(missing)}: {sorted(missing)[:5]}"
            )


class BenchWorker:
    """Methods that vLLM adds to its worker."""

    model_runner: Any

    def bench_model(self) -> dict[str, Any]:
        """Return vLLM's version, the bytes of GPU memory, and where the model, its tower and the parts come from."""
        model = self.model_runner.get_model()
        parts = {type(part).__module__.partition(".")[0] for part in model.visual.modules()}
        classes = {"model": qualified_name(model), "tower": qualified_name(model.visual)}
        memory = torch.cuda.memory_reserved() if torch.cuda.is_available() else 0
        return {"vllm": __version__, **classes, "tower_packages": sorted(parts), "memory": memory}

    def bench_graphs(self) -> dict[str, Any] | None:
        """Return the sizes in tokens of vLLM's CUDA graphs of the tower, and how many images ran in one and in none."""
        manager = self._bench_manager()
        if manager is None:
            return None
        return {"sizes": manager.token_budgets, "hits": manager.graph_hits, "misses": manager.graph_misses}

    def bench_tower_errors(self, path: str) -> list[float]:
        """Return the relative L2 error of each output of the tower, for a file of `Truth.write_case`."""
        inputs, truth = self._bench_load(path)
        return output_errors(torch.cat(tuple(self._bench_encode(inputs))), truth)

    def bench_tower_times(self, path: str, warm_calls: int, calls: int) -> list[float]:
        """Return the wall seconds of calls of the tower, after some untimed ones."""
        inputs, _ = self._bench_load(path)
        seconds = [wall_seconds(lambda: self._bench_encode(inputs)) for _ in range(warm_calls + calls)]
        return seconds[warm_calls:]

    def _bench_load(self, path: str) -> tuple[dict[str, Tensor], Tensor]:
        """Return the arguments of `embed_multimodal` for a file of `Truth.write_case`, and the truth."""
        if getattr(self, "_bench_file", None) != path:
            self._bench_file, self._bench_tensors = path, torch.load(path, map_location=self._bench_device())
        found = self._bench_tensors
        video = len(found["grid"]) == 1 and found["grid"][0, 0] > 1
        pixels, grid = ("pixel_values_videos", "video_grid_thw") if video else ("pixel_values", "image_grid_thw")
        settings = self.model_runner.model_config.multimodal_config
        given = "levels" if getattr(settings, "mm_device_do_normalize", False) else "pixel_values"
        return {pixels: found[given], grid: found["grid"].cpu()}, found["truth"]  # vLLM keeps grids on the CPU

    @torch.inference_mode()
    def _bench_encode(self, inputs: dict[str, Tensor]) -> Any:
        """Encode as vLLM's model runner does: in a CUDA graph where there is one, else by the model."""
        model, manager, outputs = self.model_runner.get_model(), self._bench_manager(), None
        modality = "video" if "video_grid_thw" in inputs else "image"
        if manager is not None and manager.supports_modality(modality):
            outputs = manager.execute(inputs)
        return model.embed_multimodal(**inputs) if outputs is None else outputs

    def _bench_manager(self) -> Any:
        return getattr(self.model_runner, "encoder_cudagraph_manager", None)

    def _bench_device(self) -> torch.device:
        return torch.device(self.model_runner.device)

    def bench_watch(self, on: bool) -> None:
        """Time the stages of all later requests, the GPU synchronised around each; or stop."""
        if on:
            self._bench_times: dict[str, float] = {}
            self._bench_hooks = [hook for hook in self._bench_stages() if hasattr(hook[0], hook[1])]
            for owner, method, stage in self._bench_hooks:
                setattr(owner, method, timed(getattr(owner, method), stage, self._bench_times))
        else:
            for owner, method, _ in self._bench_hooks:
                delattr(owner, method)

    def _bench_stages(self) -> list[tuple[Any, str, str]]:
        runner, model, manager = self.model_runner, self.model_runner.get_model(), self._bench_manager()
        found = [(runner, "_execute_mm_encoder", ENCODER_STEP), (runner, "_model_forward", TEXT)]
        found += [(runner, "execute_model", EXECUTE), (model, "embed_multimodal", TOWER)]
        return found + ([(manager, "execute", TOWER)] if manager is not None else [])

    def bench_take_times(self) -> dict[str, float]:
        """Return the seconds of each stage since the last call."""
        times = dict(self._bench_times)
        self._bench_times.clear()
        return times

    def bench_keep(self, on: bool) -> None:
        """Keep the embeddings of all later images, and note how their pixels come; or stop."""
        owners = [(self.model_runner.get_model(), "embed_multimodal"), (self._bench_manager(), "execute")]
        owners = [(owner, method) for owner, method in owners if owner is not None]
        if on:
            self._bench_embeddings: list[Tensor] = []
            self._bench_bytes = False
        for owner, method in owners:
            if on:
                setattr(owner, method, self._bench_keeping(getattr(owner, method)))
            else:
                delattr(owner, method)

    def _bench_keeping(self, method: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(method)
        def keep(*args: Any, **kwargs: Any) -> Any:
            outputs = method(*args, **kwargs)
            if outputs is not None:
                fields = (args[0] if args else kwargs).values()
                bytes_come = any(isinstance(f, Tensor) and f.dtype == torch.uint8 and f.numel() for f in fields)
                self._bench_bytes = self._bench_bytes or bytes_come
                self._bench_embeddings.append(torch.cat(tuple(outputs)).cpu())
            return outputs

        return keep

    def bench_kept(self, path: str) -> dict[str, Any]:
        """Write the kept embeddings to a file; return how many there are, and whether any pixels came as bytes."""
        torch.save(self._bench_embeddings, path)
        return {"count": len(self._bench_embeddings), "bytes": self._bench_bytes}


def qualified_name(instance: object) -> str:
    return f"{type(instance).__module__}.{type(instance).__qualname__}"
