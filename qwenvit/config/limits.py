"""The largest values a tower's config may have, and how a value that is refused is shown in the error."""

import reprlib

LIMITS: dict[str, int] = {
    "depth": 2**10,
    "hidden_size": 2**17,
    "intermediate_size": 2**17,
    "num_heads": 2**17,
    "out_hidden_size": 2**17,
    "patch_size": 2**10,
    "temporal_patch_size": 2**6,
    "spatial_merge_size": 2**6,
    "in_channels": 2**10,
    "window_size": 2**16,
    "num_position_embeddings": 2**24,
    "tokens_per_second": 2**20,
}
"""Upper limits of VisionConfig's fields, far above every published tower. No weight of a tower within them has more
than 2**58 entries, so that its size in bytes fits into 64 bits."""
MAX_ROPE_THETA = 1e30
"""RoPE's base may be at most this and at least its reciprocal, so that its fp32 frequencies are finite."""


def positive_integer(name: str, value: object, limit: int = 2**31 - 1) -> int:
    """Return `value`, or raise ValueError with its name unless it is an integer from 1 to `limit`."""
    if not isinstance(value, int) or isinstance(value, bool) or value <= 0:
        raise ValueError(f"{name}: expected a positive integer, got {shown(value)}")
    if value > limit:
        raise ValueError(f"{name}: expected at most {limit}, got {shown(value)}")
    return value


class _ShortRepr(reprlib.Repr):
    """A `repr` of bounded length and depth that takes integers of any size, unlike Python's."""

    def __init__(self) -> None:
        super().__init__()
        self.maxstring = self.maxother = 80

    def repr_int(self, x: int, level: int) -> str:  # noqa: ARG002 (reprlib's signature)
        return repr(x) if x.bit_length() <= 64 else f"<an integer of {x.bit_length()} bits>"


_SHORT_REPR = _ShortRepr()


def shown(value: object) -> str:
    """Return a value's `repr` for an error message, shortened where it is long or deeply nested."""
    return _SHORT_REPR.repr(value)
