"""Ask vLLM engines for log-probabilities: a program for the Python of an environment that `make test-vllm` makes.

    python vllm_engine.py JOB ANSWERS

JOB is a file of `torch.save`: `{"engines": {name: engine}, "prompts": {name: prompt}}`. Engines start one after another
in this process; each is a dictionary with

- `arguments`: those of `vllm.LLM`;
- `plugin`: whether qwenvit's plugin is on from this engine on, whatever VLLM_PLUGINS says;
- `change`: `"packed"` for the fast tower with the reference operations; `"spoiled"` or `"spoiled attention"` for a
  tower or an attention whose results are 1 % off;
- `reload`: the folder of another checkpoint, whose weights are loaded before the prompts are asked;
- `in_parts`: whether the model's `load_weights` is called instead of vLLM's reload, with three of the vision tower's
  tensors at a time, the last of them first.

A prompt that is a list has the messages of a chat; the prompts of a tuple are asked at once. ANSWERS is a file of the
same kind, `{(engine, prompt): (token ids, log-probabilities)}`: those of a prompt after its first token, with its
placeholders expanded; and under `(engine, "report")`, what the model says of itself.
"""

import functools
import gc
import os
import sys
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from vllm import LLM, SamplingParams
from vllm.distributed import cleanup_dist_env_and_memory
from vllm.model_executor.model_loader.utils import _MODEL_ARCH_BY_HASH


def main(job: str, answers: str) -> None:
    asked = torch.load(job, weights_only=False)
    found = {}
    for name, engine in asked["engines"].items():
        if engine.get("plugin"):
            from qwenvit.integrations.vllm import register

            register()
            _MODEL_ARCH_BY_HASH.clear()  # vLLM looks a model's class up once in a process
        with Patches(engine.get("change")):
            answered = run(engine, asked["prompts"])
        found |= {(name, prompt): answer for prompt, answer in answered.items()}
        cleanup_dist_env_and_memory()
    torch.save(found, answers)
    sys.stdout.flush()
    os._exit(0)  # a thread of vLLM's that still runs would now and then abort the interpreter's end


def run(spec: dict[str, Any], prompts: dict[Any, Any]) -> dict[Any, Any]:
    before = weakref.WeakSet(vllm_towers())  # of engines that have ended: some versions of vLLM keep them
    engine = LLM(**spec["arguments"])
    found = {}
    if folder := spec.get("reload"):
        before = engine.apply_model(addresses)
        if spec.get("in_parts"):
            engine.apply_model(functools.partial(load_in_parts, folder))
        else:
            engine.collective_rpc("reload_weights", kwargs={"weights_path": folder})
        assert engine.apply_model(addresses) == before
    for name, prompt in prompts.items():  # one by one, so that no answer depends on another prompt
        found[name] = ask(engine, prompt)
    if os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] == "0":
        towers = sum(tower not in before for tower in vllm_towers())
        found["report"] = engine.apply_model(report)[0] | {"vllm_towers": towers}
    return found


def ask(engine: LLM, prompt: Any) -> tuple[list[int], torch.Tensor]:
    method = engine.chat if isinstance(prompt, list) else engine.generate
    asked = list(prompt) if isinstance(prompt, tuple) else prompt
    all_tokens, logprobs = [], []
    for output in method(asked, SamplingParams(max_tokens=1, prompt_logprobs=0), use_tqdm=False):
        tokens, each = output.prompt_token_ids[1:], output.prompt_logprobs[1:]
        logprobs += [candidates[token].logprob for token, candidates in zip(tokens, each, strict=True)]
        all_tokens += tokens
    return all_tokens, torch.tensor(logprobs)


def report(model: torch.nn.Module) -> dict[str, Any]:
    visual = getattr(model, "visual", None)
    return {
        "class": f"{type(model).__module__}.{type(model).__qualname__}",
        "mode": getattr(model, "qwenvit_mode", None),
        "visual": type(visual).__name__,
        "attention": type(visual.blocks[0].attn).__name__ if hasattr(visual, "blocks") else None,
        "tower": type(visual.tower).__name__ if hasattr(visual, "tower") else None,
        "embeddings": None if visual is None else embeddings(model),
    }


def embeddings(model: torch.nn.Module) -> torch.Tensor:
    """Return what the tower makes of random patches, which no language model amplifies."""
    config = model.config.vision_config
    width = 3 * config.temporal_patch_size * config.patch_size**2
    patches = torch.randn(8 * 12 + 2 * 4 * 6, width, generator=torch.Generator().manual_seed(0))
    return model.visual(patches.to(model.visual.dtype), [[1, 8, 12], [2, 4, 6]]).float()


def vllm_towers() -> list[torch.nn.Module]:
    """Return the vision towers of vLLM that take memory in this process."""
    gc.unfreeze()  # vLLM hides what it has made when it started
    gc.collect()
    return [each for each in gc.get_objects() if type(each).__name__.endswith("VisionTransformer")]


def addresses(model: torch.nn.Module) -> list[int]:
    return [parameter.data_ptr() for parameter in model.visual.parameters()]


def load_in_parts(folder: str, model: torch.nn.Module) -> None:
    with safe_open(next(Path(folder).glob("*.safetensors")), "pt") as file:
        names = sorted((name for name in file.keys() if "visual." in name), reverse=True)  # noqa: SIM118 (no mapping)
        for start in range(0, len(names), 3):
            model.load_weights((name, file.get_tensor(name)) for name in names[start : start + 3])


class Patches:
    """Replace a part of the plugin while an engine lives."""

    def __init__(self, what: str | None) -> None:
        self.what = what

    def __enter__(self) -> None:
        if self.what is None:
            return
        from qwenvit import ops
        from qwenvit.integrations.vllm import mode
        from qwenvit.integrations.vllm.tower import VllmTower
        from qwenvit.towers.fast import FastTower

        self.place, self.name, new = {
            "packed": (mode, "tower_class", lambda *_: FastTower),
            "spoiled": (VllmTower, "forward", spoil(VllmTower.forward)),
            "spoiled attention": (ops, "rope_attention", spoil(ops.rope_attention)),
        }[self.what]
        self.saved = getattr(self.place, self.name)
        setattr(self.place, self.name, new)

    def __exit__(self, *_: object) -> None:
        if self.what is not None:
            setattr(self.place, self.name, self.saved)


def spoil(compute: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """Return a function whose results have noise of 1 % (relative L2)."""

    @functools.wraps(compute)
    def spoiled(*args: Any, **kwargs: Any) -> torch.Tensor:
        right = compute(*args, **kwargs)
        noise = torch.randn(right.shape, generator=torch.Generator().manual_seed(0)).to(right)
        return right + 0.01 * right.norm() / noise.norm() * noise

    return spoiled


if __name__ == "__main__":  # a process that vLLM starts may import this file
    main(*sys.argv[1:])
