"""Where layers read concatenations: seen while the model runs, through all that keeps channels apart."""

import pytest
import torch
import torch.nn.functional as F
from diffusers.models.transformers.transformer_flux import FluxSingleTransformerBlock
from torch import nn

import models
import ptq4dm
from helpers import normal, run
from ptq4dm.layers.view import find_layers
from ptq4dm.seams.observe import observed_seams, one_of_each_kind

pytestmark = pytest.mark.usefixtures("one_thread")
IMAGE, TOKENS = (2, 6, 4, 4), (2, 5, 6)


class Joined(nn.Module):
    """Two tensors, the first of 4 channels, joined, changed by `between` and read by `layer`."""

    def __init__(self, layer, between, axis):
        super().__init__()
        self.layer, self.between, self.axis = layer, between, axis

    def forward(self, x):
        rest = x.shape[self.axis] - 4
        joined = torch.cat([x.narrow(self.axis, 0, 4), 3 * x.narrow(self.axis, 4, rest)], self.axis)
        return self.layer(self.between(joined))


def seams_of(model, *inputs):
    model.eval()
    with ptq4dm.record(model) as calls:
        for x in inputs:
            model(x)
    return observed_seams(model, find_layers(model), one_of_each_kind(calls))


def conv(channels, **options):
    return nn.Conv2d(channels, 3, 3, padding=1, **options)


KEPT_IN_IMAGES = {
    "nothing": lambda x: x,
    "silu": F.silu,
    "half precision and back": lambda x: x.half().float().contiguous(memory_format=torch.channels_last),
    "group norm": lambda x: F.group_norm(x, 2),
    "nearest neighbour": lambda x: F.interpolate(x, scale_factor=2),
    "in place": lambda x: x.mul_(2).add_(1),
    "padding of pixels": lambda x: F.pad(x, (1, 1, 1, 1)),
    "a shift for each channel": lambda x: x + torch.arange(6.0)[:, None, None],
    "there and back": lambda x: x.flatten(2).transpose(1, 2).unflatten(1, (4, 4)).permute(0, 3, 1, 2),
    "a sum with something else": lambda x: x + normal(*IMAGE),
    "pooling": lambda x: F.avg_pool2d(x, 2),
    "some of the images": lambda x: x[:1],
}


@pytest.mark.parametrize("between", KEPT_IN_IMAGES.values(), ids=KEPT_IN_IMAGES)
def test_a_seam_is_followed_to_a_convolution(between):
    assert seams_of(Joined(conv(6), between, 1), normal(*IMAGE)) == {"layer": (4,)}


KEPT_IN_TOKENS = {
    "nothing": lambda x: x,
    "gelu": F.gelu,
    "layer norm": lambda x: F.layer_norm(x, (6,)),
    "modulation": lambda x: x * (1 + torch.rand(2, 1, 6)) + torch.rand(2, 1, 6),
    "all tokens in one": lambda x: x.reshape(-1, 6),
    "another axis": lambda x: x[:, None].expand(-1, 3, -1, -1),
    "a token": lambda x: x[:, 1],
}


@pytest.mark.parametrize("between", KEPT_IN_TOKENS.values(), ids=KEPT_IN_TOKENS)
def test_a_seam_is_followed_to_a_linear(between):
    assert seams_of(Joined(nn.Linear(6, 3), between, 2), normal(*TOKENS)) == {"layer": (4,)}


MOVED = {
    "channels in front": (lambda x: torch.cat([x[:, :1] * 9, x], 1), conv(7), (1, 5)),
    "a part of both": (lambda x: x[:, 2:5], conv(3), (2,)),
    "half of it": (lambda x: x.chunk(2, 1)[1], conv(3), (1,)),
    "two meet": (lambda x: x + torch.cat([x[:, :1], x[:, 1:]], 1), conv(6), (1, 4)),
    "channels around": (lambda x: F.pad(x, (0, 0, 0, 0, 2, 1)), conv(9), (6,)),
}


@pytest.mark.parametrize("name", MOVED)
def test_the_place_of_a_seam_is_where_it_is(name):
    between, layer, cuts = MOVED[name]
    assert seams_of(Joined(layer, between, 1), normal(*IMAGE)) == {"layer": cuts}


ENDED = {
    "another layer mixes channels": (nn.Sequential(nn.Conv2d(6, 6, 1), nn.SiLU()), conv(6), {"between.0": (4,)}),
    "a product": (lambda x: (x.flatten(2).transpose(1, 2) @ torch.ones(6, 6)).mT.unflatten(2, (4, 4)), conv(6), {}),
    "one side of it": (lambda x: x[:, :4], conv(4), {}),
    "every other channel": (lambda x: x[:, ::2], conv(3), {}),
    "groups that read other channels": (lambda x: x, conv(6, groups=3), {}),
    "joined along pixels": (lambda x: torch.cat([x[:, :3], x[:, 3:]], 2), conv(3), {}),
    "channels shuffled by a view": (lambda x: x.view(2, 12, 2, 4), nn.Conv2d(12, 3, 1), {}),
}


@pytest.mark.parametrize("name", ENDED)
def test_a_seam_ends(name):
    between, layer, expected = ENDED[name]
    assert seams_of(Joined(layer, between, 1), normal(*IMAGE)) == expected


def test_calls_that_disagree_have_no_seam():
    """At another size of images this model joins at another channel."""

    class Changing(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = conv(6)

        def forward(self, x):
            at = 2 if x.shape[2] == 4 else 3
            return self.layer(torch.cat([x[:, :at], x[:, at:]], 1))

    small, large = normal(*IMAGE), normal(2, 6, 8, 8)
    assert seams_of(Changing(), small) == {"layer": (2,)}
    assert seams_of(Changing(), large) == {"layer": (3,)}
    assert seams_of(Changing(), small, large) == {}


def test_a_unet_has_a_seam_at_every_skip():
    """In levels of unlike widths no cut is in the middle; down and mid blocks have none."""
    model = models.unet()
    with ptq4dm.record(model) as calls:
        run(model)
    found = observed_seams(model, find_layers(model), one_of_each_kind(calls))
    skips = {}
    for name, block in model.named_modules():
        if name.startswith("up_blocks") and name.split(".")[-2:-1] == ["resnets"]:
            skips |= {f"{name}.{layer}": block.conv1.in_channels for layer in ("conv1", "conv_shortcut")}
    assert len(skips) == 8 and skips.keys() == found.keys() - {"time_embedding.linear_1"}
    assert found["up_blocks.1.resnets.0.conv1"] == (16,) and skips["up_blocks.1.resnets.0.conv1"] == 24
    assert found["time_embedding.linear_1"] == (4,)  # sines and cosines


def test_a_flux_block_joins_attention_and_hidden_units():
    block = FluxSingleTransformerBlock(dim=8, num_attention_heads=2, attention_head_dim=4, mlp_ratio=2.0).eval()
    arguments = {
        "hidden_states": normal(1, 5, 8), "encoder_hidden_states": normal(1, 2, 8), "temb": normal(1, 8)
    }  # fmt: skip
    with ptq4dm.record(block) as calls:
        block(**arguments)
    assert observed_seams(block, find_layers(block), calls)["proj_out"] == (8,)


def test_the_model_is_left_as_it_was():
    model = models.unet().train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with ptq4dm.record(model) as calls:
        run(model)
    observed_seams(model, find_layers(model), calls)
    assert model.training and all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert not any(module._forward_pre_hooks for module in model.modules())
