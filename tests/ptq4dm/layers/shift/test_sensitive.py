"""The layers that lose most by few bits: found where they are known, and the model stays as it was."""

import copy

import pytest
import torch
from torch import nn

from ptq4dm.layers.shift.convert import to_integers
from ptq4dm.layers.shift.sensitive import most_sensitive
from ptq4dm.layers.shift.widths import Widths


class Sum(nn.Module):
    """Layers whose outputs are added up, some with a greater weight."""

    def __init__(self, weights):
        super().__init__()
        torch.manual_seed(0)
        self.weights = weights
        self.layers = nn.ModuleList([nn.Linear(32, 16) for _ in weights])

    def forward(self, x):
        return sum(weight * layer(x) for weight, layer in zip(self.weights, self.layers, strict=True))


@pytest.mark.parametrize(("weights", "worst"), [
    ([1] * 14 + [10] + [1] * 5, ["layers.14"]),
    ([1] * 3 + [9] + [1] * 14 + [10] + [1], ["layers.18", "layers.3"]),
    ([1] * 20, 2),  # none stands out: a tenth of them
    ([1] * 30 + [10] * 10, 4),
], ids=["one", "two", "alike", "many"])  # fmt: skip
def test_they_are_found(weights, worst):
    net, x = Sum(weights).eval(), torch.randn(64, 32, generator=torch.Generator().manual_seed(1))
    before = {name: id(module) for name, module in net.named_modules()}
    found = most_sensitive(net, lambda: net(x), Widths())
    assert {name: id(module) for name, module in net.named_modules()} == before
    assert found == worst if isinstance(worst, list) else len(found) == worst
    assert len(weights) < 40 or all(int(name.removeprefix("layers.")) >= 30 for name in found)
    errors = []
    for wide in ((), found):
        narrow = copy.deepcopy(net)
        to_integers(narrow, Widths(), wide=wide)
        with torch.no_grad():
            errors.append((narrow(x) - net(x)).square().mean().item())
    share = {1: 0.5, 2: 0.5 if isinstance(worst, list) else 0.97}.get(len(found), 0.8)
    assert errors[1] < share * errors[0]


def test_a_model_is_whole_after_an_error():
    net, calls = Sum([1] * 5), []

    def call():
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return net(torch.ones(2, 32))

    with pytest.raises(KeyboardInterrupt):
        most_sensitive(net, call, Widths())
    assert all(type(layer) is nn.Linear for layer in net.layers)
