"""Towers are recognised by structure: under any prefix, in any order, among any other tensors."""

import re

import pytest
from hypothesis import HealthCheck, assume, example, given, settings
from hypothesis import strategies as st

from qwenvit.weights.recognise import FoundTower, NoTowerError, find_tower, refuse_incomplete
from support.tiny_towers import FAMILIES, OTHER_TENSORS, build

# Built by transformers: an independent source of the names of whole towers.
STATES = {family: list(build(family).state) for family in FAMILIES}

TOP_MODULES = {name.partition(".")[0] for state in STATES.values() for name in state}

# Parts of prefixes in the wild, and words that are also modules' names or belong to other models.
_WORDS = (
    "model", "visual", "module", "vlm", "base_model", "vision_tower", "thinker", "language_model", "_orig_mod", "ema",
    "blocks", "merger", "patch_embed", "pos_embed", "0", "7", "layers", "norm",
)  # fmt: skip
words = st.one_of(st.sampled_from(_WORDS), st.from_regex(r"[A-Za-z_]\w{0,8}", fullmatch=True))
prefixes = st.lists(words, max_size=5).map(lambda parts: "".join(f"{part}." for part in parts))
families = st.sampled_from(list(FAMILIES))

relaxed = settings(
    max_examples=50, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much]
)

# Towers of other models, complete in themselves and none of ours.
DECOYS = {
    "timm's ViT": [
        "cls_token",
        "pos_embed",
        "patch_embed.proj.weight",
        "patch_embed.proj.bias",
        *(f"blocks.{i}.{m}.weight" for i in range(4) for m in ("norm1", "attn.qkv", "attn.proj", "norm2", "mlp.fc1")),
        *(f"blocks.{i}.mlp.fc2.bias" for i in range(4)),
        "norm.weight",
    ],
    "GLM-4V": [
        "patch_embed.proj.weight",
        "embeddings.position_embedding.weight",
        *(f"blocks.{i}.{m}.weight" for i in range(4) for m in ("norm1", "attn.qkv", "attn.proj", "norm2")),
        *(f"blocks.{i}.mlp.{m}_proj.weight" for i in range(4) for m in ("gate", "up", "down")),
        *(f"merger.{m}.weight" for m in ("proj", "post_projection_norm", "gate_proj", "up_proj", "down_proj")),
        "downsample.weight",
    ],
    "CLIP": [f"encoder.layers.{i}.self_attn.{m}_proj.weight" for i in range(4) for m in "qkv"],
    "Qwen's audio tower": [
        "conv1.weight",
        *(f"layers.{i}.{m}.weight" for i in range(4) for m in ("fc1", "fc2", "self_attn.q_proj")),
        "proj.weight",
        "ln_post.weight",
    ],
}


@relaxed
@given(st.data(), families, prefixes)
@example(None, "qwen2_vl", "blocks.0.")
@example(None, "qwen3_vl", "merger.")
def test_a_tower_is_found_under_any_prefix_among_other_models(data, family, prefix):
    tower = [prefix + name for name in STATES[family]]
    others = [name for name in OTHER_TENSORS if not (prefix and name.startswith(prefix))]
    if data is not None:
        for decoy in data.draw(st.lists(st.sampled_from(list(DECOYS)), unique=True)):
            where = data.draw(prefixes.filter(lambda where: (where and not where.startswith(prefix)) or not prefix))
            others += [where + name for name in DECOYS[decoy] if where]
        others = [name for name in others if name not in tower]
    names = tower + others
    if data is not None:
        data.draw(st.randoms(use_true_random=False)).shuffle(names)
    # Without a prefix, other models' modules at the top would be the tower's own.
    assume(prefix or not any(name.partition(".")[0] in TOP_MODULES for name in others))
    found = find_tower(names)
    assert (found.prefix, found.families, found.missing) == (prefix, (family,), ())
    assert found.names == {name: name[len(prefix) :] for name in tower}
    assert list(found.names) == [name for name in names if name in set(tower)]
    refuse_incomplete(found)


@relaxed
@given(st.data(), families, prefixes)
def test_of_an_incomplete_tower_the_missing_modules_are_named(data, family, prefix):
    modules = sorted({name.rpartition(".")[0] for name in STATES[family]})
    lost = data.draw(st.sets(st.sampled_from(modules), min_size=1, max_size=4))
    # Names alone do not tell that a merger is lost as a whole, nor a few modules from those of another family.
    deepstack = {module for module in modules if "merger_list." in module}
    assume(not deepstack or 2 * len(lost & deepstack) < len(deepstack))
    names = [prefix + name for name in STATES[family] if name.rpartition(".")[0] not in lost]
    found = find_tower([*names, *OTHER_TENSORS])
    assert found.prefix == prefix
    assert found.missing
    if found.families == (family,):
        assert set(found.missing) == {prefix + module for module in lost}
    with pytest.raises(ValueError, match=re.escape(f"incomplete vision tower under {prefix or 'no prefix'}")):
        refuse_incomplete(find_tower(names))


@st.composite
def several_prefixes(draw):
    """Draw prefixes of which one may be inside another."""
    first, second, end = draw(prefixes), draw(prefixes), draw(prefixes.filter(bool))
    return draw(st.sampled_from([[first, first + end], [second, first, first + end], [f"x.{first}", f"y.{second}"]]))


@relaxed
@given(families, several_prefixes(), st.data())
def test_several_complete_towers_are_refused_until_one_is_chosen(family, where, data):
    # Inside a module of another tower, it would be that one's.
    inside = [longer[len(prefix) :] for prefix in where for longer in where if longer.startswith(prefix)]
    assume(len(set(where)) == len(where))
    assume(not any(rest.partition(".")[0] in TOP_MODULES for rest in inside))
    names = [prefix + name for prefix in where for name in STATES[family]]
    with pytest.raises(ValueError, match=r"expected one vision tower, got . under .*choose one by prefix=") as e:
        find_tower(names)
    assert all((prefix or "no prefix") in str(e.value) for prefix in where)
    chosen = data.draw(st.sampled_from(where))
    for spelling in (chosen, chosen.removesuffix(".")):
        found = find_tower(names, spelling)
        assert (found.prefix, found.missing) == (chosen, ())
        assert set(found.names) == {chosen + name for name in STATES[family]}


def test_a_complete_tower_is_preferred_to_an_incomplete_one(tower):
    incomplete = [f"ema.{name}" for name in tower.state if "merger" not in name]
    names = [*incomplete, *(f"visual.{name}" for name in tower.state)]
    assert find_tower(names).prefix == "visual."
    chosen = find_tower(names, prefix="ema")
    assert (chosen.prefix, set(chosen.names)) == ("ema.", set(incomplete))
    assert all(name.startswith("ema.") and "merger" in name for name in chosen.missing)


def test_what_else_is_under_the_prefix_is_the_towers_too():
    names = [f"visual.{name}" for name in STATES["qwen2_vl"]]
    found = find_tower([*names, "visual.downsample.weight", "visualise.weight"])
    assert set(found.names) == {*names, "visual.downsample.weight"}


@pytest.mark.parametrize("decoy", DECOYS)
def test_another_model_alone_is_no_complete_tower(decoy):
    names = [f"vision.{name}" for name in DECOYS[decoy]]
    with pytest.raises(ValueError, match=r"no vision tensors|incomplete vision tower under vision\. "):
        refuse_incomplete(find_tower(names))


def test_a_checkpoint_without_vision_tensors_is_refused_with_its_names():
    with pytest.raises(NoTowerError, match="no vision tensors") as error:
        find_tower(["model.layers.0.mlp.up_proj.weight", "lm_head.weight", "vision_model.encoder.weight"])
    for present in ("model.layers", "lm_head.weight", "vision_model.encoder"):
        assert present in str(error.value)
    with pytest.raises(NoTowerError, match="nothing at all"):
        find_tower([])


def test_a_prefix_without_a_tower_is_refused_with_those_that_have_one(tower):
    names = [f"vlm.visual.{name}" for name in tower.state]
    for prefix in ("visual.", "", "vlm", "vlm.visual.blocks"):
        with pytest.raises(NoTowerError, match=rf"prefix: .*'vlm\.visual\.'.* got '{prefix}'"):
            find_tower(names, prefix)


def test_deepstack_tells_qwen3_vl_from_qwen3_5():
    with_deepstack = STATES["qwen3_vl"]
    assert find_tower(with_deepstack).families == ("qwen3_vl",)
    assert find_tower([name for name in with_deepstack if "deepstack" not in name]).families == ("qwen3_5",)


@relaxed
@given(families, prefixes, st.data())
def test_weights_below_an_unmerged_adapter_have_their_plain_names(family, prefix, data):
    adapted = data.draw(st.sets(st.sampled_from([name for name in STATES[family] if name.endswith("weight")])))
    stored = {}
    for name in STATES[family]:
        module, _, parameter = name.rpartition(".")
        below = ".base_layer" if f"{module}.weight" in adapted else ""
        stored[f"{prefix}{module}{below}.{parameter}"] = name
    lora = [f"{prefix}{name.removesuffix('weight')}lora_{m}.default.weight" for name in adapted for m in "AB"]
    found = find_tower([*stored, *lora])
    assert (found.prefix, found.families, found.missing) == (prefix, (family,), ())
    assert {name: official for name, official in found.names.items() if name not in lora} == stored
    assert set(found.names) == {*stored, *lora}  # never passed over


def test_a_trained_copy_of_the_whole_tower_is_an_adapters():
    base = {f"base_model.model.visual.original_module.{name}": name for name in STATES["qwen2_vl"]}
    copy = [f"base_model.model.visual.modules_to_save.default.{name}" for name in STATES["qwen2_vl"]]
    found = find_tower([*base, *copy])
    assert (found.prefix, found.missing) == ("base_model.model.visual.", ())
    assert {name: official for name, official in found.names.items() if name in base} == base
    assert set(found.names) == {*base, *copy}  # never passed over


def test_one_weight_under_two_names_is_refused():
    names = [*STATES["qwen2_vl"], "blocks.0.attn.qkv.base_layer.weight"]
    with pytest.raises(ValueError, match=r"got blocks\.0\.attn\.qkv\.base_layer\.weight and another"):
        find_tower(names)


@pytest.mark.parametrize(
    "name",
    ["blocks.999999999.norm1.weight", f"blocks.{'9' * 5000}.norm1.weight", "blocks." * 100_000 + "0.norm1.weight"],
)
def test_absurd_names_cost_nothing(name):
    names = [*STATES["qwen2_vl"], name]
    assert len(find_tower(names).missing) < 20


@pytest.mark.parametrize("name", ["a{}.merger.norm.weight", "blocks.{}.norm1.weight", "a.{}.blocks.0.norm1.weight"])
def test_a_broken_header_with_many_names_does_not_hang(name):
    many = [name.format(number) for number in range(20_000)]
    whole = [f"visual.{official}" for official in STATES["qwen2_vl"]]
    found = find_tower([*many, *whole])
    assert (found.prefix, set(found.names)) == ("visual.", set(whole))
    with pytest.raises(ValueError, match="incomplete"):
        refuse_incomplete(find_tower(many))


def test_the_message_lists_what_is_missing_under_the_nested_prefix():
    names = [f"base_model.model.visual.{name}" for name in STATES["qwen2_5_vl"] if ".1.attn" not in name]
    with pytest.raises(ValueError, match="2 modules have no tensor") as error:
        refuse_incomplete(find_tower([*names, *OTHER_TENSORS]))
    for part in ("base_model.model.visual. (qwen2_5_vl)", "base_model.model.visual.blocks.1.attn.qkv"):
        assert part in str(error.value)


def test_a_tower_shows_where_it_is():
    assert str(FoundTower("a.", ("qwen2_vl",), {}, ())) == "a. (qwen2_vl)"
    assert str(FoundTower("", ("qwen2_vl",), {}, ())) == "no prefix (qwen2_vl)"


def test_a_damaged_tower_beside_a_copy_is_not_replaced_by_the_copy(tower):
    """The model's own tower lacks a module, and the averaged one of its training is whole: which is meant?"""
    lacking = next(name for name in tower.state if name.startswith("merger.")).rpartition(".")[0]
    own = [f"visual.{name}" for name in tower.state if not name.startswith(f"{lacking}.")]
    copy = [f"ema.visual.{name}" for name in tower.state]
    with pytest.raises(ValueError, match=r"2 almost complete under .*ema\.visual\. .*choose one by prefix="):
        find_tower([*own, *copy])
    assert find_tower([*own, *copy], prefix="ema.visual").missing == ()
