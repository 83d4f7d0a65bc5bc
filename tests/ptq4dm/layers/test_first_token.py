"""Layers whose first token has a scale of its own: against the formula, what is stored, what is refused."""

import copy
from dataclasses import asdict, replace

import pytest
import torch
from torch import nn

from helpers import distance, normal
from ptq4dm.errors import UserError
from ptq4dm.layers.choices import check_choices, choices_of
from ptq4dm.layers.fusing.report import why_left
from ptq4dm.layers.plan import LayerPlan
from ptq4dm.layers.registry import quantized_copy
from ptq4dm.layers.split.first import FirstTokenPlan
from ptq4dm.layers.stored import check_stored
from ptq4dm.reconstruction.soft import SoftInput

pytestmark = pytest.mark.usefixtures("one_thread")
PLAN = FirstTokenPlan(input_scale=3.0 / 127, input_zero_point=3, first_factor=1 / 16)


def text(batch, tokens, inputs=64):
    x = normal(batch, tokens, inputs)
    x[:, 0] *= 16
    return x


def rounded(x, plan):
    """x on the grids of its tokens, float64."""
    half = 2 ** (plan.activation_bits - 1)
    scales = torch.full((x.shape[-2], 1), plan.input_scale, dtype=torch.float64)
    scales[0] /= plan.first_factor
    codes = ((x.double() / scales).round() + plan.input_zero_point).clamp(-half, half - 1)
    return (codes - plan.input_zero_point) * scales


@pytest.mark.parametrize("bits", [8, 5])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(3, 7), (1, 5), (2, 1)])
def test_each_token_is_on_its_own_grid(shape, bias, bits):
    torch.manual_seed(0)
    layer, x = nn.Linear(64, 11, bias=bias), text(*shape)
    plan = replace(PLAN, activation_bits=bits, input_scale=3.0 / 2 ** (bits - 1))
    quantized = quantized_copy(layer, plan, "layer")
    exact = copy.deepcopy(layer).double()
    exact.weight.data = quantized.dequantized_weight().double()
    assert distance(quantized(x), exact(rounded(x, plan))) < 1e-4  # a value at a tie of rounding may go either way
    assert torch.allclose(SoftInput(plan, layer, False)(x).double(), rounded(x, plan), atol=1e-5)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(3, 7), (2, 77), (4, 300)], ids=str)
def test_on_a_gpu_each_token_is_on_its_own_grid(shape, dtype):
    torch.manual_seed(0)
    layer, x = nn.Linear(64, 72), text(*shape).to(dtype)
    quantized = quantized_copy(layer, PLAN, "layer")
    exact = copy.deepcopy(layer).double()
    exact.weight.data = quantized.dequantized_weight().double()
    right = exact(rounded(x, PLAN))
    quantized = quantized.cuda()
    assert quantized.kernel_name() == "triton-int8"
    found = quantized(x.cuda())
    assert found.dtype == dtype
    assert distance(found.cpu(), right) < (1e-3 if dtype == torch.float32 else 5e-3)


def test_words_gain_and_the_first_token_loses_little():
    torch.manual_seed(0)
    layer, x = nn.Linear(64, 11, bias=False), text(2, 9)
    apart = replace(PLAN, input_scale=5.0 / 127)
    one = LayerPlan(input_scale=apart.input_scale * 16, input_zero_point=3)
    errors = [(quantized_copy(layer, plan, "layer")(x) - layer(x)).square() for plan in (one, apart)]
    assert errors[1][:, 1:].mean() < 0.1 * errors[0][:, 1:].mean()
    assert errors[1][:, 0].mean() < 1.5 * errors[0][:, 0].mean()


def test_texts_of_other_lengths_and_a_row_alone():
    torch.manual_seed(0)
    quantized = quantized_copy(nn.Linear(64, 11), PLAN, "layer")
    x = text(2, 9)
    whole = quantized(x)
    torch.testing.assert_close(quantized(x[:, :4]), whole[:, :4])
    torch.testing.assert_close(quantized(x[:1]), whole[:1])
    torch.testing.assert_close(quantized(x[0, 3]), whole[0, 3])  # [K]: one of the others
    assert quantized(x[:0]).shape == (0, 9, 11)


def test_the_factor_of_one_is_the_plain_layer():
    torch.manual_seed(0)
    layer, x = nn.Linear(64, 11), normal(2, 9, 64)
    plain = LayerPlan(input_scale=PLAN.input_scale, input_zero_point=3)
    torch.testing.assert_close(
        quantized_copy(layer, replace(PLAN, first_factor=1.0), "layer")(x), quantized_copy(layer, plain, "layer")(x)
    )


def test_conversion_keeps_the_factor_and_it_is_four_bytes():
    layer = nn.Linear(64, 11)
    quantized = quantized_copy(layer, PLAN, "layer")
    plain = quantized_copy(layer, LayerPlan(input_scale=1.0, input_zero_point=3), "layer")
    sizes = [sum(one.nbytes for one in net.parameters()) for net in (quantized, plain)]
    assert sizes[0] - sizes[1] == 4
    assert quantized.to(torch.bfloat16).first_factor.dtype == torch.float32
    assert quantized(text(2, 9).bfloat16()).dtype == torch.bfloat16


def test_scales_follow_a_grid_that_changes():
    torch.manual_seed(0)
    quantized = quantized_copy(nn.Linear(64, 11), PLAN, "layer")
    x = text(2, 9)
    quantized(x)
    quantized.put(input_scale=torch.tensor(2 * PLAN.input_scale))
    other = quantized_copy(nn.Linear(64, 11), replace(PLAN, input_scale=2 * PLAN.input_scale), "layer")
    assert torch.equal(quantized.row_scales(x.shape), other.row_scales(x.shape))


def test_plans_are_json_and_come_back():
    assert choices_of("layer", asdict(PLAN)) == PLAN
    assert str(PLAN) == "W8A8 first token apart static"


@pytest.mark.parametrize(
    "changes, says",
    [
        ({"first_factor": 0.0}, "first_factor is 0.0"),
        ({"first_factor": float("nan")}, "got nan"),
        ({"first_factor": 2.0**21}, "out of"),
        ({"input_scale": None, "input_zero_point": None}, "static"),
    ],
)
def test_wrong_choices_are_refused(changes, says):
    check_choices("layer", PLAN)
    with pytest.raises(UserError, match=says):
        check_choices("layer", replace(PLAN, **changes))


def test_files_of_another_factor_are_refused():
    quantized = quantized_copy(nn.Linear(64, 11), PLAN, "layer")
    tensors = dict(quantized.named_parameters())
    check_stored(quantized, tensors)
    with pytest.raises(ValueError, match="first_factor"):
        check_stored(quantized, tensors | {"first_factor": tensors["first_factor"] * 2})


def test_fused_kernels_leave_such_layers_and_say_so():
    quantized = quantized_copy(nn.Linear(64, 11), PLAN, "layer")
    assert "first token" in why_left(nn.Sequential(quantized), (type(quantized),))
