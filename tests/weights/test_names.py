import pytest

from qwenvit.weights.names import NAME_TABLES, canonical_name, official_name


def test_every_tensor_translates_both_ways(tower):
    assert {official_name(name, tower.family) for name in tower.canonical} == set(tower.state)
    for name, tensor in tower.canonical.items():
        official = official_name(name, tower.family)
        assert tower.state[official] is tensor
        assert canonical_name(official, tower.family) == name


def test_canonical_names_are_equal_in_all_families(tower):
    roots = {name.split(".")[0] for name in tower.canonical}
    assert {"patch_embed", "blocks", "merger"} <= roots
    assert roots <= {"patch_embed", "pos_embed", "blocks", "merger", "deepstack_mergers"}
    assert {"merger.norm.weight", "merger.fc1.bias", "merger.fc2.weight"} <= set(tower.canonical)


def test_an_index_of_any_length_is_kept():
    assert official_name("blocks.123.mlp.fc1.weight", "qwen3_vl") == "blocks.123.mlp.linear_fc1.weight"
    assert canonical_name("merger_list.12.mlp.0.bias", "qwen3_omni") == "deepstack_mergers.12.fc1.bias"


@pytest.mark.parametrize(
    "name",
    [
        "blocks.0.mlp.fc3.weight",
        "deepstack_mergers.0.norm.weight",
        "norm",
        "",
        "blocks.x",
        "blocks.01.norm1.weight",
        "blocks.٣.norm1.weight",
    ],
)
def test_name_that_the_family_lacks_is_refused(name):
    with pytest.raises(ValueError, match="qwen2_vl"):
        official_name(name, "qwen2_vl")
    with pytest.raises(ValueError, match="qwen2_vl"):
        canonical_name(name, "qwen2_vl")


def test_an_unknown_family_is_refused_with_the_known_ones():
    with pytest.raises(ValueError, match=r"family: expected one of qwen2_vl, .* got 'qwen9'"):
        official_name("pos_embed.weight", "qwen9")


def test_families_are_the_six():
    assert list(NAME_TABLES) == ["qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_5", "qwen2_5_omni", "qwen3_omni"]
