"""The layers that lose most by few bits: found where they are known, and the model stays as it was."""

import copy

import torch
from torch import nn

from models import unet
from ptq4dm.layers.shift.convert import to_integers
from ptq4dm.layers.shift.sensitive import MOST, most_sensitive
from ptq4dm.layers.shift.widths import Widths


def call(net):
    g = torch.Generator().manual_seed(0)
    x = torch.randn(4, net.config.in_channels, net.config.sample_size, net.config.sample_size, generator=g)
    return net(x, torch.tensor([3, 200, 500, 900]))[0]


def test_a_layer_with_a_channel_far_out_is_found():
    net = unet().eval()
    norm, conv = net.up_blocks[-1].resnets[-1].norm2, net.up_blocks[-1].resnets[-1].conv2
    with torch.no_grad():  # a channel that is thirty times the others, and counts as little as they do
        norm.weight[1] *= 30
        norm.bias[1] *= 30
        conv.weight[:, 1] /= 30
    before = {name: (type(module), id(module)) for name, module in net.named_modules()}
    widths = Widths(6, 6, 6)
    found = most_sensitive(net, lambda: call(net), widths)
    layers = sum(isinstance(module, (nn.Linear, nn.Conv2d)) for module in net.modules())
    assert found[0] == "up_blocks.1.resnets.1.conv2" and 1 <= len(found) <= MOST * layers + 1
    assert {name: (type(module), id(module)) for name, module in net.named_modules()} == before
    with torch.no_grad():
        exact, errors = call(net), []
        for wide in ((), found):
            narrow = copy.deepcopy(net)
            to_integers(narrow, widths, wide=wide)
            errors.append((call(narrow) - exact).square().mean().item())
    assert errors[1] < 0.7 * errors[0]
