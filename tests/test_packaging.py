"""The package as installed: its layout, and the wheel used from elsewhere."""

import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


def run(*command, cwd):
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wheel")
    run(sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "-q", "-w", folder, ROOT, cwd=folder)
    return next(folder.glob("qwenvit-*.whl"))


def test_kernels_and_weights_do_not_shadow_packages_of_the_same_name():
    """Hugging Face's `kernels` is imported by transformers; ours must never answer to that name."""
    assert not (ROOT / "kernels" / "__init__.py").exists()
    assert not (ROOT / "weights" / "__init__.py").exists()
    banned = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["ruff"]["lint"]["flake8-tidy-imports"]
    assert set(banned["banned-api"]) == {"kernels", "weights"}


def test_the_wheel_holds_every_module(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    for folder, inside in (("qwenvit", "qwenvit"), ("kernels", "qwenvit/kernels"), ("weights", "qwenvit/weights")):
        expected = {f"{inside}/{file.name}" for file in (ROOT / folder).glob("*.py")}
        assert expected <= names
    assert "qwenvit/py.typed" in names
    assert not any(name.startswith(("kernels/", "weights/", "tests/", "scripts/")) for name in names)


def test_the_wheel_encodes_from_another_directory(wheel, tmp_path):
    zipfile.ZipFile(wheel).extractall(tmp_path / "site")
    code = (
        f"import sys; sys.path.insert(0, {str(tmp_path / 'site')!r})\n"
        "import qwenvit, qwenvit.weights.hub, transformers\n"
        f"assert qwenvit.__file__.startswith({str(tmp_path)!r}) and len(qwenvit.__path__) == 1\n"
        "from PIL import Image\n"
        "print(qwenvit.encode(Image.new('RGB', (300, 200), 'red'), model='demo', device='cpu')[0].tokens.shape)\n"
    )
    # -P keeps the working directory off the path; the test environment's own qwenvit comes after the wheel's.
    assert "torch.Size" in run(sys.executable, "-P", "-W", "ignore", "-c", define_schemas() + code, cwd=tmp_path)


def define_schemas():
    """What lets transformers be imported beside a CPU build of torch."""
    return f"import sys; sys.path.append({str(ROOT / 'scripts')!r}); from common import torchvision_cpu; " \
        "torchvision_cpu.define_torchvision_schemas(); sys.path.pop()\n"  # fmt: skip


def test_importing_it_is_quick():
    # triton and torch._dynamo take longer to import than all of qwenvit; kernels bring them at their first use.
    code = "import sys, qwenvit; print({'triton', 'torch._dynamo', 'transformers'} & set(sys.modules))"
    assert run(sys.executable, "-c", code, cwd=ROOT).strip() == "set()"
