"""SplitQuant: weights on the codebook that its formula gives, bytes, files, and the paper's comparison."""

import math
from dataclasses import replace

import pytest
import torch
from torch import nn

import models
import ptq4dm
from helpers import distance, normal, run, same
from ptq4dm import SplitQuantConfig, UserError
from ptq4dm.layers.choices import check_choices, check_fit
from ptq4dm.layers.registry import quantized_copy
from ptq4dm.layers.split.values import ValueSplitPlan
from ptq4dm.layers.stored import check_stored
from ptq4dm.transforms.split_values import clusters, split_in_three

pytestmark = pytest.mark.usefixtures("one_thread")

LAYERS = {
    "linear": (lambda: nn.Linear(37, 11), (3, 5, 37)),
    "linear without bias": (lambda: nn.Linear(64, 5, bias=False), (4, 64)),
    "conv": (lambda: nn.Conv2d(5, 11, 3, padding=1), (2, 5, 6, 7)),
    "grouped conv": (lambda: nn.Conv2d(6, 12, (3, 1), stride=2, groups=3), (2, 6, 7, 6)),
}


def made(name):
    torch.manual_seed(0)
    make, shape = LAYERS[name]
    return make(), normal(*shape)


def scopes(matrix, ids, plan):
    """The weights and clusters of each scope: pairs of rows [1 or N, n]."""
    if plan.scope == "output":
        return list(zip(matrix, ids, strict=True))
    return [(matrix.flatten(), ids.flatten())]


@pytest.mark.parametrize("scope", ["tensor", "output"])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("name", LAYERS)
def test_codes_are_the_nearest_of_their_cluster(name, bits, scope):
    """No weight is farther than half a step of its cluster from what stands for it; steps are the cluster's range."""
    layer, x = made(name)
    plan = ValueSplitPlan(weight_bits=bits, scope=scope)
    quantized = quantized_copy(layer, plan, "layer")
    matrix = layer.weight.detach().flatten(1)
    found = quantized.dequantized_weight().flatten(1)
    ids = clusters(matrix, scope == "output")
    pairs = zip(scopes(matrix, ids, plan), scopes(found, ids, plan), strict=True)
    for (exact, which), (values, _) in pairs:
        for number in range(3):
            own = which == number
            if own.any():
                step = float(exact[own].max() - exact[own].min()) / (2**bits - 1)
                assert (values[own] - exact[own]).abs().max() <= 0.51 * step + 2e-3 * float(exact.abs().max())
                assert values[own].unique().numel() <= 2**bits
    y = quantized(x)
    layer.weight.data = quantized.dequantized_weight()
    assert distance(y, layer(x)) < 1e-6


@pytest.mark.parametrize("name", LAYERS)
def test_the_literal_form_is_the_sum_of_three_rounded_layers(name):
    """Each of them on an affine grid that covers zero, so that zeros stay zeros; in float64, by the formula."""
    layer, _ = made(name)
    plan = ValueSplitPlan(form="literal", scope="output" if isinstance(layer, nn.Conv2d) else "tensor")
    found = quantized_copy(layer, plan, "layer").dequantized_weight()
    total = torch.zeros_like(layer.weight, dtype=torch.float64)
    three = split_in_three(layer)
    for part in (three.lower, three.middle, three.upper):
        weight = part.weight.detach().double().flatten(1)
        rows = weight if plan.scope == "output" else weight.flatten()[None]
        low, high = rows.amin(1).clamp(max=0), rows.amax(1).clamp(min=0)
        step = ((high - low) / 3).to(torch.float16 if plan.scope == "output" else torch.float32).double()[:, None]
        zero = (-low[:, None] / step).round().clamp(0, 3)
        rounded = (((rows / step).round() + zero).clamp(0, 3) - zero) * step
        total += torch.where(rows == 0, 0.0, rounded).view(total.shape)
    assert distance(found, total) < 1e-6


def test_bytes_are_those_that_are_promised():
    """Of 256 outputs of 640 inputs: 3.6 bits, 6 bits, 2 bits, and a few numbers."""
    layer = nn.Linear(640, 256, bias=False)
    sizes = {}
    for label, plan in {
        "codes": ValueSplitPlan(), "literal": ValueSplitPlan(form="literal"), "plain": ValueSplitPlan(clusters=1)
    }.items():  # fmt: skip
        quantized = quantized_copy(layer, plan, "layer")
        sizes[label] = sum(one.nbytes for name, one in quantized.named_parameters() if name != "like")
    weights = 640 * 256 / 8
    assert sizes == {"codes": 3.6 * weights + 24, "literal": 6 * weights + 15, "plain": 2 * weights + 8}


def test_three_clusters_are_finer_than_one():
    """The paper's comparison: at two bits a tensor, split against plain; and codes need not cover zero."""
    layer = nn.Linear(640, 256)
    nn.init.normal_(layer.weight)
    errors = {}
    for label, plan in {
        "codes": ValueSplitPlan(), "literal": ValueSplitPlan(form="literal"), "plain": ValueSplitPlan(clusters=1)
    }.items():  # fmt: skip
        errors[label] = distance(quantized_copy(layer, plan, "layer").dequantized_weight(), layer.weight)
    assert errors["codes"] < 0.8 * errors["literal"] < 0.8 * 0.8 * errors["plain"]


@pytest.mark.parametrize("form", ["codes", "literal"])
def test_a_model_is_saved_and_loaded(form, tmp_path):
    model = models.unet()
    report = ptq4dm.quantize(model, SplitQuantConfig(form=form, weight_bits=3))
    assert any("W3A16 3 clusters an output" in row["format"] for row in report.layers)
    assert any("W3A16 3 clusters a tensor" in row["format"] for row in report.layers)
    model.save_pretrained(tmp_path / "out")
    loaded = type(model).from_pretrained(tmp_path / "out")
    assert same(model, loaded) and torch.equal(run(loaded), run(model))
    exact = tmp_path / "exact"
    models.unet().save_pretrained(exact)
    packed = type(model).from_pretrained(exact, quantization_config=SplitQuantConfig(form=form, weight_bits=3))
    assert same(model, packed)


def test_layers_with_fewer_outputs_than_clusters_are_left():
    model = models.unet(out_channels=2)
    report = ptq4dm.quantize(model, SplitQuantConfig())
    assert "conv_out" not in {row["layer"] for row in report.layers} and isinstance(model.conv_out, nn.Conv2d)
    with pytest.raises(UserError, match="2 outputs"):
        check_fit("layer", ValueSplitPlan(), nn.Linear(4, 2))
    for edges, kind in (("int8", "W8A8 dynamic"), ("keep", None), ("same", "W2A16")):
        model = models.unet()
        report = ptq4dm.quantize(model, SplitQuantConfig(first_last=edges))
        told = {row["layer"]: row["format"] for row in report.layers}
        assert told.get("conv_in", "").startswith(kind or "") and ("conv_in" in told) == (kind is not None)


def test_constant_and_extreme_weights_are_exact_or_finite():
    for fill in (0.0, 0.25, 1e-9):
        layer = nn.Conv2d(4, 4, 1)
        nn.init.constant_(layer.weight, fill)
        for form in ("codes", "literal"):
            found = quantized_copy(layer, ValueSplitPlan(form=form, scope="output"), "layer").dequantized_weight()
            assert found.isfinite().all() and (found - fill).abs().max() <= 1e-3
    with pytest.raises(UserError, match="'layer' holds NaN"):
        nn.init.constant_(layer.weight, math.nan)
        quantized_copy(layer, ValueSplitPlan(), "layer")


WRONG = {
    "form": ({"form": "sum"}, "codes or literal"),
    "scope": ({"scope": "group"}, "tensor or output"),
    "clusters": ({"clusters": 4}, "from 1 to 3"),
    "inputs of 8 bits": ({"activation_bits": 8}, "bits"),
    "another objective": ({"objective": "mse", "objective_parameter": 2.0}, "objective max"),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_choices_are_refused(name):
    changes, says = WRONG[name]
    check_choices("layer", ValueSplitPlan())
    with pytest.raises(UserError, match=says):
        check_choices("layer", replace(ValueSplitPlan(), **changes))


def test_damaged_files_are_refused():
    layer, _ = made("linear")

    def stored(plan, **changes):
        tensors = dict(quantized_copy(layer, plan, "layer").named_parameters())
        check_stored(quantized_copy(layer, plan, "layer"), tensors | {
            name: change(tensors[name].clone()) for name, change in changes.items()
        })  # fmt: skip

    literal, two = ValueSplitPlan(form="literal"), ValueSplitPlan(clusters=2)
    for plan in (ValueSplitPlan(), literal, two):
        stored(plan)
    with pytest.raises(ValueError, match="five clusters"):
        stored(ValueSplitPlan(), places=lambda one: one.fill_(255))
    with pytest.raises(ValueError, match="names cluster 2"):
        stored(two, places=lambda one: one.fill_(242))
    with pytest.raises(ValueError, match="wzeros"):
        stored(literal, wzeros=lambda one: one.fill_(4))
    with pytest.raises(ValueError, match="above zero"):
        stored(literal, wscales=lambda one: one.zero_())


@pytest.mark.parametrize("name", ["form", "granularity", "first_last"])
def test_wrong_options_are_refused(name):
    with pytest.raises(UserError, match=name):
        SplitQuantConfig(**{name: "other"})
