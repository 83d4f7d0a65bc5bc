"""LayerView and find_layers: which layers can be quantized, what they are called, which are the model's ends."""

import pytest
import torch
from diffusers import (
    FluxTransformer2DModel,
    PixArtTransformer2DModel,
)
from torch import nn

from models import conditional_unet, dit, unet
from ptq4dm.errors import UserError
from ptq4dm.layers.base import replace_module
from ptq4dm.layers.plan import LayerPlan
from ptq4dm.layers.registry import quantized_copy
from ptq4dm.layers.view import find_layers


def narrow_unet():
    return unet(block_out_channels=(8, 12), attention_head_dim=4)


def narrow_conditional_unet():
    """As narrow as its input and output: widths alone do not tell its ends."""
    return conditional_unet(block_out_channels=(4, 8), norm_num_groups=2, attention_head_dim=2, cross_attention_dim=6)


def pixart(attention_head_dim=8):
    return PixArtTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=attention_head_dim,
        in_channels=4,
        out_channels=8,
        num_layers=1,
        sample_size=8,
        cross_attention_dim=2 * attention_head_dim,
        caption_channels=12,
        use_additional_conditions=False,
    )


def flux():
    return FluxTransformer2DModel(
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=24,
        pooled_projection_dim=20,
        axes_dims_rope=(4, 4, 8),
    )


ENDS = {  # model -> (first, last); 16 is both the width of dit() and its patch of 2 x 2 x 4 input channels
    narrow_unet: ("conv_in", "conv_out"),
    narrow_conditional_unet: ("conv_in", "conv_out"),
    dit: ("pos_embed.proj", "proj_out_2"),
    pixart: ("pos_embed.proj", "proj_out"),
    flux: ("x_embedder", "proj_out"),
}


@pytest.mark.parametrize("build", ENDS, ids=lambda f: f.__name__)
def test_ends_of_diffusers_models(build):
    roles = {view.name: view.role for view in find_layers(build()) if view.role != "inner"}
    first, last = ENDS[build]
    assert roles == {first: "first", last: "last"}


@pytest.mark.parametrize("build", [dit, pixart], ids=lambda f: f.__name__)
def test_ends_when_the_width_is_that_of_the_output(build):
    """2 x 16 = 32 = a patch of 2 x 2 x 8 output channels."""
    roles = {view.role: view.name for view in find_layers(build(attention_head_dim=16)) if view.role != "inner"}
    assert (roles["first"], roles["last"]) == ENDS[build]


def test_patch_with_a_size_per_axis():
    model = nn.Module()
    model.config = {"in_channels": 2, "out_channels": 3, "patch_size": (1, 2, 2)}
    model.embed, model.inner, model.out = nn.Linear(8, 7), nn.Linear(7, 7), nn.Linear(7, 12)
    assert [view.role for view in find_layers(model)] == ["first", "inner", "last"]


def test_embeddings_as_wide_as_the_input_come_first_in_the_model_but_are_not_its_first_layer():
    """QwenImage's time embedding reads 256 channels, as a patch of 2 x 2 x 64 would; the image comes in by 64."""
    model, embedding = nn.Module(), nn.Module()
    model.config = {"in_channels": 4, "patch_size": 2}
    embedding.linear_1, embedding.linear_2 = nn.Linear(16, 7), nn.Linear(4, 7)
    model.time, model.other, model.image = embedding, nn.Linear(16, 7), nn.Linear(4, 7)
    assert [view.name for view in find_layers(model) if view.role == "first"] == ["image"]


def test_a_model_without_channels_has_no_ends():
    assert [view.role for view in find_layers(nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 3)))] == ["inner"] * 2


def test_ends_do_not_move_when_layers_are_skipped():
    roles = {view.name: view.role for view in find_layers(dit(), ["pos_embed"])}
    assert "pos_embed.proj" not in roles and "first" not in roles.values() and roles["proj_out_2"] == "last"


def test_every_linear_and_convolution_is_found_in_order():
    model = narrow_unet()
    expected = [name for name, m in model.named_modules() if isinstance(m, (nn.Linear, nn.Conv2d))]
    assert [view.name for view in find_layers(model)] == expected and len(expected) > 40


@pytest.mark.parametrize(
    "skip, left",
    [
        ((), ["a", "b.to_q", "b.to_k", "b.deep.to_q"]),
        (("a",), ["b.to_q", "b.to_k", "b.deep.to_q"]),
        (("b",), ["a"]),
        (("*.to_q",), ["a", "b.to_k"]),
        (("b.deep",), ["a", "b.to_q", "b.to_k"]),
        (("a", "b.*"), []),
    ],
)
def test_skip_patterns(skip, left):
    block, deep = nn.Module(), nn.Module()
    deep.to_q = nn.Linear(2, 2)
    block.to_q, block.to_k, block.deep = nn.Linear(2, 2), nn.Linear(2, 2), deep
    model = nn.Module()
    model.a, model.b = nn.Linear(2, 2), block
    assert [view.name for view in find_layers(model, skip)] == left


@pytest.mark.parametrize(
    "conv, found",
    [
        (dict(kernel_size=3, padding=1), True),
        (dict(kernel_size=3, padding="same"), True),
        (dict(kernel_size=3, padding="valid"), True),
        (dict(kernel_size=2, padding="same"), False),  # pads one side only
        (dict(kernel_size=2, padding="same", dilation=2), True),
        (dict(kernel_size=3, padding=1, padding_mode="reflect"), False),
        (dict(kernel_size=3, padding=1, padding_mode="circular"), False),
    ],
)
def test_only_zero_padded_convolutions(conv, found):
    model = nn.Sequential(nn.Conv2d(4, 6, **conv))
    assert [view.name for view in find_layers(model)] == (["0"] if found else [])
    if found:  # and the quantized layer has the geometry of the original
        x = torch.randn(2, 4, 7, 5, generator=torch.Generator().manual_seed(0))
        expected = model(x)
        replace_module(model, "0", quantized_copy(model[0], LayerPlan(), "0"))
        assert model(x).shape == expected.shape
        assert (model(x) - expected).norm() < 0.02 * expected.norm()


def test_other_kinds_are_left_alone():
    class Special(nn.Linear):
        pass

    attention = nn.MultiheadAttention(4, 2)  # its out_proj is a subclass that it reads itself
    model = nn.Sequential(Special(3, 3), nn.Conv1d(3, 3, 1), nn.Embedding(3, 3), attention, nn.Linear(3, 3))
    assert [view.name for view in find_layers(model)] == ["4"]


def test_quantized_layers_are_not_found_again():
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    replace_module(model, "0", quantized_copy(model[0], LayerPlan(), "0"))
    assert [view.name for view in find_layers(model)] == ["1"]


def test_weight_is_a_matrix():
    view = find_layers(nn.Sequential(nn.Conv2d(6, 8, 3, groups=2)))[0]
    assert view.weight.shape == (8, 27) and torch.equal(view.weight[1], view.module.weight[1].flatten())


def test_a_pattern_that_names_nothing_is_refused():
    model = nn.Sequential(nn.Linear(2, 2))
    with pytest.raises(UserError, match="'to_q' in modules_to_not_convert names no layer"):
        find_layers(model, ["0", "to_q"])
