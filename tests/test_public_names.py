"""The public paths of the package, each imported before any other module of it, so that no earlier import can help."""

import importlib
import importlib.util
import pkgutil
import subprocess
import sys
from pathlib import Path

from qwenvit import ops

ROOT = Path(__file__).resolve().parent.parent
PACKING = ("pack_qkv", "pack_gate_up", "pad_columns", "adjacent_pairs")
TOP_LEVEL = (
    "encode",
    "encode_dataset",
    "Encoder",
    "VisionConfig",
    "VisionAttention",
    "rope_index",
    "sample_frames",
    "Embeddings",
    "ItemEmbeddings",
    "ItemFeatures",
    "AttentionMaps",
    "attention_maps",
    "export",
    "TowerOutput",
    "VideoTimes",
    "load_embeddings",
    "ops",
    "packing",
    "registry",
)
MODULES = {
    "qwenvit.ops": tuple(ops.__all__),
    "qwenvit.packing": PACKING,
    "qwenvit.registry": ("PUBLISHED", "published_config"),
    "qwenvit.config": ("VisionConfig",),
    "qwenvit.integrations.transformers": ("use_attention", "use_qwenvit", "use_rope_index", "use_tower"),
}
if importlib.util.find_spec("ray"):
    MODULES["qwenvit.integrations.ray_data"] = ("EmbedImages", "embed_dataset")


def run(code):
    """Run code in a fresh interpreter and return what it prints."""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_every_public_path():
    """Forget qwenvit's modules before each import. torch stays loaded, because loading it each time takes a minute."""
    imports = [f"from qwenvit import {name}; import qwenvit; assert qwenvit.{name} is {name}" for name in TOP_LEVEL]
    imports += [f"import {module}; [getattr({module}, name) for name in {names}]" for module, names in MODULES.items()]
    code = (
        "import sys\n"
        "sys.path.insert(0, 'scripts')\n"  # transformers imports torchvision
        "from common.torchvision_cpu import define_torchvision_schemas\n"
        "define_torchvision_schemas()\n"
        f"for code in {imports}:\n"
        "    for name in [name for name in sys.modules if name.partition('.')[0] == 'qwenvit']:\n"
        "        del sys.modules[name]\n"
        "    exec(code, {})\n"
    )
    run(code)


def test_star_import_and_dir():
    code = (
        "from qwenvit import *; import qwenvit; print(sorted(set(qwenvit.__all__) - globals().keys()), *dir(qwenvit))"
    )
    assert run(code) == " ".join(["[]", *sorted([*TOP_LEVEL, "__version__"])])


def test_unknown_attribute():
    code = "import qwenvit\ntry: qwenvit.no_such_name\nexcept AttributeError as error: print(error)"
    assert run(code) == "module 'qwenvit' has no attribute 'no_such_name'"


def test_the_package_is_imported_without_torch():
    modules = "qwenvit, qwenvit.arguments, qwenvit.config, qwenvit.config.published, qwenvit.registry"
    assert run(f"import sys, {modules}; print('torch' in sys.modules)") == "False"


def test_no_module_bears_the_name_of_an_operation():
    """Importing such a module would replace the operation as an attribute of `qwenvit.ops`."""
    modules = [module.name for module in pkgutil.iter_modules(ops.__path__)]
    for module in modules:
        importlib.import_module(f"qwenvit.ops.{module}")
    assert not set(modules) & set(ops.__all__)
    assert all(callable(getattr(ops, name)) for name in ops.__all__)
