"""SVDQuant on rotated inputs, and with a branch of the inputs' directions: exact in floats, what is stored, gains."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from helpers import distance, normal
from ptq4dm import SVDQuantConfig, UserError
from ptq4dm.kernels.formats.rotation import rotate
from ptq4dm.kernels.w4 import reference
from ptq4dm.layers.registry import Problem, quantized_copy
from ptq4dm.layers.rotated.choices import ROTATED
from ptq4dm.svdquant.group import Group, output, split_weight
from ptq4dm.svdquant.layers.plan import SVDQPlan
from ptq4dm.svdquant.packing import quantize_group

pytestmark = pytest.mark.usefixtures("one_thread")

ROTATIONS = {"none": {}, "regular": {"rotation": 64}, "sylvester": {"rotation": 32, "rotation_kind": "sylvester"}}
SUBSPACES = ("weight", "inputs")


def rows_with_outliers(rows=300, inputs=128):
    """Inputs with a few large directions, and two channels far above the rest."""
    x = normal(rows, inputs, seed=1) + 6 * normal(rows, 4, seed=2) @ normal(4, inputs, seed=3)
    x[:, [7, 90]] *= 20
    return x


class Seen:
    """Evidence of one input, for all layers."""

    def __init__(self, rows):
        self.rows = rows

    def of(self, name):
        from ptq4dm.evidence import LayerEvidence

        return LayerEvidence(self.rows, self.rows.abs().amax(0), float(self.rows.min()))


def packed(plan, rows, layers=None):
    torch.manual_seed(0)
    layers = layers or {"a": nn.Linear(128, 96), "b": nn.Linear(128, 64, bias=False)}
    first = next(iter(layers))
    plans = {name: replace(plan, lender="" if name == first else first) for name in layers}
    return layers, quantize_group(Problem(layers, plans, Seen(rows)))


@pytest.mark.parametrize("subspace", SUBSPACES)
@pytest.mark.parametrize("rotation", ROTATIONS.values(), ids=ROTATIONS)
def test_nothing_is_lost_but_by_rounding(rotation, subspace):
    """In floats, whatever D was rounded to, branch and rest together are the layer."""
    plan = SVDQPlan(rank=8, alpha=0.0, beta=0.0, subspace=subspace, activation="none", **rotation)
    rows = rows_with_outliers()
    weight = normal(48, 128, scale=0.1)
    group = Group.of(weight, rows, rows.abs().amax(0), plan, torch.bfloat16)
    split = split_weight(group, torch.ones(128))
    rest = group.smoothed_rest(split.up, split.down, torch.ones(128))
    y = group.rest_of(group.rows) @ rest.T + (group.rows @ split.down.T) @ split.up.T
    # `up` is stored in bfloat16: an error of 2^-9 of the branch, which holds most of these inputs
    assert distance(y, rows @ weight.T) < (3e-3 if subspace == "inputs" else 1e-5)
    torch.testing.assert_close(group.rows @ group.weight.T, rows @ weight.T, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("activation", ["int4", "int8", "fp8"])
@pytest.mark.parametrize("subspace", SUBSPACES)
@pytest.mark.parametrize("rotation", ROTATIONS.values(), ids=ROTATIONS)
def test_layers_are_the_formula(rotation, subspace, activation):
    """What is stored is what was decided: a layer gives what its decomposition gave; both layers of a group share."""
    plan = SVDQPlan(
        rank=8, alpha=0.5, beta=0.5, subspace=subspace, activation=activation, rounding="nearest", **rotation
    )
    rows = rows_with_outliers()
    layers, made = packed(plan, rows)
    for name, layer in layers.items():
        exact = layer(rows)
        y = made[name](rows)
        decibel = -20 * torch.log10(
            torch.tensor(
                distance(
                    y - (0 if layer.bias is None else layer.bias), exact - (0 if layer.bias is None else layer.bias)
                )
            )
        )
        assert float(decibel) == pytest.approx(made[name].stages["sqnr_final"], abs=0.05)
    assert made["b"].down is None and made["b"].branch[0] is made["a"].down


@pytest.mark.parametrize("subspace", SUBSPACES)
def test_the_dequantized_weight_reads_inputs_as_they_come(subspace):
    plan = SVDQPlan(rank=8, alpha=0.5, beta=0.5, rotation=64, subspace=subspace)
    layers, made = packed(plan, rows_with_outliers())
    x = normal(50, 128, seed=5)
    for name, layer in layers.items():
        found = F.linear(x, made[name].dequantized_weight(), layer.bias)
        assert distance(found, layer(x)) < 0.15
        assert (
            distance(F.linear(rotate(x, 64, "regular"), made[name].dequantized_weight(), layer.bias), layer(x)) > 0.5
        )


@pytest.mark.parametrize("activation", ["int4", "int8", "fp8"])
@pytest.mark.parametrize("subspace", SUBSPACES)
def test_codes_of_a_shared_input_are_the_layer_s_own(activation, subspace):
    plan = SVDQPlan(rank=8, alpha=0.5, beta=0.5, rotation=64, subspace=subspace, activation=activation)
    rows = rows_with_outliers()
    _, made = packed(plan, rows)
    x = rows.view(3, 100, 128)
    codes = made["a"].input_codes(x)
    for layer in made.values():
        torch.testing.assert_close(layer(codes), layer(x), rtol=1e-4, atol=2e-3)


def test_norms_and_gates_come_before_the_rotation():
    x, gain, offset = normal(2 * 5, 128), normal(2, 128, seed=1), normal(2, 128, seed=2)
    norm, other = (gain, offset, 1e-6, "adaptive"), normal(2 * 5, 128, seed=4)
    smooth, down = 1 + normal(128, seed=3).abs(), normal(4, 128, seed=6)
    for before, arguments in (
        (reference.normed(x, *norm), (None, norm, "")),
        (x * F.silu(other), (other, None, "silu")),
    ):
        more, given, gate = arguments
        codes, scales, branch = reference.codes(x, more, smooth, down, "int8", 0.0, given, gate, 64, "regular")
        v = rotate(before, 64, "regular") / smooth
        torch.testing.assert_close(scales, v.abs().amax(1) / 127)
        torch.testing.assert_close(codes.float(), (v / scales[:, None]).round(), rtol=0, atol=1)
        torch.testing.assert_close(branch, before @ down.T, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("evidence", ["store", "none"])
def test_outliers_cost_less(evidence):
    """4-bit inputs with two channels far above the rest, without smoothing."""
    rows = rows_with_outliers()
    plan = SVDQPlan(rank=8, alpha=0.0, beta=0.0, evidence=evidence, rounding="nearest")
    if evidence == "none":
        plan = replace(plan, alpha=None, beta=None)
    found = {}
    for name, rotation in ROTATIONS.items():
        layers, made = packed(replace(plan, **rotation), rows, {"a": nn.Linear(128, 96)})
        found[name] = distance(made["a"](rows), layers["a"](rows))
    assert max(found["regular"], found["sylvester"]) < 0.8 * found["none"]


def test_directions_of_inputs_are_worth_their_branch():
    """Of inputs that lie near a few directions; with directions dealt at random the gain vanishes."""
    rows = rows_with_outliers()
    errors = {}
    for subspace in SUBSPACES:
        plan = SVDQPlan(rank=8, alpha=0.0, beta=0.0, rounding="nearest", subspace=subspace)
        layers, made = packed(plan, rows, {"a": nn.Linear(128, 96)})
        errors[subspace] = distance(made["a"](rows), layers["a"](rows))
    assert errors["inputs"] < 0.5 * errors["weight"]
    weight = layers["a"].weight.detach()
    group = Group.of(weight, rows, rows.abs().amax(0), plan, torch.bfloat16)
    group.subspace = torch.linalg.qr(normal(128, 8, seed=9))[0].T.contiguous()
    shuffled = output(group, split_weight(group, torch.ones(128)), rows)
    assert distance(shuffled, rows @ weight.T) > 0.8 * errors["weight"]


def test_weights_alone_are_rotated_while_they_are_packed():
    """Data-free: the layer's own weight, error no larger than that of the same weight rotated beforehand."""
    torch.manual_seed(0)
    layer = nn.Linear(128, 96)
    plan = SVDQPlan(rank=4, rotation=64, evidence="none", rounding="nearest")
    one = quantized_copy(layer, plan, "layer")
    turned = nn.Linear(128, 96)
    turned.weight.data, turned.bias.data = rotate(layer.weight.detach(), 64, "regular"), layer.bias.detach()
    other = quantized_copy(turned, replace(plan, rotation=0), "layer")
    assert distance(one.dequantized_weight(), layer.weight) == pytest.approx(
        distance(other.dequantized_weight(), turned.weight), rel=0.02
    )


# --- refusals -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options, words",
    [
        ({"unsigned": True, "transforms": ("hadamard:64",)}, "unsigned lifts the outputs of GELU and SiLU"),
        ({"unsigned": True, "subspace": "inputs"}, "unsigned lifts the outputs of GELU and SiLU"),
        ({"evidence": "none", "subspace": "inputs"}, "looks at what layers are fed"),
        ({"rank": 0, "subspace": "inputs"}, "needs a rank"),
        ({"subspace": "outputs"}, "subspace"),
    ],
)
def test_options_that_do_not_go_together(options, words):
    with pytest.raises(UserError, match=words):
        SVDQuantConfig(**options)


@pytest.mark.parametrize(
    "choices, words",
    [
        ({"rotation": 48}, "groups of 16, 64 or 256, not 48"),
        ({"rotation": 64, "shift": 0.2}, "not lifted"),
        ({"rotation": 64, "activation": "none"}, "are rounded"),
        ({"subspace": "outputs"}, "subspace is one of weight, inputs"),
        ({"subspace": "inputs", "rank": 0}, "has a rank"),
        ({"subspace": "inputs", "evidence": "none"}, "evidence"),
    ],
)
def test_wrong_plans(choices, words):
    with pytest.raises(ValueError, match=words):
        SVDQPlan(**choices).check()


def test_weight_only_layers_are_not_rotated():
    plan = SVDQPlan(activation="none")
    assert ROTATED[SVDQPlan](plan, 64, "regular") == plan
    assert str(ROTATED[SVDQPlan](SVDQPlan(), 64, "regular")) == "W4A4 g64 r32 hadamard 64"
    assert str(SVDQPlan(subspace="inputs")) == "W4A4 g64 r32 of inputs"
