"""Whole models on integers and back: which layers, which widths, the same parameters; grids as served."""

import copy

import pytest
import torch
from torch import nn

import ptq4dm
from models import unet
from ptq4dm.errors import UserError
from ptq4dm.layers.shift.convert import beside_the_ends, to_floats, to_integers
from ptq4dm.layers.shift.layers import ShiftConv2d, ShiftLinear
from ptq4dm.layers.shift.norms import ShiftGroupNorm
from ptq4dm.layers.shift.widths import Widths


def call(net):
    torch.manual_seed(0)
    size = net.config.sample_size
    with torch.no_grad():
        return net.eval()(torch.randn(2, net.config.in_channels, size, size), torch.tensor([3, 700]))[0]


def distance(one, other):
    return ((one - other).norm() / other.norm()).item()


def test_there_and_back():
    net = unet()
    before, parameters = call(net), dict(net.named_parameters())
    converted = to_integers(net, Widths())
    ends = {name: str(widths) for name, widths in converted.layers.items() if name in ("conv_in", "conv_out")}
    served = "8/8/8, 4 groups, grids as served"
    assert ends == {"conv_in": f"{served}, fine inputs", "conv_out": served} and not converted.norms
    assert {type(net.get_submodule(name)) for name in converted.layers} == {ShiftLinear, ShiftConv2d}
    assert str(converted) == f"{len(converted.layers)} layers on integers"
    assert 0 < distance(call(net), before) < 0.3
    assert all(net.get_parameter(name) is one for name, one in parameters.items())
    to_floats(net)
    assert torch.equal(call(net), before) and dict(net.named_parameters()).keys() == parameters.keys()


def test_norms_alone():
    net = unet()
    before = call(net)
    converted = to_integers(net, None, norms=True)
    assert not converted.layers and {type(net.get_submodule(name)) for name in converted.norms} == {ShiftGroupNorm}
    assert 0 < distance(call(net), before) < 0.1


def test_grids_as_served_are_those_of_quantize():
    net = unet()
    trained, packed = copy.deepcopy(net), copy.deepcopy(net)
    to_integers(trained, Widths(4, 4, 6, served=True))
    ptq4dm.quantize(packed, ptq4dm.RTNConfig(weight_bits=4, activation_bits=4, activations="dynamic"))
    assert distance(call(trained), call(packed)) < 1e-5 < 0.05 < distance(call(trained), call(net))


def test_what_is_left_and_what_is_refused():
    net = unet()
    converted = to_integers(net, Widths(), skip=("mid_block*",))
    assert converted.layers and not any(name.startswith("mid_block") for name in converted.layers)
    with pytest.raises(UserError, match="names no layer of the model"):
        to_integers(unet(), Widths(), skip=("nothing",))
    packed = unet()
    ptq4dm.quantize(packed, ptq4dm.RTNConfig(activations="dynamic"))
    with pytest.raises(UserError, match="the model is quantized and its codes do not train"):
        to_integers(packed, Widths())
    with pytest.raises(UserError, match="has no layer that trains on integers"):
        to_integers(torch.nn.Sequential(torch.nn.ReLU()), Widths())
    with pytest.raises(UserError, match="gradient bits must be between 2 and 8, not 9"):
        Widths(gradient=9)
    with pytest.raises(UserError, match="groups must be between 1 and 7, not 0"):
        Widths(groups=0)


def test_layers_beside_the_ends_of_a_unet_have_eight_bits():
    net = unet()
    names = beside_the_ends(net)
    assert names == [
        "down_blocks.0.resnets.0.conv1", "up_blocks.1.resnets.0.conv1", "up_blocks.1.resnets.0.conv_shortcut",
        "up_blocks.1.resnets.1.conv1", "up_blocks.1.resnets.1.conv_shortcut",
    ]  # fmt: skip
    found = to_integers(copy.deepcopy(net), Widths(6, 5, 4, 3)).layers
    assert {name for name, widths in found.items() if str(widths) == "8/8/4, 3 groups"} == set(names)
    assert str(found["down_blocks.0.resnets.0.conv2"]) == "6/5/4, 3 groups"
    same = to_integers(copy.deepcopy(net), Widths(6, 5, 4, 3), wide=()).layers
    assert str(same[names[0]]) == "6/5/4, 3 groups"
    some = to_integers(copy.deepcopy(net), Widths(6, 5, 4, 3), wide=("*.conv2",)).layers
    assert str(some[names[0]]) == "6/5/4, 3 groups" and str(some["down_blocks.0.resnets.0.conv2"])[:5] == "8/8/4"
    served = to_integers(copy.deepcopy(net), Widths(4, 4, 6, served=True)).layers
    assert str(served[names[0]]) == "4/4/6, 4 groups, grids as served"
    assert beside_the_ends(nn.Sequential(nn.Linear(2, 2))) == []
