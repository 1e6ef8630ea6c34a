"""Inputs for the tests of use_tower, and what a model computes of them."""

import torch

from support.tiny_models import LOG_PROBABILITY_BOUND, base

BATCHES = {
    "an image": [[("text", 3), ("image", (1, 6, 10)), ("text", 4)]],
    "a video": [[("text", 3), ("video", (3, 4, 6)), ("text", 4)]],
    "both": [
        [
            ("text", 2),
            ("image", (1, 4, 4)),
            ("text", 3),
            ("video", (2, 4, 4)),
            ("text", 2),
            ("image", (1, 10, 2)),
            ("text", 1),
        ],
        [("text", 2), ("image", (1, 6, 4)), ("text", 3)],
    ],
    "none": [[("text", 5)], [("text", 9)]],
}


@torch.no_grad()
def log_probabilities(model, inputs, **options):
    base(model).rope_deltas = None
    return model(**inputs, **options).logits.log_softmax(-1)


def gradients(model, inputs):
    """Return the gradients of the loss, of each parameter that has one."""
    model.zero_grad(set_to_none=True)
    base(model).rope_deltas = None
    model(**inputs, labels=inputs["input_ids"]).loss.backward()
    return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}


def assert_close(actual, expected):
    assert actual.shape == expected.shape
    assert actual.dtype == expected.dtype
    torch.testing.assert_close(actual, expected, atol=LOG_PROBABILITY_BOUND, rtol=0)
