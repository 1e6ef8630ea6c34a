"""The published checkpoints: the public path of `qwenvit.config.published`."""

from qwenvit.config.published import PUBLISHED, Published, published_config

__all__ = ["PUBLISHED", "Published", "published_config"]
