"""Lets torchvision's default wheel, built for CUDA, be imported beside a CPU build of torch.

That wheel's compiled operators do not load there, and torchvision then fails on the first of their names it mentions.
transformers' image processors need none of them; the names alone are enough.
"""

import importlib.util

import torch

_library: torch.library.Library | None = None  # schemas live as long as the object that defined them


def define_torchvision_schemas() -> None:
    """Define the operator names torchvision's Python side refers to; call before anything imports torchvision."""
    global _library
    if _library is not None or torch.version.cuda or importlib.util.find_spec("torchvision") is None:
        return
    _library = torch.library.Library("torchvision", "DEF")
    for name in ("nms", "qnms"):
        _library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
