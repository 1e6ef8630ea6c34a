"""The vision tower of Qwen-VL models, alone: official weights in, Hugging Face's embeddings out."""

from importlib import import_module as _import_module
from pathlib import Path as _Path
from typing import TYPE_CHECKING

__version__ = "0.1.0"

# `kernels/` and `weights/` are beside this folder in a checkout and inside it in a wheel. Python imports both as
# `qwenvit.kernels` and `qwenvit.weights`: a top-level `kernels` would shadow Hugging Face's package of that name.
_root = _Path(__file__).resolve().parent.parent
if (_root / "pyproject.toml").is_file() and (_root / "kernels").is_dir():
    __path__.append(str(_root))

if TYPE_CHECKING:
    from qwenvit import ops, packing, registry
    from qwenvit.config import VisionConfig
    from qwenvit.datasets.job import encode_dataset
    from qwenvit.default_encoder import encode
    from qwenvit.embedding_file import load_embeddings
    from qwenvit.encoder import Encoder
    from qwenvit.features.attention_maps import AttentionMaps, attention_maps
    from qwenvit.features.maps import ItemFeatures
    from qwenvit.mrope.positions import rope_index
    from qwenvit.outputs import Embeddings, ItemEmbeddings, TowerOutput, VideoTimes
    from qwenvit.preprocess.sampling import sample_frames
    from qwenvit.program import export
    from qwenvit.towers.attention import VisionAttention

__all__ = [
    "AttentionMaps",
    "Embeddings",
    "Encoder",
    "ItemEmbeddings",
    "ItemFeatures",
    "TowerOutput",
    "VideoTimes",
    "VisionAttention",
    "VisionConfig",
    "attention_maps",
    "encode",
    "encode_dataset",
    "export",
    "load_embeddings",
    "ops",
    "packing",
    "registry",
    "rope_index",
    "sample_frames",
]

_PUBLIC_MODULES = ("ops", "packing", "registry")
_MODULE_OF = {
    "AttentionMaps": "qwenvit.features.attention_maps",
    "Embeddings": "qwenvit.outputs",
    "Encoder": "qwenvit.encoder",
    "ItemEmbeddings": "qwenvit.outputs",
    "ItemFeatures": "qwenvit.features.maps",
    "TowerOutput": "qwenvit.outputs",
    "VideoTimes": "qwenvit.outputs",
    "VisionAttention": "qwenvit.towers.attention",
    "VisionConfig": "qwenvit.config",
    "attention_maps": "qwenvit.features.attention_maps",
    "encode": "qwenvit.default_encoder",
    "encode_dataset": "qwenvit.datasets.job",
    "export": "qwenvit.program",
    "load_embeddings": "qwenvit.embedding_file",
    "rope_index": "qwenvit.mrope.positions",
    "sample_frames": "qwenvit.preprocess.sampling",
}


def __getattr__(name: str) -> object:
    """Import a public name at its first use (PEP 562): importing torch takes seconds, and `--help` does not need it."""
    if name in _PUBLIC_MODULES:
        return _import_module(f"qwenvit.{name}")
    if name in _MODULE_OF:
        return getattr(_import_module(_MODULE_OF[name]), name)
    raise AttributeError(f"module 'qwenvit' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*__all__, "__version__"})
