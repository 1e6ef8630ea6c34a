"""Letting torchvision's CUDA wheel be imported beside a CPU build of torch."""

import importlib

import torch

_libraries: list[torch.library.Library] = []  # a definition lives as long as its library


def define_torchvision_schemas() -> None:
    """Make `import torchvision` work; call before transformers imports it.

    torchvision's compiled operators may not fit the installed torch. It then fails on import, for want of the two
    operators it describes in Python. Declared (they stay without a kernel), all of it that is written in Python
    works, which is everything that transformers' image and video processors use.

    Raises:
        ImportError: torchvision is not installed.
        RuntimeError: it cannot be imported for another reason.
    """
    try:
        importlib.import_module("torchvision")
    except RuntimeError as error:
        if "operator torchvision::" not in str(error):
            raise
        library = torch.library.Library("torchvision", "DEF")
        for name in ("nms", "qnms"):
            library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        _libraries.append(library)
        importlib.import_module("torchvision")
