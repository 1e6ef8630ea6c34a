"""What the plugin changes in a model, with modules in the place of vLLM's."""

import gc
import importlib
import logging
import sys
import weakref
from dataclasses import asdict
from types import ModuleType, SimpleNamespace

import pytest
import torch
from torch import nn

from qwenvit.integrations.vllm import mode
from qwenvit.integrations.vllm.options import Options
from qwenvit.integrations.vllm.tower import VllmTower
from support.errors import error
from support.tiny_models import build_wide, visual
from support.towers import random_pixels

NAME = "qwenvit.integrations.vllm.model"
GRID = torch.tensor([[1, 4, 6]])
REFERENCE = Options(impl="reference")


class StageMissingLayer(nn.Module):
    pass


class Logger(logging.Logger):
    def info_once(self, message, *args, scope):
        assert scope == "global"
        self.lines.append(message % args)


class VllmModel(nn.Module):
    """As vLLM's models are made and called."""

    makes_tower = staticmethod(lambda: visual(build_wide("qwen3_vl")))

    def __init__(self, **_):
        super().__init__()
        self.visual = self.makes_tower()

    def embed_multimodal(self, **kwargs):
        return self.visual(kwargs["pixel_values"], kwargs["image_grid_thw"])


@pytest.fixture
def vllm(monkeypatch):
    """Return `QwenvitModel` in front of such a model, the lines of its log, and what says why pixels are off."""
    logger, pixels = Logger("test"), SimpleNamespace(obstacle=None, rule="rule")
    logger.lines = []
    contents = {
        "vllm": {},
        "vllm.config": {"VllmConfig": object},
        "vllm.logger": {"init_logger": lambda _: logger},
        "vllm.model_executor": {},
        "vllm.model_executor.models": {},
        "vllm.model_executor.models.utils": {"StageMissingLayer": StageMissingLayer},
        "qwenvit.integrations.vllm.pixel_processor": {
            "pixels_obstacle": lambda _: pixels.obstacle,
            "bytes_rule": lambda _: pixels.rule,
        },
    }
    for name, content in contents.items():
        module = ModuleType(name)
        vars(module).update(content)
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.delitem(sys.modules, NAME, raising=False)
    model = importlib.import_module(NAME)
    Model = type("Model", (model.QwenvitModel, VllmModel), {})  # noqa: N806
    yield SimpleNamespace(Model=Model, lines=logger.lines, pixels=pixels, allocate=model._allocate)
    del sys.modules[NAME]  # the next importer gets the real one


def config(options=REFERENCE, *, others=None, tokens=5, **changes):
    multimodal = {"mm_encoder_tp_mode": "weights", "mm_encoder_attn_dtype": None, "skip_mm_profiling": False}
    parallel = {"tensor_parallel_size": 1, "pipeline_parallel_size": 1}
    model = {"enforce_eager": False, "hf_config": build_wide("qwen3_vl").config, "qwenvit": options}
    for part in (multimodal, parallel, model):
        part |= {key: value for key, value in changes.items() if key in part}
    return SimpleNamespace(
        model_config=SimpleNamespace(**model, multimodal_config=SimpleNamespace(**multimodal)),
        parallel_config=SimpleNamespace(**parallel),
        compilation_config=SimpleNamespace(cudagraph_mm_encoder=True, compile_mm_encoder=True),
        scheduler_config=SimpleNamespace(max_num_encoder_input_tokens=tokens),
        load_config=SimpleNamespace(load_format="auto"),
        lora_config=None,
        additional_config=(others or {}) | {"qwenvit": asdict(options)},
    )


def test_the_tower_is_replaced_and_vllm_own_freed(vllm, monkeypatch):
    towers = []

    def make():
        tower = visual(build_wide("qwen3_vl"))
        tower.itself = (tower,)  # vLLM's layers refer to themselves
        towers.append(weakref.ref(tower))
        return tower

    def allocate(*arguments):
        assert [tower() for tower in towers] == [None]
        return vllm.allocate(*arguments)

    monkeypatch.setattr(vllm.Model, "makes_tower", staticmethod(make))
    monkeypatch.setattr(sys.modules[NAME], "_allocate", allocate)
    vllm_config = config()
    gc.disable()
    try:
        model = vllm.Model(vllm_config=vllm_config)
    finally:
        gc.enable()
    assert isinstance(model.visual, VllmTower)
    assert model.qwenvit_mode == "tower"
    assert model.qwenvit_pixels == "rule"
    assert not vllm_config.compilation_config.cudagraph_mm_encoder
    assert not vllm_config.compilation_config.compile_mm_encoder
    assert len(vllm.lines) == 1
    assert vllm.lines[0].startswith(
        "qwenvit: tower mode, with the reference tower (impl 'reference') in place of vLLM's"
    )
    assert vllm.lines[0].endswith("torch.float32 on cpu; images travel as RGB bytes")
    hf_tower = visual(build_wide("qwen3_vl"))
    model.visual.load_weights(hf_tower.named_parameters())
    pixels = random_pixels(24, model.visual.tower.config)
    with torch.no_grad():
        out = hf_tower(pixels, grid_thw=GRID)
    expected = torch.cat([out.pooler_output, *out.deepstack_features], dim=1)
    assert error(model.embed_multimodal(pixel_values=pixels, image_grid_thw=GRID), expected) < 1e-5


def test_the_dtype_is_that_of_vllm_own_tower(vllm, monkeypatch):
    monkeypatch.setattr(vllm.Model, "makes_tower", staticmethod(lambda: visual(build_wide("qwen3_vl")).bfloat16()))
    assert vllm.Model(vllm_config=config()).visual.dtype == torch.bfloat16


def test_attention_mode_enters_the_key_of_compiled_code(vllm, monkeypatch):
    monkeypatch.setattr(mode, "use_attention", lambda *_: None)
    vllm_config = config(tensor_parallel_size=2, others={"other": 1})
    given = vllm_config.additional_config
    model = vllm.Model(vllm_config=vllm_config)
    assert not isinstance(model.visual, VllmTower)
    assert vllm_config.additional_config.keys() == {"other", "qwenvit", "qwenvit_attention"}
    assert given.keys() == {"other", "qwenvit"}
    assert vllm_config.compilation_config.cudagraph_mm_encoder
    assert "attention mode" in vllm.lines[0]
    assert "tensor_parallel_size=2 splits the tower's weights" in vllm.lines[0]


def test_a_model_without_a_tower_is_left_alone(vllm, monkeypatch):
    monkeypatch.setattr(vllm.Model, "makes_tower", StageMissingLayer)
    model = vllm.Model(vllm_config=config(Options(impl="reference")))
    assert model.qwenvit_mode == "off"
    assert vllm.lines == ["qwenvit: off; vLLM has made no vision tower"]
    for options in (Options(tower="tower"), Options(tower="attention"), Options(pixels=True)):
        with pytest.raises(ValueError, match="since vLLM has made"):
            vllm.Model(vllm_config=config(options))


def test_options_that_the_processor_did_not_see_are_refused(vllm):
    vllm_config = config(Options(pixels=False))
    vllm_config.model_config.qwenvit = Options()
    vllm_config.model_config.architecture = "Qwen3VLForSequenceClassification"
    with pytest.raises(ValueError, match="expected no options with Qwen3VLForSequenceClassification"):
        vllm.Model(vllm_config=vllm_config)


def test_pixels_that_cannot_travel_are_said_or_refused(vllm):
    vllm.pixels.obstacle = "the image processor is another"
    model = vllm.Model(vllm_config=config())
    assert model.qwenvit_pixels == "rule"  # a front end with other options may send bytes
    assert vllm.lines[0].endswith("images travel as pixel values, because the image processor is another")
    with pytest.raises(ValueError, match=r"qwenvit\.pixels: images cannot travel as RGB bytes: the image processor is"):
        vllm.Model(vllm_config=config(Options(pixels=True)))


def test_adapters_may_have_parts_for_the_tower(vllm):
    """vLLM knows the tower's layers no more, and would refuse an adapter with parts for them."""
    model = vllm.Model(vllm_config=config())
    assert model.lora_skip_prefixes == ["visual."]


@pytest.mark.parametrize(("skipped", "tokens", "expected"), [(False, 5, [24]), (False, 50, [200]), (True, 50, [])])
def test_graphs_are_captured_in_the_profile_run(vllm, monkeypatch, skipped, tokens, expected):
    warmed = []
    monkeypatch.setattr(VllmTower, "warm_up", lambda _, patches: warmed.append(patches))
    model = vllm.Model(vllm_config=config(skip_mm_profiling=skipped, tokens=tokens))
    model.visual.load_weights(visual(build_wide("qwen3_vl")).named_parameters())
    pixels = random_pixels(24, model.visual.tower.config)
    for _ in range(2):
        model.embed_multimodal(pixel_values=pixels, image_grid_thw=GRID, video_grid_thw=None)
    assert warmed == expected
