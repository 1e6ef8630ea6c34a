"""The vision tower of Qwen-VL models, alone: official weights in, Hugging Face's embeddings out."""

from pathlib import Path as _Path

__version__ = "0.1.0"

# In a checkout `kernels/` and `weights/` lie beside this folder, in a wheel inside it. They are always imported
# as `qwenvit.kernels` and `qwenvit.weights`: a top-level `kernels` would shadow Hugging Face's package.
_root = _Path(__file__).resolve().parent.parent
if (_root / "pyproject.toml").is_file() and (_root / "kernels").is_dir():
    __path__.append(str(_root))

from qwenvit.config import VisionConfig  # noqa: E402  (the path above comes first)
from qwenvit.default import encode  # noqa: E402
from qwenvit.encoder import Encoder  # noqa: E402
from qwenvit.mrope import rope_index  # noqa: E402
from qwenvit.outputs import Embeddings, ItemEmbeddings, TowerOutput  # noqa: E402
from qwenvit.sampling import sample_frames  # noqa: E402
from qwenvit.vision_attention import VisionAttention  # noqa: E402

__all__ = [
    "Embeddings",
    "Encoder",
    "ItemEmbeddings",
    "TowerOutput",
    "VisionAttention",
    "VisionConfig",
    "encode",
    "rope_index",
    "sample_frames",
]
