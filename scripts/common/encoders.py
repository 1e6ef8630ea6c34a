"""Encoders around a given tower."""

import copy

from qwenvit import Encoder
from qwenvit.towers.choose import Tower


def fresh_encoder(tower: Tower) -> Encoder:
    """Return an encoder with the tower's weights and no CUDA graphs."""
    twin = copy.copy(tower)
    twin.graphs = None
    return Encoder(twin)
