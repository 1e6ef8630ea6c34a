"""The entry point: what it registers, in which versions of vLLM, and what it imports."""

import importlib
import logging
import subprocess
import sys
import tomllib
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest

from qwenvit.integrations.vllm import register
from qwenvit.integrations.vllm.architectures import ARCHITECTURES, version_obstacle
from qwenvit.integrations.vllm.options import OptionsReader

ROOT = Path(__file__).parents[3]


def platform(name, capability=90):
    return SimpleNamespace(
        device_name=name,
        is_cpu=lambda: name == "cpu",
        is_cuda=lambda: name == "cuda",
        has_device_capability=lambda least: capability >= least,
    )


@pytest.fixture
def vllm(monkeypatch):
    """Modules in the place of vLLM's, which record what is registered."""
    models, hooks = {}, {"Qwen3_5ForConditionalGeneration": "vLLM's own"}
    registry = SimpleNamespace(register_model=models.__setitem__)
    contents = {
        "vllm": {"ModelRegistry": registry},
        "vllm.version": {"__version__": "0.32.0+cpu"},
        "vllm.platforms": {"current_platform": platform("cpu")},
        "vllm.model_executor": {},
        "vllm.model_executor.models": {},
        "vllm.model_executor.models.config": {"MODELS_CONFIG_MAP": hooks},
    }
    for name, content in contents.items():
        module = ModuleType(name)
        vars(module).update(content)
        monkeypatch.setitem(sys.modules, name, module)
    return SimpleNamespace(
        models=models, hooks=hooks, version=sys.modules["vllm.version"], platforms=sys.modules["vllm.platforms"]
    )


def test_every_architecture_is_registered_by_name_and_again(vllm):
    for _ in range(2):
        register()
    assert vllm.models == ARCHITECTURES
    assert vllm.hooks.keys() == ARCHITECTURES.keys()
    assert all(isinstance(hook, OptionsReader) for hook in vllm.hooks.values())
    assert vllm.hooks["Qwen3_5ForConditionalGeneration"].own == "vLLM's own"
    assert vllm.hooks["Qwen3VLForConditionalGeneration"].own is None


@pytest.mark.parametrize("version", ["0.21.3", "0.34.0", "1.0.0", "dev", "0.1.dev1+gabc"])
def test_a_version_that_does_not_fit_changes_nothing_and_says_so(vllm, version, caplog):
    vllm.version.__version__ = version
    with caplog.at_level(logging.WARNING, "vllm.qwenvit"):
        register()
    assert vllm.models == {}
    assert vllm.hooks == {"Qwen3_5ForConditionalGeneration": "vLLM's own"}
    assert f"checked with vLLM 0.22 to 0.33, and this is {version}" in caplog.text


@pytest.mark.parametrize(
    ("current", "message"),
    [
        (platform("rocm"), "expected a CPU or a GPU of NVIDIA, got rocm"),
        (platform("tpu"), "expected a CPU or a GPU of NVIDIA, got tpu"),
        (platform("cuda", 75), "expected a GPU of compute capability 8.0 or later"),
    ],
)
def test_a_device_that_does_not_fit_changes_nothing_and_says_so(vllm, current, message, caplog):
    vllm.platforms.current_platform = current
    with caplog.at_level(logging.WARNING, "vllm.qwenvit"):
        register()
    assert vllm.models == {}
    assert message in caplog.text
    vllm.platforms.current_platform = platform("cuda", 80)
    register()
    assert vllm.models == ARCHITECTURES


@pytest.mark.parametrize("version", ["0.22.0", "0.24.0", "0.32.0+cpu", "0.33.7rc1"])
def test_versions_that_fit(version):
    assert version_obstacle(version) is None


def test_each_class_is_where_the_registry_looks():
    for where in ARCHITECTURES.values():
        module, name = where.split(":")
        file = ROOT / (module.replace(".", "/") + ".py")
        assert f"\nclass {name}(" in file.read_text()


def test_the_entry_point_is_declared():
    declared = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["entry-points"]["vllm.general_plugins"]
    module, function = declared["qwenvit"].split(":")
    assert getattr(importlib.import_module(module), function) is register


def test_importing_the_entry_point_imports_neither_torch_nor_vllm():
    program = "import sys, qwenvit.integrations.vllm; print({'torch', 'vllm', 'numpy', 'triton'} & sys.modules.keys())"
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
