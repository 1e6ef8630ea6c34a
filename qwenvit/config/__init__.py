"""The description of a vision tower: its config, its family, the published checkpoints."""

from qwenvit.config.vision_config import VisionConfig

__all__ = ["VisionConfig"]
