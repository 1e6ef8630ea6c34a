"""The package as published: its layout, the sdist, and the wheel built from the sdist and used from elsewhere."""

import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
FOLDERS = {"qwenvit": "qwenvit", "kernels": "qwenvit/kernels", "weights": "qwenvit/weights"}
"""Folders of the checkout, and where they are in the wheel."""
SHIPPED = (*FOLDERS, "scripts", "tests")
"""Folders of the checkout that the sdist has whole."""


def run(*command, cwd):
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def modules():
    """Every module's path in the wheel."""
    return {
        f"{inside}/{file.relative_to(ROOT / folder).as_posix()}"
        for folder, inside in FOLDERS.items()
        for file in (ROOT / folder).rglob("*.py")
    }


@pytest.fixture(scope="module")
def sdist(tmp_path_factory):
    """The sdist, unpacked. It is built in a copy: setuptools writes into the checkout, which test processes share."""
    folder, checkout = tmp_path_factory.mktemp("sdist"), tmp_path_factory.mktemp("checkout")
    for name in (".ci", *SHIPPED):
        shutil.copytree(ROOT / name, checkout / name, ignore=shutil.ignore_patterns("__pycache__"))
    for file in filter(Path.is_file, ROOT.iterdir()):
        shutil.copy(file, checkout)
    build = f"from setuptools import build_meta; build_meta.build_sdist({str(folder)!r})"
    run(sys.executable, "-c", build, cwd=checkout)
    with tarfile.open(next(folder.glob("qwenvit-*.tar.gz"))) as archive:
        archive.extractall(folder, filter="data")
    return next(path for path in folder.glob("qwenvit-*") if path.is_dir())


@pytest.fixture(scope="module")
def wheel(sdist, tmp_path_factory):
    """The wheel, built from the sdist, because a checkout may contain an old build folder."""
    folder = tmp_path_factory.mktemp("wheel")
    run(
        sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "-q", "-w", folder, sdist, cwd=folder
    )
    return next(folder.glob("qwenvit-*.whl"))


def test_kernels_and_weights_do_not_shadow_packages_of_the_same_name():
    """transformers imports Hugging Face's package `kernels`, and `import kernels` must never find our folder."""
    assert not (ROOT / "kernels" / "__init__.py").exists()
    assert not (ROOT / "weights" / "__init__.py").exists()
    banned = PYPROJECT["tool"]["ruff"]["lint"]["flake8-tidy-imports"]
    assert set(banned["banned-api"]) == {"kernels", "weights"}


def test_every_folder_is_named_as_a_package():
    """setuptools takes the packages that pyproject.toml names, and no others."""
    folders = {module.rpartition("/")[0].replace("/", ".") for module in modules()}
    assert folders == set(PYPROJECT["tool"]["setuptools"]["packages"])


def test_the_wheel_holds_every_module(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    assert {name for name in names if name.endswith(".py")} == modules()
    assert "qwenvit/py.typed" in names
    assert not any(name.startswith(("kernels/", "weights/", "tests/", "scripts/")) for name in names)


def test_the_sdist_holds_what_the_tests_need(sdist):
    """`make demo` and `make test` must run from the sdist, so it has every file that a checkout has."""
    wanted = {path.relative_to(ROOT).as_posix() for folder in SHIPPED for path in (ROOT / folder).rglob("*.*")}
    wanted |= {"Makefile", "README.md", "constraints.txt", "pyproject.toml", "tests/conftest.py", ".ci/run"}
    there = {path.relative_to(sdist).as_posix() for path in sdist.rglob("*")}
    assert {path for path in wanted if "__pycache__" not in path} <= there
    assert not any(path.endswith(".pyc") for path in there)


def test_every_module_of_the_wheel_is_imported_and_it_encodes_from_another_directory(wheel, tmp_path):
    zipfile.ZipFile(wheel).extractall(tmp_path / "site")
    names = sorted(name.removesuffix(".py").removesuffix("/__init__").replace("/", ".") for name in modules())
    code = (
        f"import sys; sys.path.insert(0, {str(tmp_path / 'site')!r})\n"
        "import importlib, qwenvit, transformers\n"
        f"assert qwenvit.__file__.startswith({str(tmp_path)!r}) and len(qwenvit.__path__) == 1\n"
        f"for name in {names}:\n"
        "    if name != 'qwenvit.__main__':\n"
        "        try:\n"
        f"            assert importlib.import_module(name).__file__.startswith({str(tmp_path)!r}), name\n"
        "        except ModuleNotFoundError as error:\n"  # vLLM is not installed where this runs, Ray perhaps
        "            optional = {'vllm': 'qwenvit.integrations.vllm.', 'ray': 'qwenvit.integrations.ray_data'}\n"
        "            assert error.name in optional and name.startswith(optional[error.name]), name\n"
        "from PIL import Image\n"
        "print(qwenvit.encode(Image.new('RGB', (300, 200), 'red'), model='demo', device='cpu')[0].tokens.shape)\n"
    )
    # -P keeps the working directory off the path; the test environment's own qwenvit comes after the wheel's.
    assert "torch.Size" in run(sys.executable, "-P", "-W", "ignore", "-c", define_schemas() + code, cwd=tmp_path)


def define_schemas():
    """Return code that makes transformers importable beside a CPU build of torch."""
    return f"import sys; sys.path.append({str(ROOT / 'scripts')!r}); from common import torchvision_cpu; " \
        "torchvision_cpu.define_torchvision_schemas(); sys.path.pop()\n"  # fmt: skip


def test_importing_it_is_quick():
    # triton and torch._dynamo take longer to import than all of qwenvit; kernels import them at their first use.
    names = "qwenvit.Encoder, qwenvit.ops"
    code = f"import sys, qwenvit; {names}; print({{'triton', 'torch._dynamo', 'transformers'}} & set(sys.modules))"
    assert run(sys.executable, "-c", code, cwd=ROOT).strip() == "set()"
    assert run(sys.executable, "-c", "import sys, qwenvit; print('torch' in sys.modules)", cwd=ROOT) == "False\n"
