"""The low-rank branch against the singular value decomposition."""

import pytest
import torch

from helpers import normal
from ptq4dm.svdquant.layers import lowrank

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("limit", [1024, 8], ids=["Gram matrix", "randomised"])
@pytest.mark.parametrize("shape", [(96, 64), (64, 96), (160, 160)], ids=str)
def test_top_factors_are_as_good_as_an_svd(shape, limit, monkeypatch):
    monkeypatch.setattr(lowrank, "GRAM_LIMIT", limit)
    u, _, v = torch.linalg.svd(normal(*shape), full_matrices=False)
    values = 0.97 ** torch.arange(min(shape))
    matrix = u * values @ v
    for rank in (1, 8, 20):
        up, down = lowrank.top_factors(matrix, rank)
        assert up.shape == (shape[0], rank) and down.shape == (rank, shape[1])
        assert (matrix - up @ down).norm() <= 1.01 * values[rank:].norm()
        assert torch.allclose(down @ down.T, torch.eye(rank), atol=1e-4)  # all singular values are in `up`
        assert torch.allclose(up.norm(dim=0), values[:rank], rtol=0.02, atol=1e-4)
        again = lowrank.top_factors(matrix, rank)
        assert torch.equal(up, again[0]) and torch.equal(down, again[1])


def test_the_seed_is_that_of_the_randomised_path(monkeypatch):
    matrix = normal(80, 80)
    assert torch.equal(lowrank.top_factors(matrix, 4, seed=0)[0], lowrank.top_factors(matrix, 4, seed=1)[0])
    monkeypatch.setattr(lowrank, "GRAM_LIMIT", 8)
    assert not torch.equal(lowrank.top_factors(matrix, 4, seed=0)[0], lowrank.top_factors(matrix, 4, seed=1)[0])


def test_the_start_is_drawn_once_for_a_shape_and_a_seed(monkeypatch):
    monkeypatch.setattr(lowrank, "GRAM_LIMIT", 8)
    lowrank._start.cache_clear()
    matrix, drawn, randn = normal(80, 72), [], torch.randn
    monkeypatch.setattr(torch, "randn", lambda *size, **more: drawn.append(size) or randn(*size, **more))
    with torch.inference_mode():
        first = lowrank.top_factors(matrix, 4)[0]
    grown = matrix.clone().requires_grad_()  # nothing of inference mode is left in what is kept
    assert torch.equal(lowrank.top_factors(grown, 4)[0], first) and drawn == [(72, 4 + lowrank.OVERSAMPLING)]
    lowrank.top_factors(matrix[:, :64], 4)
    lowrank.top_factors(matrix, 4, seed=1)
    assert len(drawn) == 3


@pytest.mark.parametrize("shape", [(6, 64), (64, 6), (16, 16)], ids=str)
def test_as_many_ranks_as_a_matrix_has_are_the_matrix(shape):
    matrix = normal(*shape)
    up, down = lowrank.top_factors(matrix, min(shape))
    assert torch.allclose(up @ down, matrix, atol=1e-4)
    zeros = lowrank.top_factors(torch.zeros(shape), 2)
    assert (zeros[0] @ zeros[1] == 0).all() and zeros[1].isfinite().all()
