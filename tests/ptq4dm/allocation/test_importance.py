"""Rows by importance: scores against their closed forms, the choice at a fixed average width, and the recipe."""

from dataclasses import replace

import pytest
import torch
from torch import nn

import ptq4dm
from helpers import distance, normal, same
from ptq4dm import PTQ4DMConfig, RTNConfig, UserError
from ptq4dm.allocation.importance import IMPORTANCE, RowTask
from ptq4dm.allocation.mixed_rows import chosen_rows, important_rows
from ptq4dm.calibration.record import replay
from ptq4dm.layers.plan import Int4Plan, LayerPlan
from ptq4dm.layers.row_mix import RowMixPlan
from ptq4dm.layers.view import find_layers
from ptq4dm.quantization.planning import make_plan

pytestmark = pytest.mark.usefixtures("one_thread")
FOUR = {"weight_bits": 4, "activations": "dynamic"}


def linear_task(bits=3, dtype=torch.float32, calls=5):
    """A Linear, and calls of it."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(24, 9)).to(dtype)
    inputs = [normal(4, 24, seed=seed, dtype=dtype) for seed in range(calls)]
    with ptq4dm.record(model) as recorded, torch.no_grad():
        for x in inputs:
            model(x)
    return RowTask(model, find_layers(model), bits, calls=recorded), inputs


def mixed_model():
    """Layers whose rows differ in width, one of them a grouped convolution."""
    torch.manual_seed(0)
    shape = nn.Conv2d(8, 12, 3, padding=1), nn.Conv2d(12, 12, 3, padding=1, groups=3), nn.Conv2d(12, 20, 1)
    return nn.Sequential(*shape, nn.Flatten(), nn.Linear(20 * 16, 7))


def calls_of(model, count=4):
    with ptq4dm.record(model) as recorded, torch.no_grad():
        for seed in range(count):
            model(normal(2, 8, 4, 4, seed=seed))
    return recorded


@pytest.mark.parametrize("importance, mean", [("integrated", 9 / 16), ("endpoint", 1.0)])
def test_the_attribution_of_a_linear_model(importance, mean):
    """L at W + t d is t^2 |x d|^2 over the mean square of the output, so row n has 2 mean(t) |x d_n|^2 of it."""
    task, inputs = linear_task()
    (found,) = IMPORTANCE[importance](task).values()
    layer, error = task.model[0], task.errors["0"].double()
    expected = sum(
        2 * mean * (x.double() @ error.T).square().sum(0) / layer(x).double().square().mean() for x in inputs
    )
    assert distance(found, expected) < 1e-5


def test_the_gradient_score_of_a_linear_model():
    task, inputs = linear_task()
    (found,) = IMPORTANCE["gradient"](task).values()
    expected = 0
    for number, x in enumerate(inputs):
        drawn = torch.randn(4, 9, generator=torch.Generator().manual_seed(number))
        expected = expected + (drawn * (x @ task.weights["0"].T)).sum(0).abs()
    assert distance(found, expected) < 1e-5


def test_the_gauss_newton_score_of_a_linear_model_is_the_error_of_its_output():
    """E <r, x d_n>^2 over directions r is |x d_n|^2: all of the output's error, row by row."""
    task, inputs = linear_task(calls=2)
    error = task.errors["0"].double()
    exact = sum((x.double() @ error.T).square().sum(0) for x in inputs)
    draws = [IMPORTANCE["gauss-newton"](replace(task, seed=seed))["0"] for seed in range(300)]
    assert distance(sum(draws) / len(draws), exact) < 0.1
    drawn = [torch.randn(4, 9, generator=torch.Generator().manual_seed(number)).double() for number in range(2)]
    first = sum(((r * (x.double() @ error.T)).sum(0)) ** 2 for r, x in zip(drawn, inputs, strict=True))
    assert distance(draws[0], first) < 1e-5


def test_the_fisher_score_of_a_linear_model():
    """mean (eps - e)^2 with e = eps + |eps| r has the gradient -2 |eps| r / size, and that times x d_n is the score's
    first order."""
    task, inputs = linear_task()
    (found,) = IMPORTANCE["fisher"](task).values()
    expected = 0
    for number, x in enumerate(inputs):
        samples = task.model(x).double()
        drawn = torch.randn(4, 9, generator=torch.Generator().manual_seed(number)).double()
        slope = -2 * samples.square().mean().sqrt() * drawn / samples.numel()
        first = (slope * (x.double() @ task.errors["0"].double().T)).sum(0)
        expected = expected + (first + first**2 / 2).abs()
    assert distance(found, expected) < 1e-5


def test_errors_are_those_of_the_format_that_rows_have_else():
    """Of a convolution in groups of channels, whatever the order of its flattened weight."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(64, 6, 3), nn.Conv2d(6, 3, 1))
    views = find_layers(model)
    narrow = {"0": Int4Plan(group_size=32, affine=True, rounding="gptq", objective="output"), "1": Int4Plan()}
    found = RowTask(model, views, 4, narrow=narrow).errors
    groups = model[0].weight.detach().permute(0, 2, 3, 1).reshape(-1, 32)
    low, high = groups.amin(1, keepdim=True).clamp(max=0), groups.amax(1, keepdim=True).clamp(min=0)
    step = (high - low) / 15
    rounded = ((groups / step).round() + (-low / step).round()).clamp(0, 15) - (-low / step).round()
    expected = (rounded * step - groups).view(6, 3, 3, 64).permute(0, 3, 1, 2)
    assert 0.8 < found["0"].norm() / expected.norm() < 1  # clipped by least squared error, for nothing feeds it
    rows = model[1].weight.detach().flatten(1)
    step = rows.abs().amax(1, keepdim=True) / 7
    assert distance(found["1"].flatten(1), (rows / step).round() * step - rows) < 1e-5


@pytest.mark.parametrize("importance", IMPORTANCE)
def test_the_model_stays_as_it_is(importance, unet):
    model = unet()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    model.train()
    next(model.parameters()).requires_grad_(False)
    wants = [parameter.requires_grad for parameter in model.parameters()]
    with ptq4dm.record(model) as calls, torch.no_grad():
        model(normal(2, 3, 8, 8), 10)
        model(normal(2, 3, 8, 8, seed=1), 700)
    task = RowTask(model, find_layers(model), 4, calls=calls)
    with torch.no_grad():
        scores = IMPORTANCE[importance](task)
    assert same(before, model) and model.training
    assert [parameter.requires_grad for parameter in model.parameters()] == wants
    assert all(parameter.grad is None for parameter in model.parameters())
    assert all(len(scores[view.name]) == len(view.weight) for view in task.views)
    again = IMPORTANCE[importance](task)
    assert all(torch.equal(scores[name], again[name]) for name in scores)


def test_scores_of_sixteen_bits_are_those_of_float32():
    exact, half = (
        IMPORTANCE["integrated"](linear_task(dtype=dtype)[0])["0"] for dtype in (torch.float32, torch.half)
    )
    assert distance(half, exact) < 0.05


def test_a_layer_that_calls_never_reach_scores_nothing():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.used, self.spare = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x):
            return self.used(x)

    model = Two()
    with ptq4dm.record(model) as calls:
        model(normal(3, 4))
    scores = IMPORTANCE["integrated"](RowTask(model, find_layers(model), 4, calls=calls))
    assert not scores["spare"].any() and scores["used"].all()


@pytest.mark.parametrize("average", [4.01, 4.5, 5.7, 7.99])
def test_the_average_width_is_reached_within_a_row(average):
    generator = torch.Generator().manual_seed(0)
    inputs = {"a": 30, "b": 7, "c": 100}
    scores = {name: torch.rand(50, generator=generator) * size for name, size in inputs.items()}
    rows = chosen_rows(scores, inputs, 4, average)
    bits = sum(4 * 50 * size + 4 * len(rows[name]) * size for name, size in inputs.items())
    weights = 50 * sum(inputs.values())
    assert average - 4 * 100 / weights < bits / weights <= average
    per_weight = {name: score / inputs[name] for name, score in scores.items()}
    least = min(float(per_weight[name][row]) for name in rows for row in rows[name])
    left = [float(per_weight[n][row]) for n in rows for row in range(50) if row not in rows[n]]
    assert least >= max(left) and all(found == sorted(found) for found in rows.values())


def test_ties_go_to_the_rows_that_come_first():
    rows = chosen_rows({"a": torch.zeros(4), "b": torch.zeros(4)}, {"a": 5, "b": 5}, 4, 6.5)
    assert rows == {"a": [0, 1, 2, 3], "b": [0]}


def test_rows_at_random_differ_by_seed():
    first, second, again = (RowTask(mixed_model(), find_layers(mixed_model()), 4, seed=seed) for seed in (0, 1, 0))
    chosen = [important_rows(task, "random", 5) for task in (first, second, again)]
    assert chosen[0] == chosen[2] != chosen[1]


def test_the_recipe_makes_layers_of_one_and_of_two_widths():
    model = mixed_model()
    store = calls_of(model)
    plan = make_plan(model, RTNConfig(average_bits=5.0, importance="magnitude", **FOUR))
    assert type(plan.layers["1"]) is Int4Plan  # a grouped convolution stays narrow, and is counted
    total = sum(view.weight.numel() for view in find_layers(model))
    bits = 0
    for view in find_layers(model):
        choice, size = plan.layers[view.name], view.weight.shape[1]
        wide = len(choice.wide) if isinstance(choice, RowMixPlan) else len(view.weight) * (type(choice) is LayerPlan)
        bits += 4 * view.weight.numel() + 4 * wide * size
    assert 5.0 - 4 * 320 / total < bits / total <= 5.0
    ptq4dm.quantize(model, RTNConfig(average_bits=7.9, importance="integrated", **FOUR), store)
    assert {type(layer.plan).__name__ for layer in model if hasattr(layer, "plan")} >= {"Int4Plan", "LayerPlan"}


def test_more_average_bits_are_less_error():
    model, errors = mixed_model(), []
    calls = calls_of(model)
    exact = replay(model, calls)
    for average in (None, 4.7, 6.0):
        quantized = mixed_model()
        ptq4dm.quantize(quantized, PTQ4DMConfig(average_bits=average, rounding="gptq", **FOUR), calls)
        errors.append(distance(replay(quantized, calls), exact))
    assert errors[0] > 1.05 * errors[1] and errors[1] > 1.1 * errors[2]


@pytest.mark.parametrize(
    "options, words",
    [
        ({"average_bits": 5.0}, "average_bits is a choice of weights in 4 bits"),
        (
            {"weight_bits": 4, "group_size": 64, "average_bits": 5.0},
            "one scale an output; give group_size=None with it",
        ),
        ({"weight_bits": 4, "affine": True, "average_bits": 5.0}, "one scale an output; give affine=False with it"),
        ({"weight_bits": 4, "average_bits": 4.0}, r"between weight_bits \(4\) and 8; got 4"),
        ({"weight_bits": 3, "average_bits": 8.0}, r"between weight_bits \(3\) and 8; got 8"),
        (
            {"weight_bits": 4, "importance": "size"},
            "importance 'size' is unknown; choose from endpoint, fisher",
        ),
    ],
)
def test_wrong_options(options, words):
    with pytest.raises(UserError, match=words):
        RTNConfig(activations="dynamic", **options)


def test_scores_that_look_at_calls_need_a_store():
    with pytest.raises(UserError, match="needs calibration: pass a store"):
        ptq4dm.quantize(mixed_model(), RTNConfig(average_bits=5.0, **FOUR))


def test_models_without_gradients_and_without_numbers_are_refused():
    class Frozen(nn.Sequential):
        @torch.no_grad()
        def forward(self, x):
            return super().forward(x)

    model = Frozen(nn.Linear(8, 8))
    with ptq4dm.record(model) as calls:
        model(normal(2, 8))
    with pytest.raises(UserError, match="Frozen gives no gradients; choose another importance"):
        IMPORTANCE["integrated"](RowTask(model.train(), find_layers(model), 4, calls=calls))
    assert model.training
    task, _ = linear_task()
    with torch.no_grad():
        task.model[0].bias.fill_(float("nan"))
    with pytest.raises(UserError, match="NaN or infinite"):
        important_rows(task, "integrated", 5.0)


def test_rows_are_not_chosen_while_weights_arrive(unet, tmp_path):
    """A ranking looks at all layers at once; a plan that has one already can be followed."""
    model = unet()
    model.save_pretrained(tmp_path)
    recipe = RTNConfig(average_bits=5.0, importance="magnitude", **FOUR)
    with pytest.raises(UserError, match="quantize"):
        type(model).from_pretrained(tmp_path, quantization_config=recipe)
    ptq4dm.quantize(model, recipe)
    followed = RTNConfig(average_bits=5.0, plan=ptq4dm.quantization_config(model).plan, **FOUR)
    loaded = type(model).from_pretrained(tmp_path, quantization_config=followed)
    assert same(loaded, model)
