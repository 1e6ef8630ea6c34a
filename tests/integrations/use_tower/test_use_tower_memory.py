"""The weights while use_tower is in effect: which are shared, packed or freed, and that all are saved."""

import torch
from safetensors.torch import load_file

from qwenvit.integrations.transformers import use_tower
from support.tiny_models import inputs_for, visual
from support.use_tower import BATCHES, assert_close, log_probabilities


class TestMemory:
    def test_the_reference_tower_shares_the_models_parameters(self, model):
        with use_tower(model, "reference", free_original=True) as handle:
            assert handle.extra_bytes == 0
            assert {id(p) for p in handle.tower.parameters()} == {id(p) for p in visual(model).parameters()}

    def test_the_fast_tower_shares_what_it_does_not_pack(self, model, fast):
        theirs = {p.untyped_storage().data_ptr() for p in visual(model).parameters()}
        with use_tower(model, fast) as handle:
            packed = [p for p in handle.tower.parameters() if p.untyped_storage().data_ptr() not in theirs]
            assert handle.extra_bytes == sum(p.nbytes for p in packed) > 0
            shared = {name for name, p in handle.tower.named_parameters() if all(p is not other for other in packed)}
            assert {"blocks.0.attn.proj.weight", "blocks.0.norm1.weight", "merger.fc1.weight"} <= shared

    def test_freed_weights(self, model, fast, tmp_path):
        own, inputs = visual(model), inputs_for(model, BATCHES["both"])
        expected, state = log_probabilities(model, inputs), {k: v.clone() for k, v in model.state_dict().items()}
        prefix = next(name for name, module in model.named_modules() if module is own) + "."
        bytes_before = sum(p.nbytes for p in own.parameters())
        with use_tower(model, fast, free_original=True) as handle:
            assert (own.dtype, own.device) == (torch.float32, torch.device("cpu"))
            freed = bytes_before - sum(p.nbytes for p in own.parameters())
            assert freed > 3 * own.blocks[0].attn.proj.weight.nbytes
            held = {p.untyped_storage().data_ptr(): p.nbytes for p in (*own.parameters(), *handle.tower.parameters())}
            assert sum(held.values()) == bytes_before + handle.extra_bytes
            assert_close(log_probabilities(model, inputs), expected)
            saved = model.state_dict()
            assert list(saved) == list(state)
            assert all(torch.equal(saved[name], tensor) for name, tensor in state.items())
            assert all(torch.equal(t, state[prefix + n]) for n, t in own.state_dict().items())
            model.save_pretrained(tmp_path)
        for parameter in own.parameters():
            assert parameter.is_contiguous()
            assert parameter.untyped_storage().nbytes() == parameter.nbytes
        with torch.random.fork_rng():
            loaded = type(model).from_pretrained(tmp_path)
        assert torch.equal(log_probabilities(loaded.eval(), inputs), expected)

    def test_saving_keeps_the_original_names(self, model, impl, tmp_path):
        model.save_pretrained(tmp_path / "own")
        with use_tower(model, impl):
            model.save_pretrained(tmp_path / "replaced")
        own, replaced = (load_file(tmp_path / kind / "model.safetensors") for kind in ("own", "replaced"))
        assert own.keys() == replaced.keys()
        assert all(torch.equal(own[name], replaced[name]) for name in own)
