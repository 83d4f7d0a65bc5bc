"""Ranges of gradients by time, and bytes that a forward pass keeps, where the answers are known."""

import pytest
import torch
from torch import nn

from ptq4dm.layers.shift.layers import ShiftLinear
from ptq4dm.layers.shift.widths import Widths
from ptq4dm.training.gradients import gradient_ranges, gradients_by_output
from ptq4dm.training.memory import kept_bytes


@pytest.mark.parametrize("integers", [False, True])
def test_octaves_below_the_largest(integers):
    torch.manual_seed(0)
    layer = nn.Linear(4, 1)
    net = nn.Sequential(ShiftLinear(layer, Widths()) if integers else layer)
    x, times = torch.randn(4, 4), torch.tensor([0, 99, 500, 999])
    scale = torch.tensor([1.0, 0.5, 0.125, 1 / 64])[:, None]
    rows = gradient_ranges(net, lambda: (net(x) * scale).sum(), times, 1000, bins=10)
    assert [(row["low"], row["high"]) for row in rows[:2]] == [(0, 100), (100, 200)] and len(rows) == 10
    assert [row["samples"] for row in rows] == [2, 0, 0, 0, 0, 1, 0, 0, 0, 1]
    assert rows[0]["octaves"] == [0.0, 0.0, 1.0] and rows[1]["octaves"] is None
    assert rows[5]["octaves"] == [3.0, 3.0, 3.0] and rows[9]["octaves"] == [6.0, 6.0, 6.0]
    assert all(parameter.grad is None for parameter in net.parameters())
    assert not net[0]._forward_hooks


def test_layers_that_do_not_see_samples_are_left_out():
    net = nn.ModuleDict({"each": nn.Linear(4, 4), "once": nn.Linear(4, 4)})
    x = torch.randn(3, 4)
    found = gradients_by_output(net, lambda: (net["each"](x) + net["once"](x[:1])).square().sum(), 3)
    assert found.keys() == {"each"} and torch.equal(found["each"][0], x)


def test_bytes_are_counted_once_and_parameters_not_at_all():
    layer, x = nn.Linear(8, 8), torch.randn(16, 8, requires_grad=True)
    own = {layer.weight.untyped_storage().data_ptr()}
    assert kept_bytes(lambda: layer(x), own) == x.numel() * 4
    assert kept_bytes(lambda: layer(x) + layer(x), own) == x.numel() * 4
    assert kept_bytes(lambda: layer(x)) == (x.numel() + layer.weight.numel()) * 4


def test_nothing_of_a_call_stays_once_its_bytes_are_counted():
    x = torch.randn(4, 8, requires_grad=True)
    end = torch.autograd.graph.get_gradient_edge  # of x: made anew where no graph has one

    def call():
        y = x.exp()  # its graph keeps its own output
        end(x).node.metadata["of this call"] = True
        return y

    assert kept_bytes(call) == x.numel() * 4
    assert "of this call" not in end(x).node.metadata
