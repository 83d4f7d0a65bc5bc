"""MixLLM: which rows get 8 bits and what that does, its format, report and picture, wrong options."""

import copy
from functools import partial

import pytest
import torch
from torch import nn

import denoisers
import ptq4dm
from helpers import distance, normal, same
from ptq4dm import MixLLMConfig, RTNConfig, UserError
from ptq4dm.allocation.salient_rows import chosen_rows
from ptq4dm.calibration.measure import store_of
from ptq4dm.calibration.record import replay
from ptq4dm.layers.plan import Int4Plan
from ptq4dm.layers.row_mix import RowMixPlan
from ptq4dm.quantization.planning import make_plan

pytestmark = pytest.mark.usefixtures("one_thread")
NEAREST = partial(MixLLMConfig, group_size=32, rounding="nearest", clip="none", first_last="same")


class Uneven(nn.Module):
    """Two layers of which the second is scaled down row by row: what its rows' rounding does is known."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(64, 64), nn.Linear(64, 40)
        self.size = torch.logspace(0, -3, 40)

    def forward(self, x):
        return self.second(self.first(x)) * self.size


@pytest.fixture
def uneven():
    model = Uneven()
    with ptq4dm.record(model) as calls, torch.no_grad():
        for seed in range(24):
            model(normal(4, 64, seed=seed))
    return model, store_of(model, calls)


@pytest.fixture
def dit():
    return denoisers.pair("dit")[0]


def layers(model):
    return {name: module for name, module in model.named_modules() if hasattr(module, "plan")}


def error(model, config, store):
    quantized = copy.deepcopy(model)
    ptq4dm.quantize(quantized, config, store)
    return distance(replay(quantized, store.recorded()), replay(model, store.recorded())) ** 2


@pytest.mark.parametrize("importance", ["gauss-newton", "fisher"])
def test_rows_that_matter_get_eight_bits(uneven, importance):
    model, store = uneven
    plan = make_plan(model, NEAREST(rows=0.25, importance=importance, num_tuples=24), store)
    wide = plan.layers["second"].wide
    assert set(range(5)) <= set(wide) and max(wide) < 20  # outputs that are scaled down the least
    assert len(wide) + len(getattr(plan.layers["first"], "wide", [])) == 26  # of 104


@pytest.mark.parametrize("rounding, clip", [("nearest", "none"), ("gptq", "output")])
def test_eight_bits_where_they_matter_are_less_error_than_elsewhere(uneven, rounding, clip):
    model, store = uneven
    recipe = partial(NEAREST, num_tuples=24, rounding=rounding, clip=clip)
    plain, chosen = error(model, recipe(rows=0.0), store), error(model, recipe(rows=0.25), store)
    draws = [error(model, recipe(plan=dealt_out(model, recipe(rows=0.25), store, seed)), store) for seed in range(5)]
    assert chosen < 0.75 * plain and chosen < min(draws)
    assert plain - sum(draws) / 5 < 0.5 * (plain - chosen)


def dealt_out(model, config, store, seed):
    """The plan of a recipe with as many rows of 8 bits in each layer, but others."""
    plan, draw = make_plan(model, config, store), torch.Generator().manual_seed(seed)
    for name, choice in plan.layers.items():
        if isinstance(choice, RowMixPlan):
            order = torch.randperm(len(model.get_submodule(name).weight), generator=draw)
            choice.wide = sorted(order[: len(choice.wide)].tolist())
    return plan


def test_scores_predict_the_error_that_is_left(uneven):
    """Nearest codes, exact inputs but for 8 bits: the sum of scores is |J d|^2, within what draws leave open."""
    model, store = uneven
    config = NEAREST(rows=0.25, num_tuples=24)
    make_plan(model, config, store)
    square = replay(model, store.recorded()).square().sum()
    predicted = sum(float(score.sum()) for score in config.outcome.salience.total.values())
    assert error(model, NEAREST(rows=0.0), store) * float(square) == pytest.approx(predicted, rel=0.6)
    assert 0 < config.outcome.error_left < 0.6


def test_without_rows_it_is_the_same_format(dit):
    other = copy.deepcopy(dit)
    ptq4dm.quantize(dit, MixLLMConfig(rows=0.0, group_size=32, rounding="nearest", clip="none"))
    ptq4dm.quantize(
        other, RTNConfig(weight_bits=4, group_size=32, affine=True, activations="dynamic", first_last="keep")
    )
    assert same(dit, other) and {type(one.plan) for one in layers(dit).values()} == {Int4Plan}
    assert type(dit.pos_embed.proj) is nn.Conv2d


def test_with_all_rows_layers_have_eight_bits():
    model = Uneven()
    ptq4dm.quantize(model, MixLLMConfig(rows=1.0, rounding="nearest", clip="none"))
    assert {str(one.plan) for one in layers(model).values()} == {"W8A8 dynamic"}


def test_convolutions_and_odd_widths(tmp_path, unet):
    """Layers that do not divide have one scale a row; the model saves, loads and follows its plan to the bit."""
    model = unet()
    with ptq4dm.record(model) as calls, torch.no_grad():
        for seed in range(6):
            model(normal(1, 3, 8, 8, seed=seed), 150 * seed)
    exact, config = copy.deepcopy(model), MixLLMConfig(group_size=32, rows=0.3, num_tuples=6)
    report = ptq4dm.quantize(model, config, calls)
    plans = {name: layer.plan for name, layer in layers(model).items()}
    mixed = {name: plan for name, plan in plans.items() if isinstance(plan, RowMixPlan)}
    assert mixed and any(model.get_submodule(name).weight.ndim == 4 for name in mixed)
    assert all(
        plan.affine and plan.rounding == "gptq" and plan.objective == "output-checked" for plan in mixed.values()
    )
    total = chosen_rows(config.outcome.salience.total, 0.3)
    assert {name: rows for name, rows in total.items() if rows} == {
        name: getattr(plan, "wide", None) or list(range(len(exact.get_submodule(name).weight)))
        for name, plan in plans.items()
        if name in total and total[name]
    }
    assert report.found[""]["types"] == config.outcome.shares() and "rows of 8 bits: " in report.table()
    told = report.to_dict()["found"][""]
    assert told["share"] == 0.3 and told["bits"] == 4 + 4 * told["weights"]
    sizes = {name: exact.get_submodule(name).weight for name in total}
    inside = sum(len(rows) * sizes[name][0].numel() for name, rows in total.items())
    assert told["weights"] == inside / sum(weight.numel() for weight in sizes.values()) > 0.3  # long rows first
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path)
    assert same(model, loaded)
    x = normal(1, 3, 8, 8)
    with torch.no_grad():
        assert torch.equal(model(x, 10).sample, loaded(x, 10).sample)
    again = copy.deepcopy(exact)
    followed = ptq4dm.quantize(again, MixLLMConfig(plan=ptq4dm.quantization_config(model).plan), calls)
    assert same(model, again) and followed.found == {}


def test_the_command_draws_which_rows_matter_when(tmp_path, monkeypatch, capsys):
    from ptq4dm.cli.main import main

    pytest.importorskip("matplotlib")
    monkeypatch.chdir(tmp_path)
    common = ["quantize", "--method", "mixllm", "--model", "dit-cifar10", "--plot", "rows.png", "--output", "q"]
    assert main([*common, "--rows", "0"]) == 2
    assert "which no layer of this recipe has" in capsys.readouterr().err
    assert main([*common, "--plot-layer", "conv_in"]) == 2
    assert "of all layers; leave --plot-layer out" in capsys.readouterr().err


@pytest.mark.parametrize(
    "options, words",
    [
        ({"rows": 1.5}, "rows must be"),
        ({"rows": -0.1}, "rows must be"),
        ({"group_size": None}, "group_size must be one of 32, 64, 128; got None"),
        ({"affine": False}, "affine is no choice of MixLLMConfig, which has True"),
        ({"average_bits": 4.5}, "average_bits is no choice of MixLLMConfig"),
        ({"clip": "lp"}, "clip must be"),
        ({"importance": "size"}, "importance 'size' is unknown"),
        ({"rows": 0.0, "importance": "fisher"}, "give rows between 0 and 1 too, or leave it out"),
        ({"format": "fp8"}, "format is no choice of MixLLMConfig, which has 'int8'"),
        ({"time_bins": 0}, "time_bins must be"),
    ],
    ids=str,
)
def test_wrong_options(options, words):
    with pytest.raises(UserError, match=words):
        MixLLMConfig(**options)


def test_it_needs_calibration_and_says_so():
    with pytest.raises(UserError, match="MixLLMConfig needs calibration"):
        ptq4dm.quantize(Uneven(), MixLLMConfig())
    with pytest.raises(UserError, match="MixLLM has no layer to choose rows from"):
        model = nn.Sequential(nn.Conv2d(8, 8, 3, groups=2))
        with ptq4dm.record(model) as calls:
            model(normal(2, 8, 4, 4))
        ptq4dm.quantize(model, MixLLMConfig(rounding="nearest", clip="none", rows=0.5), calls)
