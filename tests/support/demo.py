"""The encoder of `"demo"` on the CPU, without the warning that its weights are random."""

import warnings

from qwenvit.encoder import Encoder


def demo_encoder(**options: object) -> Encoder:
    """Load it with these options of `from_pretrained`."""
    with warnings.catch_warnings(action="ignore"):
        return Encoder.from_pretrained("demo", device="cpu", **options)
