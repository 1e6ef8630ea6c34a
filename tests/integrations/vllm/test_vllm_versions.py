"""The check of vLLM's sources, on a plugin and a vLLM of a few lines; and whether its list is that of the plugin."""

import tomllib
from pathlib import Path

import pytest

from qwenvit.integrations.vllm.architectures import VERSIONS as SUPPORTED
from support.vllm_process import ENVIRONMENT, needs_vllm
from vllm_versions import interface
from vllm_versions.checks import ROOT, check
from vllm_versions.replacements import evaluate
from vllm_versions.sources import Sources

PLUGIN = {
    "architectures.py": """
        _MODELS = "qwenvit.integrations.vllm.model"
        ARCHITECTURES = {"SomeModel": f"{_MODELS}:SomeModel"}
    """,
    "attention.py": """
        _ARGUMENTS = ("x", "cu_seqlens")
        ARGUMENTS = {"Qwen2VisionAttention": _ARGUMENTS, "Qwen2_5_VisionAttention": (*_ARGUMENTS, "sequence_lengths")}

        class _RopeAttention:
            proj: Callable
            split_qkv: Callable

            def forward(self, x, cu_seqlens, **_):
                self.attn.scale
                self.attn.qwenvit_seen = True
    """,
    "model.py": """
        from vllm.config import VllmConfig
        from vllm.model_executor.models import some_model

        class Mixin:
            def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
                super().__init__(vllm_config=vllm_config, prefix=prefix)
                parallel, name = vllm_config.parallel_config, vllm_config.model_config.get_name(short=True)
                self.size = parallel.tensor_parallel_size
                self.hash = VllmConfig.hash_of("a", length=3)

            def embed(self, images, *, kind=None):
                return super().embed(images, kind=kind)

            def newer(self, config=None, name=None):
                model: Any = self
                return super().newer(model.config, self.kept.model_config.get_name(short=True))

        class SomeModel(Mixin, some_model.SomeModel):
            pass
    """,
    "options.py": """
        class OptionsReader:
            def verify_and_update_config(self, vllm_config): ...
            def verify_and_update_model_config(self, model_config): ...
    """,
    "tower.py": """
        class VllmTower:
            def __init__(self):
                self.spatial_merge_size = 2

            @property
            def dtype(self): ...

            def forward(self, x, grid_thw, *, encoder_metadata=None): ...
    """,
}
VLLM = {
    "__init__.py": "",
    "plugins.py": """
        DEFAULT_PLUGINS_GROUP = "vllm.general_plugins"
        def load_general_plugins():
            for function in load_plugins_by_group(DEFAULT_PLUGINS_GROUP).values(): function()
    """,
    "config/__init__.py": "from vllm.config.vllm import VllmConfig\nfrom .model import ModelConfig",
    "config/model.py": """
        class ModelConfig:
            def get_name(self, short: bool) -> str: ...
    """,
    "config/parallel.py": """
        class ParallelConfig:
            tensor_parallel_size: int = 1
    """,
    "config/vllm.py": """
        from .model import ModelConfig
        from .parallel import ParallelConfig

        class VllmConfig:
            model_config: ModelConfig = None
            parallel_config: "ParallelConfig | None" = None
            additional_config: dict = {}

            @classmethod
            def hash_of(cls, text, length): ...

            def try_verify_and_update_config(self):
                MAP.get(name).verify_and_update_config(self)
    """,
    "model_executor/models/__init__.py": "",
    "model_executor/layers/attention/mm_encoder_attention.py": """
        class MMEncoderAttention:
            def __init__(self, scale):
                self.scale = scale
    """,
    "model_executor/models/qwen2_vl.py": """
        class Qwen2VisionAttention:
            def __init__(self):
                self.proj = None

            def split_qkv(self, qkv): ...

            def forward(self, x, cu_seqlens): ...
    """,
    "model_executor/models/qwen2_5_vl.py": """
        class Qwen2_5_VisionAttention:
            def __init__(self):
                self.proj = None

            def forward(self, x, cu_seqlens, sequence_lengths=None): ...
    """,
    "model_executor/models/registry.py": '_MODELS = {"SomeModel": ("some_model", "SomeModel")}',
    "model_executor/models/config.py": """
        class VerifyAndUpdateConfig:
            @staticmethod
            def verify_and_update_config(vllm_config): ...
            @staticmethod
            def verify_and_update_model_config(model_config): ...
    """,
    "model_executor/models/utils.py": """
        class AutoWeightsLoader:
            def _load_module(self, module):
                getattr(module, "load_weights", None)
    """,
    "model_executor/models/vision.py": """
        def shard(vision_model, pixels, *, rope_type):
            return vision_model(pixels, None)[: vision_model.spatial_merge_size]
    """,
    "model_executor/models/some_model.py": """
        from .vision import shard

        class Parent:
            def embed(self, images, *, kind=None):
                if self.parallel:
                    return shard(self.visual, images, rope_type="rope_3d")
                return self.visual(images.to(self.visual.dtype), grid_thw=None)

            def newer(self, config=None, name=None): ...

        class SomeModel(Parent):
            def __init__(self, *, vllm_config, prefix=""):
                self.config, self.kept = vllm_config.model_config, vllm_config

            def encoder_cudagraph_forward(self):
                self.visual.only_for_graphs()
    """,
}


def write(folder: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        lines = text.strip("\n").splitlines()
        indent = len(lines[0]) - len(lines[0].lstrip()) if lines else 0
        (folder / name).write_text("\n".join(line[indent:] for line in lines))
    return folder


def test_a_plugin_that_fits(tmp_path):
    findings = check(write(tmp_path / "vllm", VLLM), write(tmp_path / "plugin", PLUGIN))
    assert not findings.problems
    assert not findings.absent


# What a release changed: file, before, after, and what the check says.
ENCODER_ATTENTION = "model_executor/layers/attention/mm_encoder_attention.py"
MODEL = "model_executor/models/some_model.py"
CHANGES = [
    ("config/__init__.py", "import VllmConfig", "import OtherConfig", "no vllm.config:VllmConfig"),
    ("config/parallel.py", "tensor_parallel_size", "tp_size", "no ParallelConfig.tensor_parallel_size"),
    ("config/vllm.py", "parallel_config", "parallel", "no VllmConfig.parallel_config"),
    ("config/vllm.py", "additional_config", "plugin_config", "no vllm.config:VllmConfig.additional_config"),
    ("config/vllm.py", ".verify_and_update_config(self)", ".verify(self)", "does not call verify_and_update_config"),
    ("config/model.py", "short: bool", "long: bool", "ModelConfig.get_name takes no argument named short"),
    ("config/model.py", "short: bool", "short: bool, style", "ModelConfig.get_name requires style"),
    ("config/vllm.py", "text, length", "length", "VllmConfig.hash_of takes no argument named length"),
    ("config/vllm.py", "def hash_of", "def hash", "no VllmConfig.hash_of"),
    (ENCODER_ATTENTION, "self.scale", "self.factor", "no MMEncoderAttention.scale"),
    ("model_executor/models/qwen2_vl.py", "self.proj", "self.out", "no Qwen2VisionAttention.proj"),
    ("model_executor/models/qwen2_vl.py", "split_qkv", "split", "no Qwen2VisionAttention.split_qkv"),
    ("model_executor/models/qwen2_5_vl.py", "cu_seqlens", "lengths", "forward takes x, lengths, sequence_lengths, not"),
    ("plugins.py", "vllm.general_plugins", "vllm.plugins", "DEFAULT_PLUGINS_GROUP is not 'vllm.general_plugins'"),
    ("plugins.py", "load_plugins_by_group(D", "load(D", "load_general_plugins does not call load_plugins_by_group"),
    ("model_executor/models/registry.py", '"SomeModel":', '"Model":', "no architecture SomeModel"),
    ("model_executor/models/registry.py", '", "SomeModel"', '", "Parent"', "SomeModel is some_model:Parent, not what"),
    (MODEL, "class SomeModel", "class Model", "no vllm.model_executor.models.some_model"),
    (MODEL, "vllm_config, prefix", "config, prefix", "takes no argument named config"),
    (MODEL, "images, *, kind", "images, mask, *, kind", "take mask as positional"),
    (MODEL, "*, kind=None", "**kwargs", "Mixin.embed takes no **kwargs"),
    (MODEL, "images, *, kind=None", "images", "Parent.embed takes no argument named kind"),
    (MODEL, "visual.dtype", "visual.scale", "uses self.visual.scale, which VllmTower"),
    (MODEL, "grid_thw=None", "grids=None", "takes no argument named grids"),
    (MODEL, "self.config", "self.hf_config", "no SomeModel.config"),
    ("model_executor/models/vision.py", "spatial_merge_size", "merge", "uses self.visual.merge, which VllmTower has"),
    ("model_executor/models/vision.py", "pixels, None", "pixels", "VllmTower.forward requires grid_thw"),
    ("model_executor/models/config.py", "(model_config)", "(model_config, strict)", "does not take strict"),
    ("model_executor/models/config.py", "def verify_and_update_m", "def check_m", "OptionsReader has no check_m"),
    ("model_executor/models/utils.py", '"load_weights"', '"load"', "_load_module does not call load_weights"),
]  # fmt: skip


@pytest.mark.parametrize(("file", "before", "after", "said"), CHANGES, ids=[change[3] for change in CHANGES])
def test_what_a_release_changes_is_found(tmp_path, file, before, after, said):
    assert before in VLLM[file]
    changed = VLLM | {file: VLLM[file].replace(before, after)}
    findings = check(write(tmp_path / "vllm", changed), write(tmp_path / "plugin", PLUGIN))
    assert any(said in problem for problem in findings.problems), findings.problems


def test_what_may_be_absent(tmp_path):
    changed = VLLM | {
        "model_executor/models/some_model.py": VLLM["model_executor/models/some_model.py"].replace("newer", "other")
    }
    optional = {"extra.py": "try:\n    from vllm.config import Later\nexcept ImportError:\n    Later = None"}
    findings = check(write(tmp_path / "vllm", changed), write(tmp_path / "plugin", PLUGIN | optional))
    assert not findings.problems
    assert findings.absent == ["absent, optional vllm.config:Later", "absent: SomeModel.newer"]


def test_the_list_is_that_of_the_plugin():
    folder = ROOT / "qwenvit" / "integrations" / "vllm"
    text = "\n".join(path.read_text() for path in folder.rglob("*.py"))
    for name in interface.ROOTS:
        assert f"{name}." in text, name
    (group,) = [value for name, value in interface.CONSTANTS if name.endswith("DEFAULT_PLUGINS_GROUP")]
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project["entry-points"][group] == {"qwenvit": "qwenvit.integrations.vllm:register"}


def test_the_versions_are_those_that_the_plugin_accepts():
    minor = [tuple(map(int, version.split(".")[:2])) for version in interface.VERSIONS]
    assert (min(minor), max(minor)) == SUPPORTED
    assert {*minor} == {(0, each) for each in range(SUPPORTED[0][1], SUPPORTED[1][1] + 1)}


def test_every_architecture_is_read():
    from qwenvit.integrations.vllm.architectures import ARCHITECTURES

    sources = Sources({interface.PLUGIN: ROOT / "qwenvit" / "integrations" / "vllm"})
    module = sources.module(f"{interface.PLUGIN}.architectures")
    assert evaluate(module, "ARCHITECTURES") == ARCHITECTURES


@needs_vllm
def test_the_installed_version():
    (folder,) = ENVIRONMENT.glob("lib/python3*/site-packages/vllm")
    assert not check(folder).problems
