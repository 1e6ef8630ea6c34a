"""Towers are saved alone: not over a whole model's folder, nor beside an adapter that would be merged again."""

import pytest

from support.tiny_adapters import differing
from support.written_towers import config_of, load, write


def test_a_merged_tower_is_not_saved_beside_its_adapter(tmp_path, adapted):
    folder, _, after = adapted
    encoder = load(folder / "base", adapter=folder / "adapter")
    encoder.save_pretrained(tmp_path / "merged")
    assert differing(load(tmp_path / "merged").tower.state_dict(), after) == []
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(ValueError, match=r"contains adapter_config\.json"):
        encoder.save_pretrained(tmp_path)


def test_a_whole_models_folder_is_not_overwritten(tmp_path, qwen3):
    write(tmp_path / "from", qwen3)
    encoder = load(tmp_path / "from")
    encoder.save_pretrained(tmp_path / "alone")
    encoder.save_pretrained(tmp_path / "alone")  # of a tower alone: replaced
    for number, content in enumerate([{"vlm_config": {"vision_config": config_of(qwen3)}}, {"model_type": "qwen3_vl"}]):
        write(tmp_path / str(number), qwen3, config=content)
        with pytest.raises(ValueError, match=r"contains the config\.json of a whole model"):
            encoder.save_pretrained(tmp_path / str(number))
