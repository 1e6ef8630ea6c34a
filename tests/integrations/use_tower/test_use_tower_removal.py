"""use_tower's removal: what the model is afterwards, and what stands in its way."""

import copy
import functools
import pickle
import weakref

import pytest
import torch

from qwenvit.integrations.transformers import use_qwenvit, use_tower
from support.tiny_models import base, build_wide, inputs_for, visual
from support.use_tower import BATCHES


class TestRemoval:
    def test_remove(self, model, impl):
        tower = visual(model)
        handle = use_tower(model, impl)
        assert "forward" in vars(tower)
        ours = weakref.ref(handle.tower)
        handle.remove()
        assert "forward" not in vars(tower)
        assert (ours(), handle.tower) == (None, None)  # its memory is released, without a collector of cycles
        with use_tower(model, impl):
            handle.remove()  # an old handle does not undo a new replacement
            assert "forward" in vars(tower)

    def test_weights_of_two_states_are_told(self, fast):
        for write in ("load", "scale"):
            model = build_wide("qwen3_vl")
            before = {name: weight.clone() for name, weight in model.state_dict().items()}
            handle = use_tower(model, fast, free_original=True)
            if write == "load":
                with pytest.raises(RuntimeError, match="size mismatch"):
                    model.load_state_dict(build_wide("qwen3_vl", depth=3).state_dict())
            with torch.no_grad():
                for weight in model.parameters():
                    weight.mul_(2)
            with pytest.raises(ValueError, match=r"^model: weights were loaded or changed while use_tower had freed"):
                handle.remove()
            handle.remove()  # nothing is left to undo
            assert handle.tower is None
            assert "forward" not in vars(visual(model))
            assert all(weight.shape == before[name].shape for name, weight in model.state_dict().items())

    def test_autocast_around_a_fast_tower(self, fast):
        model = build_wide("qwen3_vl")
        inputs = inputs_for(model, BATCHES["an image"])
        call = functools.partial(visual(model), inputs["pixel_values"], grid_thw=inputs["image_grid_thw"])
        asked = pytest.raises(ValueError, match=r"^autocast: expected none around")
        with use_tower(model, fast), torch.no_grad(), torch.autocast("cpu", torch.bfloat16), asked:
            call()
        with use_tower(model.bfloat16(), fast), torch.no_grad():
            for hidden_states in (False, True):  # weights in 16 bits: whatever autocast says
                expected = call(output_hidden_states=hidden_states).pooler_output
                with torch.autocast("cpu", torch.float16):
                    assert torch.equal(call(output_hidden_states=hidden_states).pooler_output, expected)

    def test_positions_that_were_removed_by_hand(self, fast):
        model = build_wide("qwen3_vl")
        handle = use_qwenvit(model, fast)
        del base(model).get_rope_index
        handle.remove()
        assert "forward" not in vars(visual(model))

    def test_an_exception_in_the_block(self, model, impl):
        with pytest.raises(KeyError), use_tower(model, impl, free_original=True):
            raise KeyError
        assert "forward" not in vars(visual(model))

    def test_a_failure_while_packing(self, qwen2_5, fast, monkeypatch):
        def fail(*_):
            raise MemoryError

        monkeypatch.setattr("qwenvit.towers.fast.pad_columns", fail)
        with pytest.raises(MemoryError):
            use_qwenvit(qwen2_5, fast, free_original=True)
        assert "get_rope_index" not in vars(qwen2_5.model)

    def test_twice(self, qwen2_5, impl):
        with use_tower(qwen2_5, impl):
            with pytest.raises(
                ValueError, match=r"^model: expected its own vision tower, got a replaced one; call rem"
            ):
                use_tower(qwen2_5, impl)
            assert "forward" in vars(visual(qwen2_5))

    def test_a_forward_that_was_replaced_after_ours(self, qwen2_5):
        handle = use_tower(qwen2_5)
        ours = visual(qwen2_5).forward
        visual(qwen2_5).forward = lambda *_: None
        with pytest.raises(ValueError, match="was replaced after use_tower; undo that first"):
            handle.remove()
        visual(qwen2_5).forward = ours
        handle.remove()

    @pytest.mark.parametrize("way", [copy.copy, copy.deepcopy, pickle.dumps])
    def test_copies(self, qwen2_5, way):
        with use_tower(qwen2_5), pytest.raises(TypeError, match="copied or pickled while use_tower is in effect"):
            way(qwen2_5 if way is copy.deepcopy else visual(qwen2_5).forward)
        copy.deepcopy(qwen2_5)

    def test_positions_stay_the_models_own_if_the_tower_is_refused(self, qwen2_5):
        hook = visual(qwen2_5).merger.register_forward_hook(lambda *_: None)
        with pytest.raises(ValueError, match="hooks"):
            use_qwenvit(qwen2_5)
        hook.remove()
        assert "get_rope_index" not in vars(qwen2_5.model)
