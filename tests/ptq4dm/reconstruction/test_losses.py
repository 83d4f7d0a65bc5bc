"""The losses of a block beside short references in float64."""

import pytest
import torch

from helpers import normal
from ptq4dm.calibration.calls import Calls
from ptq4dm.reconstruction.losses import block_loss, row_weights
from ptq4dm.rounding.learned import LOSSES

pytestmark = pytest.mark.usefixtures("one_thread")


def reference(kind, outputs, targets, weights, fisher):
    total = 0.0
    for y, t, g in zip(outputs, targets, fisher, strict=True):
        y, t, g = y.double(), t.double(), g.double()
        for r in range(len(y)):
            wrong = (y[r] - t[r]) ** 2
            row = {
                "mse": lambda wrong=wrong: wrong.mean(),
                "fisher": lambda wrong=wrong, g=g[r]: (g * wrong).mean(),
                "relative": lambda wrong=wrong, t=t[r]: wrong.sum() / (t**2).sum(),
                "cosine": lambda y=y[r], t=t[r]: 1 - (y * t).sum() / (y.norm() * t.norm()),
            }[kind]()
            total += float(weights[r] * row) / len(y)
    return total


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", LOSSES)
def test_losses_are_their_formulas(kind, dtype):
    shapes = [(3, 4, 5, 5), (3, 7, 6)]
    outputs = [normal(*shape, seed=i, dtype=dtype) for i, shape in enumerate(shapes)]
    targets = [normal(*shape, seed=i + 5, dtype=dtype) for i, shape in enumerate(shapes)]
    fisher = [normal(*shape, seed=i + 9).square() for i, shape in enumerate(shapes)]
    weights = torch.tensor([0.5, 0.0, 2.5])
    found = block_loss(kind, outputs, targets, weights, fisher)
    assert found.dtype == torch.float32
    assert float(found) == pytest.approx(reference(kind, outputs, targets, weights, fisher), rel=1e-5)
    assert float(block_loss(kind, targets, targets, weights, fisher)) == pytest.approx(0, abs=1e-6)


def test_a_row_of_weight_zero_does_not_count():
    outputs, targets = [normal(2, 8)], [normal(2, 8, seed=1)]
    weights = torch.tensor([2.0, 0.0])
    found = block_loss("mse", outputs, targets, weights)
    outputs[0][1] += 100
    assert torch.equal(found, block_loss("mse", outputs, targets, weights))


def test_rows_may_come_several_times_in_turn_or_not_at_all():
    """[2R, ...] holds each row twice; [S, K] of packed tokens has no rows, and gets the mean weight."""
    y, t, weights = normal(4, 6), normal(4, 6, seed=1), torch.tensor([1.0, 3.0])
    wrong = (y - t).square().mean(1)
    assert float(block_loss("mse", [y], [t], weights)) == pytest.approx(float((wrong * weights[[0, 0, 1, 1]]).mean()))
    y, t = normal(5, 6), normal(5, 6, seed=1)
    assert float(block_loss("mse", [y], [t], weights)) == pytest.approx(float((y - t).square().mean() * 2))


def test_a_target_of_zeros_is_finite():
    zeros = [torch.zeros(2, 4)]
    for kind in LOSSES:
        assert block_loss(kind, zeros, zeros, torch.ones(2), [torch.ones(2, 4)]).isfinite()


def test_weights_are_those_of_the_parts_of_the_time_range():
    calls = Calls()
    calls.time = torch.tensor([0.0, 0.24, 0.26, 0.6, 0.99, 1.0], dtype=torch.float64)
    calls.places = torch.zeros(6, 2, dtype=torch.int64)
    found = row_weights(calls, (1.0, 2.0, 0.0, 5.0), torch.device("cpu"))
    assert found.tolist() == [0.5, 0.5, 1.0, 0.0, 2.5, 2.5]  # over their mean, 2
    assert row_weights(calls, (), torch.device("cpu")).tolist() == [1.0] * 6
