"""Learned rounding of one layer, and the options of training."""

import pytest
import torch

import ptq4dm
from helpers import normal
from ptq4dm.errors import UserError
from ptq4dm.evidence import LayerEvidence
from ptq4dm.ranges.weights import weight_grid
from ptq4dm.rounding.learned import Learning, learned, learning_from

pytestmark = pytest.mark.usefixtures("one_thread")


def test_rows_that_hold_nan_are_a_sentence():
    weight = normal(4, 96)
    with pytest.raises(UserError, match="NaN or infinity"):
        learned(weight, weight_grid(weight, 4), LayerEvidence(torch.full((4, 96), float("nan"))))


def test_inputs_of_zeros_leave_codes_nearest():
    weight = normal(4, 96)
    grid = weight_grid(weight, 4)
    assert torch.equal(learned(weight, grid, LayerEvidence(torch.zeros(4, 96))), grid.codes(weight))


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"train": ()}, "train is some of rounding, scales, biases, ranges; got nothing"),
        ({"train": ("weights",)}, "train is some of .*got weights"),
        ({"loss": "x"}, "loss must be one of mse, fisher, cosine, relative; got 'x'"),
        ({"moves": "far"}, "moves must be one of up-down, wide"),
        ({"augmentation": "flip"}, "augmentation must be one of qdrop, noise, none"),
        ({"unit": "model"}, "unit must be one of block, layer"),
        ({"start": "best"}, "start must be one of gptq, nearest"),
        ({"variable": "spline"}, "variable 'spline' is unknown"),
        ({"optimizer": "lion"}, "optimizer 'lion' is unknown"),
        ({"learning_rate": -1.0}, "learning_rate must be above zero; got -1"),
        ({"learning_rate": 0.0}, "learning_rate must be above zero"),
        ({"learning_rate": float("nan")}, "learning_rate"),
        ({"time_weights": (1.0, -1.0)}, "time_weights"),
        ({"time_weights": (0.0, 0.0)}, "one of time_weights must be above zero"),
        ({"steps": 0}, "steps"),
        ({"step_tuples": 0}, "step_tuples"),
        ({"steps": 1.5}, "steps"),
        ({"prediction": -1.0}, "prediction"),
        ({"correction": "yes"}, "correction"),
    ],
)
def test_wrong_options_are_one_sentence(options, says):
    with pytest.raises(UserError, match=says) as error:
        Learning(**options).check()
    assert "\n" not in str(error.value)


def test_options_are_read_from_json():
    one = Learning(train=("ranges",), time_weights=(1.0, 2.0), learning_rate=0.1)
    data = {**vars(one), "train": ["ranges"], "time_weights": [1.0, 2.0]}
    assert learning_from(data) == one
    for wrong in (None, [], {**data, "more": 1}, {**data, "steps": "many"}, {**data, "train": [1]}):
        with pytest.raises(ValueError):
            learning_from(wrong)


def test_a_rate_left_out_is_the_optimizers_own():
    rates = {name: Learning(optimizer=name).rate for name in ("adam", "sgd")}
    assert rates["adam"] != rates["sgd"] and Learning(learning_rate=0.5).rate == 0.5


def test_lists_become_tuples():
    one = Learning(train=["ranges"], time_weights=[1, 2.0])
    one.check()
    assert one == Learning(train=("ranges",), time_weights=(1, 2.0))


@pytest.mark.parametrize(
    ("options", "start", "rate"),
    [
        ({}, "gptq", 1e-3),
        ({"activation_bits": 4}, "nearest", 1e-2),
        ({"activation_bits": 5}, "gptq", 1e-3),
        ({"activation_bits": 4, "start": "gptq"}, "gptq", 1e-3),
        ({"start": "nearest", "variable": "sigmoid"}, "nearest", 0.3),
    ],
)
def test_training_starts_at_nearest_codes_where_inputs_have_few_bits(options, start, rate):
    for kind in (ptq4dm.GradPTQConfig, ptq4dm.PDQuantConfig):
        learning = kind(rounding="learned", **options).learning()
        assert (learning.start, learning.begin) == (start, start) and learning.rate == pytest.approx(rate)
