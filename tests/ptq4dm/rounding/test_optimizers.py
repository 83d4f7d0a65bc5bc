"""Optimizers of rounding: each of them moves, and leaves no gradient behind."""

import pytest
import torch

from helpers import normal
from ptq4dm.errors import UserError
from ptq4dm.rounding.optimizers import OPTIMIZERS, falling, move

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_each_comes_to_the_least_and_leaves_no_gradient(name):
    choice = OPTIMIZERS[name]
    tensors = [normal(5, 4).requires_grad_(), normal(3, seed=1).requires_grad_()]
    start = [one.detach().clone() for one in tensors]
    optimizer, goal = choice.make(tensors, lr=choice.learning_rate), 0.4
    rate = 0.05 if name != "sgd" else 0.02

    def loss():
        return sum((one - goal).square().sum() for one in tensors)

    first = float(loss().detach())
    for step in range(150):
        move(optimizer, tensors, torch.autograd.grad(loss(), tensors), rate * falling(step, 150))
        assert all(one.grad is None for one in tensors)
    assert float(loss().detach()) < 0.05 * first
    assert all((one != before).all() for one, before in zip(tensors, start, strict=True))


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_rate_given_is_the_rate_taken(name):
    """A rate of zero moves nothing: the schedule, and not what the optimizer was made with, decides."""
    one = normal(6).requires_grad_()
    before = one.detach().clone()
    optimizer = OPTIMIZERS[name].make([one], lr=1.0)
    move(optimizer, [one], (torch.ones(6),), 0.0)
    assert torch.equal(one.detach(), before)
    move(optimizer, [one], (torch.ones(6),), 0.1)
    assert (one < before).all()


def test_signs_alone_count_in_signsgd():
    one = torch.zeros(3, requires_grad=True)
    move(OPTIMIZERS["signsgd"].make([one], lr=0.5), [one], (torch.tensor([1e-9, -1e9, 0.0]),), 0.5)
    assert one.tolist() == [-0.5, 0.5, 0.0]


def test_rates_fall_by_half_a_cosine():
    found = [falling(step, 8) for step in range(8)]
    assert found[0] == 1 and found[4] == pytest.approx(0.5) and found == sorted(found, reverse=True)
    assert 0 < found[-1] < 0.05


def test_an_unknown_one_is_named():
    with pytest.raises(UserError, match="optimizer 'lion' is unknown; choose from .*adam"):
        OPTIMIZERS.find("lion")
