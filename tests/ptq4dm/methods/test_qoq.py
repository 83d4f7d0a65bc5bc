"""QoQ: its passes and what is left without them, both variants, what is saved, refusals."""

import copy

import pytest
import torch

import denoisers
import ptq4dm
from ptq4dm import PTQ4DMConfig, QoQConfig, RTNConfig, UserError
from ptq4dm.calibration.record import replay
from ptq4dm.quantization.planning import make_plan

pytestmark = pytest.mark.usefixtures("one_thread")

OFF = {"rounding": "nearest", "rotation": "none", "smoothing": "none", "reorder": False, "clip": "none"}
SMALL = {"group_size": 32, "num_tuples": 4}


@pytest.fixture
def dit():
    """(a model in full precision, its store)"""
    return denoisers.pair("dit")


def tensors(model):
    return dict(model.state_dict())


def equal(one, other):
    return one.keys() == other.keys() and all(torch.equal(value, other[name]) for name, value in one.items())


def error(exact, model, store):
    calls = store.recorded()[:4]
    right = replay(exact, calls)
    return float((replay(model, calls) - right).square().sum() / right.square().sum())


@pytest.mark.parametrize("variant", ["group", "channel"])
def test_with_every_pass_off_it_is_round_to_nearest(dit, variant):
    model, other = dit[0], copy.deepcopy(dit[0])
    config = QoQConfig(variant=variant, **OFF, **({"group_size": 32} if variant == "group" else {}))
    assert not config.needs_calibration
    ptq4dm.quantize(model, config)
    grid = {"group_size": 32, "weight_grid": "progressive"} if variant == "group" else {"affine": True}
    ptq4dm.quantize(other, RTNConfig(weight_bits=4, activations="dynamic", **grid))
    assert equal(tensors(model), tensors(other))


def test_each_pass_is_one_that_every_method_can_take(dit):
    """The whole of QoQ, told of another recipe by the slots' own names."""
    model, other = dit[0], copy.deepcopy(dit[0])
    every = {"rounding": "gptq", "rotation": "values", "smoothing": 0.3, "reorder": True, "clip": "output"}
    ptq4dm.quantize(model, QoQConfig(**every, **SMALL), dit[1])
    same = PTQ4DMConfig(
        weight_bits=4, activations="dynamic", weight_grid="progressive", rounding="gptq", objective="output",
        transforms=("smooth:alpha=0.3", "rotate", "reorder"), **SMALL,
    )  # fmt: skip
    ptq4dm.quantize(other, same, dit[1])
    assert equal(tensors(model), tensors(other))
    kinds = [change.kind for change in ptq4dm.quantization_config(model).plan.transforms]
    assert set(kinds) == {"smooth", "rotate", "reorder"}


def test_it_is_better_than_round_to_nearest(dit):
    model, store = dit
    exact, nearest, variants = copy.deepcopy(model), copy.deepcopy(model), {}
    ptq4dm.quantize(nearest, QoQConfig(**OFF, group_size=32))
    for variant in ("group", "channel"):
        variants[variant] = copy.deepcopy(exact)
        config = QoQConfig(variant=variant, num_tuples=4, **({"group_size": 32} if variant == "group" else {}))
        ptq4dm.quantize(variants[variant], config, store)
    assert error(exact, variants["group"], store) < 0.7 * error(exact, nearest, store)
    assert error(exact, variants["group"], store) < error(exact, variants["channel"], store)


def test_inputs_are_turned_where_that_is_better_and_every_method_can_ask_for_it(dit):
    model, store = dit
    other, never = copy.deepcopy(model), copy.deepcopy(model)
    options = {"rounding": "gptq", "smoothing": "none", "reorder": False, "clip": "none"}
    ptq4dm.quantize(model, QoQConfig(rotation="inputs", **options, **SMALL), store)
    grid = {"weight_grid": "progressive", "rotate_inputs": True, "weight_bits": 4, "activations": "dynamic"}
    ptq4dm.quantize(other, RTNConfig(rounding="gptq", **grid, **SMALL), store)
    assert equal(tensors(model), tensors(other))
    plans = ptq4dm.quantization_config(model).plan.layers
    found = {choice.rotation for choice in plans.values() if choice.format == "progressive"}
    assert found == {0, 32}, "some layers are better for it and some are not"
    ptq4dm.quantize(never, QoQConfig(rotation="none", **options, **SMALL), store)
    assert {getattr(c, "rotation", 0) for c in ptq4dm.quantization_config(never).plan.layers.values()} == {0}


def test_smoothing_takes_the_alpha_that_is_given(dit):
    plans = {}
    for alpha in (0.2, 0.3):
        model = copy.deepcopy(dit[0])
        ptq4dm.quantize(model, QoQConfig(**(OFF | {"smoothing": alpha}), **SMALL), dit[1])
        plans[alpha] = ptq4dm.quantization_config(model).plan.transforms
        assert plans[alpha] and all(change.options == {"alpha": alpha} for change in plans[alpha])
    assert any(a != b for a, b in zip(*plans.values(), strict=True))


def test_the_plan_gives_the_same_codes_and_the_saved_model_comes_back_to_the_bit(dit, tmp_path):
    model, again = dit[0], copy.deepcopy(dit[0])
    ptq4dm.quantize(model, QoQConfig(**SMALL), dit[1])
    ptq4dm.quantize(again, QoQConfig(plan=ptq4dm.quantization_config(model).plan), dit[1])
    assert equal(tensors(model), tensors(again))
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path)
    assert equal(tensors(model), tensors(loaded))
    assert ptq4dm.quantization_config(loaded).summary() == {"method": "qoq", **SMALL}


def test_layers_that_do_not_divide_into_groups_have_one(unet):
    model = unet()
    plan = make_plan(model, QoQConfig(**OFF))
    sizes = {(choice.format, getattr(choice, "group_size", None)) for choice in plan.layers.values()}
    assert sizes == {("progressive", None), ("int8", None)}


def test_what_is_left_out_is_what_can_be():
    assert QoQConfig().rotation == "inputs"
    assert QoQConfig(variant="channel").rotation == QoQConfig(activations="static").rotation == "none"
    for config in (QoQConfig(), QoQConfig(variant="channel"), QoQConfig(activations="static", rotation="values")):
        assert ptq4dm.QuantConfig.from_dict(config.to_dict()).to_dict() == config.to_dict()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"variant": "tensor"}, "variant must be one of group, channel"),
        ({"variant": "channel", "group_size": 64}, "one scale an output; leave group_size out"),
        ({"clip": "lp"}, "clip must be one of none, mse, output; got 'lp'"),
        ({"rotation": "all"}, "rotation must be one of inputs, values, none"),
        ({"variant": "channel", "rotation": "inputs"}, "goes with variant='group'"),
        ({"activations": "static", "rotation": "inputs"}, "goes with variant='group' and activations='dynamic'"),
        ({"affine": True}, "follows from variant; leave affine out"),
        ({"weight_grid": "uniform"}, "follows from variant"),
        ({"weight_grid": "power"}, "follows from variant"),
        ({"rotate_inputs": True, "rotation": "none"}, "follows from rotation"),
        ({"smoothing": "search"}, "smoothing must be none or a number"),
        ({"smoothing": 1.5}, "smoothing must be none or a number"),
        ({"group_size": 48}, "group_size must be one of 32, 64, 128 or None; got 48"),
        ({"weight_bits": 8}, "weight_bits is no choice of QoQConfig, which has 4"),
        ({"format": "fp8"}, "format is no choice of QoQConfig, which has 'int8'"),
        ({"transforms": ("smooth:alpha=2",)}, "alpha of 'smooth' is a share from 0 to 1"),
        ({"average_bits": 5.0}, "average_bits is no choice of QoQConfig"),
    ],
    ids=str,
)
def test_wrong_options(options, words):
    with pytest.raises(UserError, match=words):
        QoQConfig(**options)
