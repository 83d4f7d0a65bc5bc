"""The power grid: its formula, its end at the uniform grid, its gradient."""

import pytest
import torch

from helpers import normal
from ptq4dm.kernels.formats.power import PowerGrid, grid_of, raised
from ptq4dm.ranges.weights import weight_grid

pytestmark = pytest.mark.usefixtures("one_thread")


def power(weight, exponent, bits=4, objective="max"):
    return PowerGrid.over(weight_grid(raised(weight, exponent), bits, objective), exponent)


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_exponent_one_is_the_uniform_grid_to_the_bit(bits):
    weight = normal(9, 50) * 0.03
    for objective in ("max", "mse"):
        found, uniform = power(weight, 1.0, bits, objective), weight_grid(weight, bits, objective)
        codes = uniform.codes(weight)
        assert torch.equal(found.codes(weight), codes) and torch.equal(found.values(codes), uniform.values(codes))
        assert torch.equal(found.steps(weight), uniform.steps(weight))
        assert all(torch.equal(a, b) for a, b in zip(found.ends(50), uniform.ends(50), strict=True))
        picked = uniform.columns(torch.arange(50))
        assert torch.equal(found.nearest(weight[:, 3], 3), picked.nearest(weight[:, 3], 3))


@pytest.mark.parametrize("exponent", [0.5, 0.65, 0.95])
def test_codes_and_values_are_what_the_formula_says(exponent):
    weight = normal(6, 40) * 0.1
    grid = power(weight, exponent)
    scale = weight.double().abs().pow(exponent).amax(1, keepdim=True) / 7
    codes = (weight.double().sign() * weight.double().abs() ** exponent / scale).round()
    assert codes.abs().max() == 7 and torch.equal(grid.codes(weight).double(), codes)
    values = codes.sign() * (scale * codes.abs()) ** (1 / exponent)
    torch.testing.assert_close(grid.values(codes.to(torch.int8)).double(), values, rtol=1e-6, atol=0)
    peak = weight.abs().argmax(1, keepdim=True)  # the largest weight is on the grid
    torch.testing.assert_close(grid.values(codes.to(torch.int8)).gather(1, peak), weight.gather(1, peak))


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("exponent", [0.5, 0.55, 0.8, 1.0])
def test_every_code_keeps_its_value(exponent, bits):
    scales = torch.tensor([[1e-4], [0.03], [1.7]])
    grid = grid_of(scales, exponent, bits)
    codes = torch.arange(grid.low, grid.high + 1).to(torch.int8).expand(3, -1)
    values = grid.values(codes)
    assert torch.equal(grid.codes(values), codes) and (values.diff(dim=1) > 0).all()
    assert torch.equal(grid.values(codes.float()), values)  # floats and integers are the same codes
    assert torch.equal(values.sign(), codes.sign().float())


@pytest.mark.parametrize("exponent", [0.5, 0.75, 1.0])
def test_gradients_are_the_slope_and_finite_at_zero(exponent):
    scales = torch.tensor([[0.2], [0.5]], requires_grad=True)
    codes = torch.tensor([[-6.5, -1.0, 0.0, 0.25, 7.0], [0.0, 0.0, -0.5, 3.0, 1.0]], requires_grad=True)
    grid = grid_of(scales, exponent, 4)
    grid.values(codes).sum().backward()
    power = 1 / exponent
    with torch.no_grad():
        slope = power * scales**power * codes.abs() ** (power - 1)
        of_scales = (power * scales ** (power - 1) * codes.sign() * codes.abs() ** power).sum(1, keepdim=True)
    torch.testing.assert_close(codes.grad, slope, rtol=1e-5, atol=1e-4 if exponent > 0.7 else 1e-6)
    torch.testing.assert_close(scales.grad, of_scales, rtol=1e-5, atol=1e-6)
    assert codes.grad.isfinite().all()
    assert (codes.grad[1, 0] > 0.49) == (exponent == 1)


def test_parts_and_rows_of_a_grid():
    weight = normal(7, 20)
    whole = power(weight, 0.6)
    parts = [whole.rows(slice(0, 3)), whole.rows(slice(3, 7))]
    assert torch.equal(PowerGrid.stacked(parts).codes(weight), whole.codes(weight))
    assert torch.equal(parts[1].codes(weight[3:]), whole.codes(weight)[3:])
    wider = whole.with_scales(whole.scales * 2)
    assert wider.exponent == 0.6 and torch.equal(
        wider.codes(weight), (whole.steps(weight) / 2).round().to(torch.int8)
    )


def test_weights_without_a_code_are_zero():
    grid = grid_of(torch.ones(1, 1), 0.5, 4)
    assert grid.codes(torch.tensor([[float("nan"), 0.0, -0.0, 1e9, -1e9]])).tolist() == [[0, 0, 0, 7, -7]]
