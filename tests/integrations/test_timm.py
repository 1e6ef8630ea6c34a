"""The adapter with timm's names: against transformers' hidden states, and in timm's own hands where it is installed."""

import numpy as np
import pytest
import torch
from transformers import Qwen2VLImageProcessor

from common.hf_towers import build_tower
from qwenvit.encoder import Encoder
from qwenvit.integrations.timm import TimmModel
from qwenvit.towers.fast import FastTower
from support.hidden_states import hidden_states
from support.towers import SMALL, narrow, ours_from

DEPTH = 3


def towers(family, dtype=torch.float32):
    """Return transformers' tower and an adapter of the same weights."""
    config = narrow(family, depth=DEPTH)
    hf = build_tower(config, dtype=dtype)
    return hf, TimmModel(Encoder(ours_from(hf, config)))


def packed(model):
    """Return an adapter of the fast tower, in plain torch, with the same weights."""
    tower = FastTower(model.encoder.config, impl="reference")
    tower.load_state_dict(model.tower.state_dict())
    return TimmModel(Encoder(tower))


def images(model, count=2, rows=6, columns=10):
    side = model.encoder.config.patch_size
    return torch.randn(count, 3, rows * side, columns * side, generator=torch.Generator().manual_seed(0))


def maps_of_transformers(hf, config, x, norm):
    """Return the maps of all layers, 0 to depth, `[B, rows, columns, hidden_size]`; transformers cuts the images."""
    as_they_are = {"do_resize": False, "do_rescale": False, "do_normalize": False}
    processor = Qwen2VLImageProcessor(patch_size=config.patch_size, **as_they_are)
    cut = processor(images=list(x), return_tensors="pt")
    with torch.no_grad():
        items = hidden_states(hf, config, cut["pixel_values"], cut["image_grid_thw"].tolist())
        layers = [torch.cat(layer) for layer in zip(*items, strict=True)]
        return [norm_of(hf)(layer) for layer in layers] if norm else layers


def norm_of(hf):
    return hf.merger.ln_q if hasattr(hf.merger, "ln_q") else hf.merger.norm


def patches_by_hand(x, config):
    """Cut images `[B, 3, H, W]` patch by patch, so that gradients flow."""
    side, merge = config.patch_size, config.spatial_merge_size
    rows, columns = x.shape[2] // side, x.shape[3] // side
    corners = [
        (block_row * merge + row, block_column * merge + column)
        for block_row in range(rows // merge)
        for block_column in range(columns // merge)
        for row in range(merge)
        for column in range(merge)
    ]
    return torch.stack([
        torch.stack([image[:, row * side : (row + 1) * side, column * side : (column + 1) * side]] * 2, dim=1).flatten()
        for image in x
        for row, column in corners
    ])  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("family", list(SMALL))
def test_features_are_transformers_hidden_states(family, dtype):
    hf, model = towers(family, dtype)
    x = images(model)
    for norm in (False, True):
        truth = maps_of_transformers(hf, model.encoder.config, x, norm)
        with torch.no_grad():
            intermediates = model.forward_intermediates(x, norm=norm, intermediates_only=True)
        assert len(intermediates) == DEPTH
        for ours, theirs in zip(intermediates, truth[1:], strict=True):  # timm counts outputs of blocks
            assert ours.shape == (2, model.num_features, 6, 10)
            assert ours.is_contiguous()
            assert torch.equal(ours, theirs.permute(0, 3, 1, 2))
    with torch.no_grad():
        features = model.forward_features(x)
        assert torch.equal(features, truth[-1].flatten(1, 2))
        vectors = model(x)
    expected = truth[-1].double().mean((1, 2))
    assert vectors.dtype == dtype
    assert torch.allclose(vectors.double(), expected, rtol=2**-8 if dtype == torch.bfloat16 else 1e-5, atol=1e-5)


@torch.no_grad()
def test_the_arguments_are_those_of_timm():
    hf, model = towers("qwen2_5_vl")
    x = images(model, rows=4, columns=4)
    plain = [one.permute(0, 3, 1, 2) for one in maps_of_transformers(hf, model.encoder.config, x, norm=False)[1:]]
    final = [one.flatten(1, 2) for one in maps_of_transformers(hf, model.encoder.config, x, norm=True)[1:]]

    def check(result, blocks, last=DEPTH - 1):
        assert torch.equal(result[0], final[last])
        assert len(result[1]) == len(blocks)
        assert all(torch.equal(one, plain[block]) for one, block in zip(result[1], blocks, strict=True))

    check(model.forward_intermediates(x), [0, 1, 2])
    check(model.forward_intermediates(x, 2), [1, 2])
    check(model.forward_intermediates(x, [-1, 0, 2]), [0, 2])
    check(model.forward_intermediates(x, [1]), [1])
    check(model.forward_intermediates(x, (-3, 1), stop_early=True), [0, 1], last=1)
    check(model.forward_intermediates(x, np.int64(2)), [1, 2])
    check(model.forward_intermediates(x, np.array([-1, 0])), [0, 2])
    check(model.forward_intermediates(x, (block for block in (1,))), [1])
    features, (states,) = model.forward_intermediates(x, [1], norm=True, output_fmt="NLC")
    assert torch.equal(features, final[2])
    assert torch.equal(states, final[1])


def test_no_more_blocks_run_than_are_needed():
    _, model = towers("qwen3_vl")
    ran = []
    for index, block in enumerate(model.tower.blocks):
        block.register_forward_hook(lambda *_, index=index: ran.append(index))
    x = images(model, rows=2, columns=2)
    model.forward_intermediates(x, [0], intermediates_only=True)
    model.forward_intermediates(x, [1], stop_early=True)
    assert ran == [0, 0, 1]


@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients_are_those_of_transformers(checkpointing):
    hf, model = towers("qwen2_5_vl")
    model.set_grad_checkpointing(checkpointing)
    assert model.tower.gradient_checkpointing == checkpointing
    model.requires_grad_()
    config = model.encoder.config
    x = images(model, rows=4, columns=6)
    weights = torch.randn(2, config.hidden_size, 4, 6, generator=torch.Generator().manual_seed(1))

    def gradients(maps, inputs):
        return torch.autograd.grad((maps * weights).sum(), inputs)

    for_theirs, for_ours = x.clone().requires_grad_(), x.clone().requires_grad_()
    layers = zip(*hidden_states(hf, config, patches_by_hand(for_theirs, config), [[1, 4, 6]] * 2), strict=True)
    theirs = torch.cat(list(layers)[2]).permute(0, 3, 1, 2)
    (ours,) = model.forward_intermediates(for_ours, [1], intermediates_only=True)
    truth = gradients(theirs, (for_theirs, hf.blocks[0].mlp.up_proj.weight))
    found = gradients(ours, (for_ours, model.tower.blocks[0].mlp.up_proj.weight))
    for mine, true in zip(found, truth, strict=True):
        assert true.norm() > 0
        assert (mine - true).norm() <= 1e-6 * true.norm()


@torch.no_grad()
def test_the_fast_tower_gives_the_same_without_gradients():
    _, model = towers("qwen2_5_vl")
    fast = packed(model)
    x = images(model)
    for ours, theirs in zip(fast.forward_intermediates(x)[1], model.forward_intermediates(x)[1], strict=True):
        assert (ours - theirs).norm() <= 1e-5 * theirs.norm()
    assert torch.equal(fast.forward_features(x), fast.forward_intermediates(x, 1)[0])
    with pytest.raises(ValueError, match="impl='reference'"):
        fast.set_grad_checkpointing()
    with torch.enable_grad(), pytest.raises(ValueError, match="requires gradients"):
        fast.forward_features(x.requires_grad_())


def test_what_is_no_image_is_refused():
    _, model = towers("qwen3_5")
    x = images(model)
    for wrong in (x[0], x[:, :2], x[:, :, :-16], x[:0], x[..., :-1]):
        with pytest.raises(ValueError, match=r"x: expected \[B, 3, H, W\] with H and W multiples of 32"):
            model.forward_features(wrong)
    with pytest.raises(TypeError, match="x: expected normalised floats"):
        model.forward_features((x * 50).byte())
    for indices in ([3], [-4], [], 0, 4):
        with pytest.raises(ValueError, match="indices: expected"):
            model.forward_intermediates(x, indices)
    for indices in ([1.0], "12", 1.5):
        with pytest.raises(TypeError, match=r"indices: expected .*a sequence of integers"):
            model.forward_intermediates(x, indices)
    with pytest.raises(ValueError, match="output_fmt: expected 'NCHW' or 'NLC'"):
        model.forward_intermediates(x, output_fmt="NHWC")


def test_the_description_names_what_there_is():
    _, model = towers("qwen2_5_omni")
    assert model.num_features == model.embed_dim == model.head_hidden_size == 160
    for info in model.feature_info:
        assert model.get_submodule(info["module"]) in model.tower.blocks
        assert (info["num_chs"], info["reduction"]) == (160, 14)
    config = model.default_cfg
    assert (config["mean"], config["std"]) == (
        model.encoder.image_processor.image_mean,
        (0.26862954, 0.26130258, 0.27577711),
    )
    assert model(torch.randn(1, *config["input_size"])[:, :, :56, :28]).shape == (1, 160)
    assert config["input_size"] == (3, 224, 224)
    assert model.get_submodule(config["first_conv"]).weight.shape[0] == 160


def test_in_the_hands_of_timm():
    pytest.importorskip("timm", reason="needs timm: pip install timm")
    from timm.data import create_transform, resolve_data_config
    from timm.models._features import FeatureGetterNet
    from timm.models.vision_transformer import VisionTransformer

    _, model = towers("qwen3_vl")
    config = resolve_data_config({}, model=model)
    assert (config["input_size"], config["mean"], config["std"]) == ((3, 224, 224), (0.5,) * 3, (0.5,) * 3)
    create_transform(**config)
    x = images(model, rows=4, columns=4)
    net = FeatureGetterNet(model, out_indices=(0, 2), norm=True)
    assert net.feature_info.channels() == [144, 144]
    assert net.feature_info.reduction() == [16, 16]
    truth = model.forward_intermediates(x, [0, 2], norm=True, intermediates_only=True)
    assert all(torch.equal(one, other) for one, other in zip(net(x), truth, strict=True))

    shape = {"img_size": 64, "patch_size": 16, "embed_dim": 144, "depth": DEPTH, "num_heads": 2, "num_classes": 0}
    vit = VisionTransformer(**shape, class_token=False, global_pool="avg")
    for arguments in ({}, {"indices": 2}, {"indices": [-1, 0, 2]}, {"indices": (-3, 1), "stop_early": True}):
        for output_fmt in ("NCHW", "NLC"):
            ours, theirs = (one.forward_intermediates(x, output_fmt=output_fmt, **arguments) for one in (model, vit))
            assert ours[0].shape == theirs[0].shape
            assert [one.shape for one in ours[1]] == [one.shape for one in theirs[1]]
    assert model(x).shape == vit(x).shape


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@torch.no_grad()
def test_an_image_alone_has_the_bits_of_a_batch_on_a_gpu():
    config = narrow("qwen2_5_vl", depth=DEPTH)
    tower = FastTower(config)
    tower.load_state_dict(ours_from(build_tower(config), config).state_dict())
    model = TimmModel(Encoder(tower.to("cuda", torch.bfloat16)))
    x = images(model, 5).cuda()
    features, intermediates = model.forward_intermediates(x)
    for index in range(5):
        alone, alone_intermediates = model.forward_intermediates(x[index : index + 1])
        assert torch.equal(alone[0], features[index])
        for one, other in zip(alone_intermediates, intermediates, strict=True):
            assert torch.equal(one[0], other[index])
    assert torch.equal(model(x)[:1], model(x[:1]))
