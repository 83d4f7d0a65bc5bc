"""Sensitivities: against closed forms on a layer by itself, against each other, and how many runs they take."""

import pytest
import torch
from scipy.stats import spearmanr
from torch import nn

import ptq4dm
from helpers import normal, same
from models import plain_unet
from ptq4dm import RTNConfig
from ptq4dm.budgets.masking import SCALES, direct, layer_errors, masked, parts_of
from ptq4dm.budgets.measure import noised
from ptq4dm.calibration.record import replay
from ptq4dm.layers.view import find_layers
from ptq4dm.quantization.planning import make_plan

pytestmark = pytest.mark.usefixtures("one_thread")
OPTIONS = {"w8": {}, "w4": {"weight_bits": 4}, "w3": {"weight_bits": 3}, "w2": {"weight_bits": 2}}


def formats(model, options=None):
    found = {}
    for label, one in (options or OPTIONS).items():
        config = RTNConfig(activations="dynamic", first_last="same", **one)
        found[label], _ = config.pack(model, make_plan(model, config), None)
    return found


def recorded(model, *inputs):
    with ptq4dm.record(model) as calls, torch.no_grad():
        for x in inputs:
            model(*x)
    return calls


def one_layer(inputs=16):
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(96, 64, bias=False))
    return model, recorded(model, *[(normal(20, 96, seed=seed),) for seed in range(inputs)])


def unet_calls(model):
    return recorded(model, *[(normal(2, 3, 8, 8, seed=seed), 100 * seed + 20) for seed in range(8)])


@pytest.mark.parametrize("scale", SCALES)
def test_on_a_layer_by_itself_masks_tell_the_error_of_every_format(scale):
    model, calls = one_layer()
    parts = parts_of(calls, 16, 4)
    found, exact = (
        one.errors["0"] for one in (masked(model, formats(model), ["0"], parts, 0.1, scale),
                                    direct(model, formats(model), ["0"], parts))
    )  # fmt: skip
    assert exact["w8"] < exact["w4"] < exact["w3"] < exact["w2"]
    for label in OPTIONS:
        assert found[label] == pytest.approx(exact[label], rel=0.15), label


def test_direct_is_the_error_of_the_model_with_one_layer_quantized():
    model, calls = one_layer()
    ours = direct(model, formats(model), ["0"], parts_of(calls, 16, 4)).errors["0"]
    exact = replay(model, calls).double()
    quantized, _ = one_layer()
    ptq4dm.quantize(quantized, RTNConfig(activations="dynamic", weight_bits=4, first_last="same"))
    wrong = (replay(quantized, calls).double() - exact).square().sum() / exact.square().sum()
    assert ours["w4"] == pytest.approx(float(wrong), rel=1e-2)  # parts have 4 calls each, of nearly equal energy


def test_masks_take_a_run_a_layer_and_a_third_of_the_direct_way():
    model = plain_unet()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    names = [view.name for view in find_layers(model)]
    parts = parts_of(unet_calls(model), 4, 2)
    found, exact = masked(model, formats(model), names, parts), direct(model, formats(model), names, parts)
    assert same(before, model) and not any("forward" in vars(module) for module in model.modules())
    assert found.forwards == 4 * (1 + len(names)) and exact.forwards == 4 * (1 + 4 * len(names))
    assert found.forwards <= exact.forwards / 3
    pairs = [(found.errors[name][label], exact.errors[name][label]) for name in names for label in OPTIONS]
    assert spearmanr(*zip(*pairs, strict=True)).statistic > 0.9
    again = masked(model, formats(model), names, parts)
    assert again.errors == found.errors
    assert masked(model, formats(model), names, parts, seed=1).errors != found.errors


def test_a_layer_that_the_prediction_does_not_depend_on_has_no_sensitivity():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.used, self.faint, self.spare = nn.Linear(16, 16), nn.Linear(16, 16), nn.Linear(16, 16)

        def forward(self, x):
            return self.used(x) + 1e-3 * self.faint(x)

    model = Two()
    calls = recorded(model, *[(normal(4, 16, seed=seed),) for seed in range(4)])
    found = masked(model, formats(model), ["used", "faint", "spare"], parts_of(calls, 4, 2)).errors
    assert found["spare"] == dict.fromkeys(OPTIONS, 0.0)
    assert 0 < found["faint"]["w4"] < 1e-5 * found["used"]["w4"]


def test_rounding_of_inputs_counts():
    """With weights that are whole numbers of a grid, nothing but the inputs is rounded."""
    model, calls = one_layer()
    with torch.no_grad():
        weight = torch.randint(-7, 8, (64, 96), generator=torch.Generator().manual_seed(0)).float()
        weight[:, 0] = 7
        model[0].weight.copy_(weight / 7)
    own = layer_errors(model, formats(model, {"w4": {"weight_bits": 4}}), ["0"], list(calls.batches(1)))["0"]["w4"]
    energy = float(model[0].weight.detach().square().sum())
    assert own["weights"] / energy == pytest.approx(own["outputs"], rel=1e-3) and own["outputs"] > 1e-6


def test_parts_share_out_tuples_of_all_times(unet):
    calls = unet_calls(unet())
    parts = parts_of(calls, 8, 3)
    assert [sum(map(len, part)) for part in parts] == [3, 3, 2]
    assert all(
        float(torch.cat([b.time for b in part]).max() - torch.cat([b.time for b in part]).min()) > 0.3
        for part in parts
    )
    assert len(parts_of(calls, 2, 4)) == 2


def test_noise_takes_the_place_of_samples_and_of_nothing_else(unet):
    model = unet()
    calls = unet_calls(model)
    noise = noised(calls, seed=3)
    assert len(noise) == len(calls) and torch.equal(noise.timestep, calls.timestep)
    for k in range(len(calls)):
        was, now = calls[k].call(), noise[k].call()
        assert now.args[0].shape == was.args[0].shape and not torch.equal(now.args[0], was.args[0])
        assert now.args[1:] == was.args[1:] and now.kwargs == was.kwargs
    together = torch.cat([noise[k].call().args[0].flatten() for k in range(len(noise))])
    assert abs(float(together.mean())) < 0.05 and float(together.std()) == pytest.approx(1, abs=0.05)
    assert torch.equal(noised(calls, seed=3)[2].call().args[0], noise[2].call().args[0])
