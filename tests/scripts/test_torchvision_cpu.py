"""Operators are defined only for a torchvision that lacks them."""

import pytest

from common import torchvision_cpu

pytest.importorskip("torchvision")


def test_a_build_for_the_cpu_keeps_its_own_operators(monkeypatch):
    monkeypatch.setattr(torchvision_cpu, "_library", None)
    monkeypatch.setattr(torchvision_cpu, "version", lambda _: "0.28.0+cpu")
    torchvision_cpu.define_torchvision_schemas()
    assert torchvision_cpu._library is None
