"""A block in training computes what its packed form will, quantized layers in it and after it included."""

import pytest
import torch
from torch import nn

from helpers import distance, normal
from ptq4dm.calibration.evidence import substituted
from ptq4dm.calibration.record import record
from ptq4dm.layers.plan import Int4Plan
from ptq4dm.layers.registry import quantized_copy
from ptq4dm.reconstruction.block import BlockTask, BlockTraining
from ptq4dm.reconstruction.items import outputs_of, predictions_of
from ptq4dm.reconstruction.tuples import Tuples
from ptq4dm.rounding.learned import Learning
from ptq4dm.walk.walk import Walks

pytestmark = pytest.mark.usefixtures("one_thread")


class Nested(nn.Module):
    """A block with three layers, one of them packed before it as part of a block within; and one after it."""

    config = {}

    def __init__(self):
        super().__init__()
        self.block = nn.Sequential(*(nn.Linear(16, 16) for _ in range(3)))
        self.after, self.rest = nn.Linear(16, 16), nn.Linear(16, 16)

    def forward(self, x, timestep=None):
        return self.rest(self.after(self.block(x)))


def test_layers_packed_before_compute_in_it_and_after_it(monkeypatch):
    torch.manual_seed(0)
    model = Nested().eval()
    with record(model) as calls, torch.no_grad():
        model(normal(64, 16), timestep=torch.tensor(1))
    plan = Int4Plan(weight_bits=2)
    coarse = {name: quantized_copy(model.get_submodule(name), plan, name) for name in ("block.1", "after")}
    block = BlockTask("block", {name: plan for name in ("block.0", "block.2")}, {}, coarse, {})
    learning = Learning(train=("rounding",), start="nearest", steps=4, prediction=1.0, augmentation="none")
    batches = list(calls.batches(1))
    tuples = Tuples.of(Walks(model), batches)
    training = BlockTraining(model, block, learning, tuples, predictions=predictions_of(model, batches))
    train, seen = training._train, []

    def watched(layers, items, nearest):
        seen.append(
            (outputs_of(training.module, items[0].noisy, items[0])[0].detach(), training._prediction(items[0]))
        )
        train(layers, items, nearest)

    monkeypatch.setattr(training, "_train", watched)
    layers, figures = training.run()
    nearest = {name: quantized_copy(model.get_submodule(name), plan, name) for name in layers}
    with torch.no_grad():
        exact = model(calls.call().args[0])
        with substituted(model, {**coarse, **nearest}):
            expected, answer = model.block(calls.call().args[0]), model(calls.call().args[0])
    assert distance(seen[0][0], expected) < 1e-5
    assert float(seen[0][1].detach()) == pytest.approx(float((answer - exact).square().mean()), rel=1e-4)
    assert figures.nearest == pytest.approx(distance(expected, model.block(calls.call().args[0])) ** 2, rel=1e-4)
