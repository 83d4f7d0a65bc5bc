"""Steps that are replayed give what steps that are launched give."""

import copy
import math

import pytest
import torch
from torch import nn

import ptq4dm
from helpers import normal
from ptq4dm.reconstruction import replay
from ptq4dm.reconstruction.replay import Replay

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


def test_on_a_cpu_every_step_is_launched():
    seen = []
    steps = Replay(lambda thing: seen.append(thing) or thing, torch.device("cpu"), 1000)
    assert [steps(0, "a"), steps(0, "b"), steps(0, "c")] == ["a", "b", "c"] == seen


@pytest.mark.gpu
@needs_gpu
def test_a_graph_replays_what_was_launched_and_draws_anew():
    x, draw = torch.zeros(4, device="cuda"), torch.Generator("cuda").manual_seed(0)
    steps = Replay(lambda place: x + torch.rand(4, generator=draw, device="cuda"), x.device, 1000, [draw])
    found = []
    for turn in range(5):
        x.fill_(turn)
        found.append(steps(0, 0).clone())
    assert len(steps.graphs) == 1
    assert all(bool(((one - turn >= 0) & (one - turn < 1)).all()) for turn, one in enumerate(found))
    assert len({tuple((one - turn).tolist()) for turn, one in enumerate(found)}) == 5


@pytest.mark.gpu
@needs_gpu
def test_what_no_graph_can_hold_is_launched():
    x = torch.ones(4, device="cuda")
    steps = Replay(lambda _: x * float(x.sum()), x.device, 1000)
    for turn in range(4):
        x.fill_(turn)
        assert torch.equal(steps(0, None), x * 4 * turn)
    assert not steps.graphs and torch.equal(x + 1, torch.full_like(x, 4))  # and the device goes on


class Small(nn.Module):
    config = {}

    def __init__(self):
        super().__init__()
        self.block = nn.Sequential(nn.Conv2d(8, 16, 3, padding=1), nn.SiLU(), nn.Conv2d(16, 8, 1))
        self.rest = nn.Conv2d(8, 8, 1)

    def forward(self, x, timestep=None):
        return self.rest(self.block(x))


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("options", [
    {}, {"variable": "sigmoid", "start": "nearest"}, {"optimizer": "sgd"}, {"optimizer": "signsgd"},
    {"prediction": 1.0}, {"activations": "static", "train": ("rounding", "ranges", "scales", "biases")},
])  # fmt: skip
def test_codes_are_those_of_launched_steps(options, monkeypatch):
    torch.manual_seed(0)
    model = Small().eval().to("cuda")
    with ptq4dm.record(model) as calls, torch.no_grad():
        model(normal(16, 8, 12, 12).to("cuda"), timestep=torch.arange(16))
    config = ptq4dm.GradPTQConfig(
        weight_bits=4, num_tuples=16, steps=60, step_tuples=4, **{"activations": "dynamic", **options}
    )
    found = []
    for repeats in (replay.REPEATS, math.inf):
        monkeypatch.setattr(replay, "REPEATS", repeats)
        quantized = copy.deepcopy(model)
        ptq4dm.quantize(quantized, config, calls)
        found.append(quantized.state_dict())
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])
