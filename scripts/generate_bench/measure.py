"""The measurements of `bench_generate.py` on one model: parity first, then times."""

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from common.encoders import fresh_encoder
from common.hf_towers import sharing_copy
from common.steps import raise_on
from common.tower_inputs import Case
from e2e.model_bench import RIVAL_ERROR_FACTOR, quantiles, relative_errors, wrong_outputs
from e2e.timing import time_interleaved
from generate_bench.models import prompt
from peers.rivals import SDPA
from qwenvit.arguments import Impl
from qwenvit.integrations.transformers import use_qwenvit, use_tower

Row = dict[str, Any]
"""Figures of one case."""

USE_TOWER, USE_QWENVIT, ENCODER = "use_tower", "use_qwenvit", "encoder alone"
INSIDE = "use_tower, the tower inside"
"""What `get_image_features` calls: the rest of its time is transformers', which asks the GPU for the grids."""
OURS = (USE_TOWER, USE_QWENVIT)
NEW_TOKENS = 16
"""Tokens that are generated and compared."""
POSITIONS = 64
"""Positions of the prompt, evenly spread and the last among them, whose log-probabilities are compared."""
NOISE_FACTOR = 1.25
"""Largest ratio of the error of log-probabilities to transformers' own, both against fp32. The tower's outputs have a
sharper bound (`parity.ERROR_FACTOR`); the language model then makes more or less of an error at random."""
ROUNDS, MAX_SECONDS, MIN_ROUNDS = 20, 1.0, 4
"""Timed rounds. A contender that would take longer than MAX_SECONDS in all skips rounds, down to MIN_ROUNDS."""
CLOSE_ROUNDS = 200
"""The same for calls whose differences are fractions of a millisecond. They take turns by themselves."""
WARM_CALLS = 2
"""Untimed calls of qwenvit's before: a CUDA graph may be captured when its capacity comes the second time."""


class GenerateBench:
    """One model as it is, with other attention in its tower, and with qwenvit's tower; all share the parameters.

    Args:
        model: a whole transformers model with sdpa attention, in 16 bits. It is frozen.
        impl: the tower that `use_tower` and `use_qwenvit` put in place.
        attentions: further names of attention functions for transformers' tower, by the contender's name.
    """

    def __init__(self, model: nn.Module, impl: Impl, attentions: Mapping[str, str]) -> None:
        model.requires_grad_(False)
        self.truth = copy.deepcopy(model).float()
        self.models = {name: sharing_copy(model) for name in (SDPA, *attentions, *OURS)}
        for name, attention in attentions.items():
            self.models[name].model.visual.config._attn_implementation = attention
        handle = use_tower(self.models[USE_TOWER], impl)
        use_qwenvit(self.models[USE_QWENVIT], impl)
        self.extra_bytes = handle.extra_bytes
        self.encoder = fresh_encoder(handle.tower)

    def measure(self, case: Case) -> Row:
        """Check parity on a case, then time it.

        Returns:
            `parity`: see `parity`; `first` and `tower`: quantiles of the seconds until the first token and of
            `get_image_features`, by contender; `close`: those of use_tower's `get_image_features`, of the tower inside
            it and of the encoder alone.

        Raises:
            ParityError: a contender's outputs, log-probabilities or tokens differ by more than rounding.
        """
        inputs = prompt(self.models[SDPA], self.encoder.config, case)
        row: Row = {"name": case.name, "images": len(case.grid), "patches": case.patches}
        row |= {"prompt": inputs["input_ids"].shape[1], "parity": self.parity(inputs)}
        pixels, grid = inputs["pixel_values"], case.grid_thw()
        calls: dict[str, dict[str, Callable[[], Any]]] = {
            "first": {name: partial(self.generate, name, inputs, 1) for name in self.models},
            "tower": {name: partial(self.features, name, inputs) for name in self.models},
            "close": {
                INSIDE: lambda: self.inside(inputs),
                USE_TOWER: lambda: self.features(USE_TOWER, inputs),
                ENCODER: lambda: self.encoder(pixels, grid),
            },
        }
        ours = [calls[kind][name] for kind in ("first", "tower") for name in OURS]
        for call in [*ours, *calls["close"].values()] * WARM_CALLS:
            call()
        # What the tower saves is compared with what the whole model saves, so they are timed in the same rounds.
        seconds: dict[str, list[float]] = {}
        for kinds, rounds in ((("first", "tower"), ROUNDS), (("close",), CLOSE_ROUNDS)):
            together = {f"{kind} {name}": call for kind in kinds for name, call in calls[kind].items()}
            seconds |= time_interleaved(together, rounds, MAX_SECONDS, MIN_ROUNDS)
        for kind, named in calls.items():
            row[kind] = {name: quantiles(seconds[f"{kind} {name}"]) for name in named}
        return row

    def parity(self, inputs: dict[str, Tensor]) -> Row:
        """Compare all contenders with the whole model in fp32.

        Returns:
            By contender, `features`: relative L2 errors of the tower's outputs; `whole`: root mean square error of
            log-probabilities; `tower`: the same where only the tower computes in 16 bits. `noise`: the largest error of
            any log-probability of transformers (sdpa). `tokens`: by contender, how many of the first tokens are
            transformers', and `gap`: how far apart fp32 sees the two tokens that differ first (0 where none does).

        Raises:
            ParityError: outputs, log-probabilities or tokens differ by more than rounding.
        """
        length = inputs["input_ids"].shape[1]
        positions = torch.linspace(0, length - 1, POSITIONS).long().unique().to(inputs["input_ids"].device)
        true_features = layers_of(features(self.truth, inputs))
        truth = log_probabilities(self.truth, inputs, positions)
        row: Row = {"features": {}, "whole": {}, "tower": {}}
        for name, model in self.models.items():
            row["features"][name] = relative_errors(layers_of(features(model, inputs)), true_features)
            errors = log_probabilities(model, inputs, positions) - truth
            row["whole"][name] = float(errors.square().mean().sqrt())
            if name == SDPA:
                row["noise"] = float(errors.abs().max())
            with tower_in(self.truth, model):
                errors = log_probabilities(self.truth, inputs, positions) - truth
            row["tower"][name] = float(errors.square().mean().sqrt())
        row |= self.compare_tokens(inputs)
        raise_on(failures(row))
        return row

    def compare_tokens(self, inputs: dict[str, Tensor]) -> Row:
        """Return `tokens` and `gap` of `parity`."""
        theirs = self.generate(SDPA, inputs, NEW_TOKENS)
        found: Row = {"tokens": {}, "gap": {}}
        for name in (name for name in self.models if name != SDPA):
            tokens = self.generate(name, inputs, NEW_TOKENS)
            different = (tokens != theirs).nonzero().flatten().tolist()
            found["tokens"][name] = same = different[0] if different else NEW_TOKENS
            found["gap"][name] = 0.0
            if different:
                last = torch.tensor([inputs["input_ids"].shape[1] + same - 1], device=theirs.device)
                [truth] = log_probabilities(self.truth, continued(inputs, theirs[:same]), last)
                found["gap"][name] = float((truth[theirs[same]] - truth[tokens[same]]).abs())
        return found

    def generate(self, name: str, inputs: dict[str, Tensor], count: int) -> Tensor:
        """Return `count` new tokens `[count]`, chosen greedily."""
        tokens = self.models[name].generate(**inputs, max_new_tokens=count, do_sample=False)
        return tokens[0, inputs["input_ids"].shape[1] :]

    def features(self, name: str, inputs: dict[str, Tensor]) -> Any:
        """Return what the contender's `get_image_features` returns."""
        return features(self.models[name], inputs)

    @torch.no_grad()
    def inside(self, inputs: dict[str, Tensor]) -> Any:
        """Return what the tower inside `get_image_features` of `use_tower` returns."""
        return self.models[USE_TOWER].model.visual(inputs["pixel_values"], grid_thw=inputs["image_grid_thw"])


@torch.no_grad()
def features(model: Any, inputs: dict[str, Tensor]) -> Any:
    return model.get_image_features(inputs["pixel_values"], inputs["image_grid_thw"])


def layers_of(output: Any) -> list[Tensor]:
    """Return the tokens of all images, then the DeepStack features of each level."""
    levels = output.get("deepstack_features") or []  # each a tensor (transformers 5.17), or one for each image (5.23)
    return [layer if isinstance(layer, Tensor) else torch.cat(layer) for layer in (output.pooler_output, *levels)]


@torch.no_grad()
def log_probabilities(model: nn.Module, inputs: dict[str, Tensor], positions: Tensor) -> Tensor:
    """Return the log-probabilities of the next token after each position, `[positions, vocabulary]` in fp32."""
    return model(**inputs, logits_to_keep=positions, use_cache=False).logits[0].float().log_softmax(-1)


def continued(inputs: dict[str, Tensor], tokens: Tensor) -> dict[str, Tensor]:
    """Return the prompt with text tokens after it."""
    more = {
        "input_ids": tokens,
        "attention_mask": torch.ones_like(tokens),
        "mm_token_type_ids": torch.zeros_like(tokens),
    }
    return inputs | {
        name: torch.cat([inputs[name], part[None].to(inputs[name].dtype)], 1) for name, part in more.items()
    }


@contextmanager
def tower_in(model: Any, other: Any) -> Iterator[None]:
    """Let a model compute with the vision tower of another."""
    own = model.model.visual
    model.model.visual = other.model.visual
    try:
        yield
    finally:
        model.model.visual = own


def failures(row: Row) -> list[str]:
    """Describe what differs by more than rounding in the figures of `GenerateBench.parity`.

    Errors are bounded by multiples of those of transformers with sdpa. qwenvit's tokens may differ from transformers'
    where their log-probabilities in fp32 are no further apart than transformers' largest error.
    """
    found = []
    for name in row["features"].keys() - {SDPA}:
        bounds = {} if name in OURS else {"factor": RIVAL_ERROR_FACTOR}
        wrong = wrong_outputs(row["features"][name], row["features"][SDPA], **bounds)
        for kind, what in (("whole", "log-probabilities"), ("tower", "log-probabilities by its tower alone")):
            error, theirs = row[kind][name], row[kind][SDPA]
            if not error <= theirs * (NOISE_FACTOR if name in OURS else RIVAL_ERROR_FACTOR):
                wrong.append(f"{what}: error {error:.2e}, transformers' {theirs:.2e}")
        if name in OURS and not row["gap"][name] <= row["noise"]:
            gap, noise = row["gap"][name], row["noise"]
            wrong.append(
                f"token {row['tokens'][name]}: {gap:.2e} from transformers', whose largest error is {noise:.2e}"
            )
        found += [f"{name}, {line}" for line in wrong]
    return sorted(found)
