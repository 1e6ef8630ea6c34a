"""Make torchvision's default wheel, built for CUDA, importable beside a CPU build of torch.

The wheel's compiled operators do not load there, and `import torchvision` then fails on the first operator that its
Python code names. transformers' image processors call none of these operators, so defining their names is enough.
"""

import importlib.util
from importlib.metadata import version

import torch

_library: torch.library.Library | None = None  # the schemas exist as long as this object


def define_torchvision_schemas() -> None:
    """Define the operators that `import torchvision` refers to. Call it before anything imports torchvision."""
    global _library
    if _library is not None or torch.version.cuda or importlib.util.find_spec("torchvision") is None:
        return
    if version("torchvision").endswith("+cpu"):  # a build for the CPU defines them itself
        return
    if hasattr(torch.ops.torchvision, "nms"):  # a copy of this module, which starts with Python, has defined them
        return
    _library = torch.library.Library("torchvision", "DEF")
    for name in ("nms", "qnms"):
        _library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
