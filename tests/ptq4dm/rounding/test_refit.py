"""Scales and codes fitted to outputs: against all codes there are, never worse than the start, wrong inputs."""

import itertools

import pytest
import torch

from ptq4dm.errors import UserError
from ptq4dm.evidence import LayerEvidence
from ptq4dm.kernels.formats.bcq import BinaryGrid, fit, from_uniform, signs
from ptq4dm.ranges.weights import weight_grid
from ptq4dm.rounding.gptq import gptq, ordered_factor
from ptq4dm.rounding.refit import Task, _anew, _metric, output_error, refitted

pytestmark = pytest.mark.usefixtures("one_thread")


def problem(outputs, inputs, rows, rank):
    generator = torch.Generator().manual_seed(0)
    fed = torch.randn(rows, rank, generator=generator) @ torch.randn(rank, inputs, generator=generator)
    return torch.randn(outputs, inputs, generator=generator), LayerEvidence(fed)


def starts(weight, bits, size):
    fitted = fit(weight, bits, size)
    return {
        "uniform": from_uniform(weight_grid(weight, bits, "max", None, size, True)),
        "fitted": BinaryGrid(fitted.alphas, torch.zeros_like(fitted.alphas[..., 0])),
    }


def least_error(row, bits, metric):
    """Of all codes there are, in one group, each with its best scales and offset, float64."""
    planes = torch.tensor(list(itertools.product([-1.0, 1.0], repeat=len(row)))).double()[: 2 ** (len(row) - 1)]
    half = torch.linalg.cholesky(metric, upper=True)
    bases = [torch.stack([*chosen, torch.ones_like(row)], 1) for chosen in itertools.combinations(planes, bits)]
    basis = half @ torch.stack(bases)
    found = torch.linalg.lstsq(basis, (half @ row).expand(len(bases), -1)[..., None], driver="gelsd").solution
    return float(((half @ row)[:, None] - basis @ found).square().sum((1, 2)).min())


@pytest.mark.parametrize("bits", [1, 2])
def test_near_the_best_of_all_codes(bits):
    weight, evidence = problem(20, 6, 30, 6)
    metric = _metric(evidence.hessian)
    best = torch.tensor([least_error(row.double(), bits, metric) for row in weight])
    grid = starts(weight, bits, None)["uniform"]
    codes, found = refitted(weight, gptq(weight, grid, evidence), grid, evidence, 8)
    errors = output_error(weight, found.values(codes), metric)
    assert (errors >= best * (1 - 1e-4) - 1e-6).all()
    before = output_error(weight, grid.values(gptq(weight, grid, evidence)), metric)
    assert errors.sum() - best.sum() < 0.5 * (before.sum() - best.sum())


@pytest.mark.parametrize("start", ["uniform", "fitted"])
@pytest.mark.parametrize("bits", [1, 2, 3, 4])
@pytest.mark.parametrize("size", [32, None])
def test_no_row_is_worse_than_its_start(start, bits, size):
    weight, evidence = problem(30, 96, 40, 24)
    grid = starts(weight, bits, size)[start]
    grid = BinaryGrid(grid.alphas.half(), grid.offsets.half())
    codes, metric = gptq(weight, grid, evidence), _metric(evidence.hessian)
    errors = [output_error(weight, grid.values(codes), metric)]
    for rounds in range(4):
        made, found = refitted(weight, codes, grid, evidence, rounds)
        assert found.alphas.dtype == torch.float16 and (found.alphas >= 0).all()
        assert made.dtype == torch.int8 and int(made.min()) >= 0 and int(made.max()) < 2**bits
        errors.append(output_error(weight, found.values(made), metric))
    assert torch.equal(errors[0], errors[1])  # of no rounds
    assert all((after <= before).all() for before, after in itertools.pairwise(errors))
    assert errors[-1].sum() < 0.8 * errors[0].sum()


@pytest.mark.parametrize("bits, size", [(1, 32), (2, 32), (3, None)])
def test_the_scales_are_the_best_for_the_codes(bits, size):
    weight, evidence = problem(10, 96, 200, 96)
    grid = starts(weight, bits, size)["uniform"]
    codes, found = refitted(weight, grid.codes(weight), grid, evidence, 1)
    metric = _metric(evidence.hessian)
    half = torch.linalg.cholesky(metric, upper=True)
    groups = found.alphas.shape[1]
    for row, own, error in zip(weight, codes, output_error(weight, found.values(codes), metric), strict=True):
        planes = torch.cat([signs(own, bits), torch.ones(96, 1)], 1).double()
        basis = torch.block_diag(*planes.split(96 // groups))
        left = torch.linalg.lstsq(half @ basis, half @ row.double()[:, None], driver="gelsd").residuals
        torch.testing.assert_close(error, left[0], rtol=1e-5, atol=0)


@pytest.mark.parametrize("bits, size", [(1, 32), (2, None), (4, 32)])
def test_codes_of_gptq_are_gptqs(bits, size):
    """More inputs than a block of them has."""
    weight, evidence = problem(30, 96, 40, 24)
    grid = starts(weight, bits, size)["fitted"]
    order, upper = ordered_factor(evidence.hessian, weight.dtype)
    found = _anew(weight, grid, Task(evidence.hessian, order, evidence.hessian.float(), upper))
    assert found.dtype == torch.int8
    assert (grid.values(found) == grid.values(gptq(weight, grid, evidence))).float().mean() > 0.99


def test_rows_of_zeros_and_planes_that_are_alike():
    _, evidence = problem(1, 64, 40, 24)
    weight = torch.stack([torch.zeros(64), torch.ones(64), torch.full((64,), -3.0)])
    grid = starts(weight, 3, 32)["fitted"]
    codes, found = refitted(weight, grid.codes(weight), grid, evidence, 2)
    torch.testing.assert_close(found.values(codes), weight, rtol=0, atol=1e-4)


def test_inputs_of_zeros_and_nan():
    weight, evidence = problem(4, 64, 8, 8)
    grid = starts(weight, 2, 32)["uniform"]
    silent = LayerEvidence(torch.zeros_like(evidence.rows))
    codes, found = refitted(weight, grid.codes(weight), grid, silent, 2)
    assert (found.values(codes) - weight).norm() < (grid.values(grid.codes(weight)) - weight).norm()
    broken = LayerEvidence(torch.full_like(evidence.rows, float("nan")))
    with pytest.raises(UserError, match="NaN or infinity"):
        refitted(weight, grid.codes(weight), grid, broken, 1)
