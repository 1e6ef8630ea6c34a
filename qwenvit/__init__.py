"""The vision tower of Qwen-VL models, alone: official weights in, Hugging Face's embeddings out."""

from importlib import import_module as _import_module
from pathlib import Path as _Path
from typing import TYPE_CHECKING

__version__ = "0.1.0"

# In a checkout `kernels/` and `weights/` are beside this folder, in a wheel inside it. They are always imported
# as `qwenvit.kernels` and `qwenvit.weights`: a top-level `kernels` would shadow Hugging Face's package.
_root = _Path(__file__).resolve().parent.parent
if (_root / "pyproject.toml").is_file() and (_root / "kernels").is_dir():
    __path__.append(str(_root))

if TYPE_CHECKING:
    from qwenvit import ops, packing, registry
    from qwenvit.config import VisionConfig
    from qwenvit.default_encoder import encode
    from qwenvit.encoder import Encoder
    from qwenvit.mrope.positions import rope_index
    from qwenvit.outputs import Embeddings, ItemEmbeddings, TowerOutput
    from qwenvit.preprocess.sampling import sample_frames
    from qwenvit.towers.attention import VisionAttention

__all__ = [
    "Embeddings",
    "Encoder",
    "ItemEmbeddings",
    "TowerOutput",
    "VisionAttention",
    "VisionConfig",
    "encode",
    "ops",
    "packing",
    "registry",
    "rope_index",
    "sample_frames",
]

_HOMES = {
    "Embeddings": "qwenvit.outputs",
    "Encoder": "qwenvit.encoder",
    "ItemEmbeddings": "qwenvit.outputs",
    "TowerOutput": "qwenvit.outputs",
    "VisionAttention": "qwenvit.towers.attention",
    "VisionConfig": "qwenvit.config",
    "encode": "qwenvit.default_encoder",
    "rope_index": "qwenvit.mrope.positions",
    "sample_frames": "qwenvit.preprocess.sampling",
}
_MODULES = ("ops", "packing", "registry")


def __getattr__(name: str) -> object:
    """Import a public name when it is first asked for: torch takes seconds, and `qwenvit --help` needs none of it."""
    if name in _MODULES:
        return _import_module(f"qwenvit.{name}")
    if name not in _HOMES:
        raise AttributeError(f"module 'qwenvit' has no attribute {name!r}")
    return getattr(_import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted({*__all__, "__version__"})
