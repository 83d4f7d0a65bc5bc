"""The prediction difference: through the whole model, skips included; what is over need not run again."""

import copy

import pytest
import torch
from diffusers import DDIMScheduler, DDPMPipeline
from torch import nn

import ptq4dm
from helpers import normal, same
from models import InPlace, pixel_dit, plain_unet
from ptq4dm import PDQuantConfig, PTQ4DMConfig, UserError
from ptq4dm.calibration.measure import store_of
from ptq4dm.calibration.record import record
from ptq4dm.layers.plan import LayerPlan, Plan
from ptq4dm.layers.view import find_layers
from ptq4dm.quantization.planning import make_plan
from ptq4dm.ranges.inputs import InputValues
from ptq4dm.ranges.prediction import Prediction, starts_of
from ptq4dm.reconstruction.prediction import PredictionDifference, batches_across
from ptq4dm.walk import walk

pytestmark = pytest.mark.usefixtures("one_thread")

NARROW = {"activation_bits": 4, "num_tuples": 4}


class Skip(nn.Module):
    """`side` reaches the output over a skip alone, past `body`, and large values of it do not: they are cut off."""

    config = {}

    def __init__(self, skip=1.0):
        super().__init__()
        self.before, self.side, self.body = (nn.Linear(8, 8, bias=False) for _ in range(3))
        self.skip = skip
        with torch.no_grad():
            self.before.weight.copy_(torch.eye(8))
            self.side.weight.copy_(torch.eye(8))

    def forward(self, x, timestep=None):
        x = self.before(x)
        side = self.side(x).clamp(-0.5, 0.5)
        return self.body(x) + self.skip * side


def recorded(model, calls=4):
    """(model, store) of a few calls with inputs of small values and a few large ones."""
    model.eval()
    with record(model) as seen, torch.no_grad():
        for seed in range(calls):
            x = normal(32, 8, seed=seed, scale=0.3)
            x[::16] *= 20
            model(x, timestep=torch.tensor(seed))
    return model, store_of(model, seen)


def collected(model):
    """(model, store) of a denoiser's own calls."""
    is_dit = hasattr(model, "transformer_blocks")
    pipe = (
        ptq4dm.PixelDiTPipeline(transformer=model, scheduler=DDIMScheduler())
        if is_dit
        else DDPMPipeline(model, DDIMScheduler())
    )
    pipe.set_progress_bar_config(disable=True)
    return model, ptq4dm.collect(pipe, ptq4dm.CalibrationConfig("solver", 4, 3, batch_size=4))


def busy(model):
    """Weights that are not zero: a fresh DiT answers zero."""
    with torch.no_grad():
        for seed, parameter in enumerate(model.parameters()):
            parameter.add_(normal(*parameter.shape, seed=seed, scale=0.1))
    return model


def shallow_unet():
    """A UNet with its skips and nothing in the middle."""
    return plain_unet(mid_block_type=None)


def grids(plan):
    return {name: (layer.input_scale, layer.input_zero_point) for name, layer in plan.layers.items()}


def values_of(store, name, bits=4):
    return InputValues(*store.input_of(name), bits, False)


# ------------------------------------------------------------------------------------------------ skips


def test_a_layer_that_reaches_the_output_over_a_skip_is_judged_by_it():
    found = {}
    for skip in (1.0, 0.0):
        torch.manual_seed(0)
        model, store = recorded(Skip(skip))
        difference = PredictionDifference(model, batches_across(store.recorded(), 4))
        inputs = values_of(store, "side")
        found[skip] = Prediction.input(inputs, None, difference.of("side", LayerPlan(activation_bits=4)))
    mse = starts_of(inputs)[0]
    assert found[0.0] == mse  # cut off, nothing hangs on it
    assert found[1.0][0] < 0.5 * mse[0]  # large values do not matter to the prediction, so steps are finer


def test_what_follows_is_no_list_of_modules():
    """A suffix run one module after the other would feed `body` with what `side` gives, and choose something else."""
    torch.manual_seed(0)
    model, store = recorded(Skip())
    inputs = values_of(store, "side")
    batches = batches_across(store.recorded(), 4)
    x = torch.cat([batch.call().args[0] for batch in batches])

    def flat(scale, zero):
        with torch.no_grad():
            return float(model.body(model.side(inputs.rounded(x, scale, zero) - x)).square().sum())

    evidence = PredictionDifference(model, batches).of("side", LayerPlan(activation_bits=4))
    whole = Prediction.input(inputs, None, evidence)
    evidence.prediction = flat
    assert whole[0] < 0.5 * Prediction.input(inputs, None, evidence)[0]


def test_the_prediction_error_is_that_of_the_packed_model():
    """With all layers settled it is the error that the quantized model has, on the same calls."""
    model, store = recorded(Skip())
    plan = make_plan(model, PDQuantConfig(**NARROW, first_last="same"), store)
    batches = batches_across(store.recorded(), 4)
    difference, last = PredictionDifference(model, batches), None
    for view in difference.in_call_order(find_layers(model)):
        difference.of(view.name, plan.layers[view.name])
        last = difference.settle(view.name, plan.layers[view.name])
    exact = copy.deepcopy(model)
    ptq4dm.quantize(model, PDQuantConfig(plan=plan), store)
    with torch.no_grad():
        pairs = [(exact(*call.args, **call.kwargs), model(*call.args, **call.kwargs)) for call in _calls(batches)]
    wrong = sum(float((a - b).double().square().sum()) for a, b in pairs)
    assert last == pytest.approx(wrong / sum(float(a.double().square().sum()) for a, _ in pairs), rel=1e-5)


def _calls(batches):
    return [batch.call() for batch in batches]


# ------------------------------------------------------------------------------------------------ what is over


@pytest.mark.parametrize("build", [shallow_unet, lambda: busy(pixel_dit()), InPlace], ids=["unet", "dit", "in place"])
def test_what_is_over_is_not_run_again_and_changes_nothing(build, few_looks, monkeypatch):
    torch.manual_seed(0)
    model = build()
    model, store = recorded(model) if isinstance(model, InPlace) else collected(model)
    plans = []
    for kept in (walk.HOST_BYTES, 0):
        monkeypatch.setattr(walk, "HOST_BYTES", kept)
        plans.append(make_plan(model, PDQuantConfig(weight_bits=4, **NARROW), store))
    assert plans[0] == plans[1] and all(layer.static for layer in plans[0].layers.values())
    assert not any("forward" in vars(module) or module._forward_hooks for module in model.modules())


def test_looks_at_the_last_layer_run_hardly_any_other(monkeypatch):
    model, store = collected(plain_unet())
    batches, ran = batches_across(store.recorded(), 4), []
    forward = nn.Conv2d.forward

    def counted(self, x):
        ran.append(self)
        return forward(self, x)

    monkeypatch.setattr(nn.Conv2d, "forward", counted)
    looks = []
    for kept in (walk.HOST_BYTES, 0):
        monkeypatch.setattr(walk, "HOST_BYTES", kept)
        evidence = PredictionDifference(model, batches).of("conv_out", LayerPlan())
        ran.clear()
        looks.append((evidence.prediction(0.05, 0), len(ran)))
    (error, few), (same_error, many) = looks
    assert error == same_error > 0 and few == 0 and many > 10


# ------------------------------------------------------------------------------------------------ the recipe


def test_layers_are_settled_in_the_order_of_their_calls(few_looks, monkeypatch):
    model, store = collected(plain_unet())
    order, settle = [], PredictionDifference.settle

    def noted(self, name, plan):
        assert list(self.settled) == order
        order.append(name)
        return settle(self, name, plan)

    monkeypatch.setattr(PredictionDifference, "settle", noted)
    plan = make_plan(model, PDQuantConfig(**NARROW), store)
    first = {part: next(i for i, name in enumerate(order) if name.startswith(part)) for part in ("mid", "up", "down")}
    assert first["down"] < first["mid"] < first["up"] and order[-1] == "conv_out"
    registered = [view.name for view in find_layers(model)]
    assert registered != order and list(plan.layers) == registered


def test_two_runs_and_both_recipes_choose_the_same(few_looks):
    model, store = collected(shallow_unet())
    weights = copy.deepcopy(model.state_dict())
    config = PDQuantConfig(weight_bits=4, **NARROW)
    one, two = make_plan(model, config, store), make_plan(model, config, store)
    other = make_plan(model, PTQ4DMConfig(weight_bits=4, objective="prediction", **NARROW), store)
    assert one == two and one.layers == other.layers and one.method == "pdquant"
    assert grids(one) != grids(make_plan(model, PTQ4DMConfig(weight_bits=4, objective="mse", **NARROW), store))
    assert same(weights, model.state_dict())


def test_weights_are_rounded_as_by_mse_and_the_plan_is_followed_without_a_store(few_looks):
    model, store = collected(shallow_unet())
    found = {}
    for name, config in {"pd": PDQuantConfig(**NARROW), "mse": PTQ4DMConfig(objective="mse", **NARROW)}.items():
        found[name] = copy.deepcopy(model)
        ptq4dm.quantize(found[name], config, store)
    codes = {name: {k: v for k, v in one.state_dict().items() if "input_" not in k} for name, one in found.items()}
    assert same(codes["pd"], codes["mse"])
    plan = ptq4dm.quantization_config(found["pd"]).plan
    follows = PDQuantConfig(plan=plan)
    ptq4dm.quantize(again := copy.deepcopy(model), follows)
    assert same(again, found["pd"]) and follows.packs_while_loading


@pytest.mark.parametrize("config", [{}, {"symmetric": True}, {"first_last": "keep"}, {"rounding": "learned"}])
def test_options_go_together_with_it(config, few_looks):
    model, store = collected(busy(pixel_dit()))
    plan = make_plan(model, PDQuantConfig(weight_bits=4, **NARROW, **config), store)
    edges = {"pos_embed.proj", "proj_out_2"}
    assert edges.isdisjoint(plan.layers) == (config.get("first_last") == "keep")
    assert all(layer.static and (layer.input_zero_point == 0 or not config.get("symmetric"))
               for layer in plan.layers.values())  # fmt: skip
    assert {layer.rounding for layer in plan.layers.values()} == {config.get("rounding", "nearest")}


def test_where_there_is_nothing_to_choose_it_is_refused():
    nothing = "activations='dynamic' leaves no input range"
    for rounding in ("nearest", "gptq"):
        with pytest.raises(UserError, match=f"{nothing}.*rounding='{rounding}' trains no block"):
            PDQuantConfig(rounding=rounding, activations="dynamic")
    for rounding in ("nearest", "gptq", "learned"):  # fp8 has no range to choose, and no gradient
        with pytest.raises(UserError, match="format is no choice of PDQuantConfig.*take a method.*ptq4dm"):
            PDQuantConfig(rounding=rounding, format="fp8")
    plan = Plan("pdquant", {"layer": LayerPlan()})
    for options in ({"activations": "dynamic"}, {"format": "fp8"}):
        assert PDQuantConfig(plan=plan, **options).plan is plan  # options tell how it was made


def test_a_store_is_asked_for_in_a_sentence():
    config = PDQuantConfig()
    with pytest.raises(
        UserError, match="PDQuantConfig needs calibration.*what it chooses.*would leave nothing of it"
    ):
        make_plan(plain_unet(), config)
    assert not config.packs_while_loading and config.needs_calibration


def test_layers_that_are_never_called_stay_dynamic():
    model, store = recorded(Skip())
    idle = Skip()
    idle.idle = nn.Linear(8, 8)
    idle, store = recorded(idle)
    plan = make_plan(idle, PDQuantConfig(**NARROW), store)
    assert not plan.layers["idle"].static and plan.layers["side"].static


def test_a_grid_that_is_clearly_worse_is_not_looked_at_on_all_tuples():
    model, store = recorded(Skip(), calls=20)
    batches = batches_across(store.recorded(), 20)
    difference = PredictionDifference(model, batches)
    evidence = difference.of("side", LayerPlan(activation_bits=4))
    good, bad = (0.1, 0), (5.0, 0)
    least, runs = evidence.prediction(*good), []
    handle = model.register_forward_pre_hook(lambda *_: runs.append(1))
    worse = evidence.prediction(*bad)
    handle.remove()
    assert worse > 1.05 * least and len(runs) == 1 < len(batches)
    assert evidence.prediction(*good) == least and len(runs) == 1  # looks are remembered


def test_batches_have_tuples_of_all_times():
    _, store = collected(plain_unet())
    calls = ptq4dm.calibration.calls.Calls.together([store.recorded()] * 5)
    parts = batches_across(calls, 17)
    assert [len(part) for part in parts] == [6, 6, 5]
    units = torch.linspace(0, 19, 17).round().long()
    assert (
        torch.cat([part.places for part in parts]).tolist()
        == torch.cat([calls[units[k::3]].places for k in range(3)]).tolist()
    )


def test_layers_that_are_asked_for_in_any_order_are_judged_the_same():
    model, store = collected(busy(pixel_dit(num_layers=2)))
    batches = batches_across(store.recorded(), 4)
    first, last = (f"transformer_blocks.{block}.ff.net.2" for block in (0, 1))
    plan = LayerPlan(activation_bits=4, input_scale=0.1, input_zero_point=0)
    going_on = PredictionDifference(model, batches)
    error_of_first = going_on.of(first, plan).prediction(0.1, 0)
    going_on.settle(first, plan)
    there = going_on.of(last, plan).prediction(0.1, 0)
    back = PredictionDifference(model, batches)
    alone = back.of(last, plan).prediction(0.1, 0)
    assert back.of(first, plan).prediction(0.1, 0) == error_of_first  # the walk has passed it
    back.settle(first, plan)
    assert back.of(last, plan).prediction(0.1, 0) == there != alone
