"""Smoothing divisors against their formula, and the candidates that are searched."""

import pytest
import torch

from ptq4dm.transforms.smooth import candidates, divisors


def test_divisors_are_the_formula():
    x, w = torch.tensor([4.0, 9.0, 1.0]), torch.tensor([0.25, 0.01, 1.0])
    assert torch.allclose(divisors(x, w, 0.5, 0.5), torch.tensor([4.0, 30.0, 1.0]))
    assert torch.allclose(divisors(x, w, 0.5, 0.0), torch.tensor([2.0, 3.0, 1.0]))
    assert torch.equal(divisors(x, w, 0.0, 0.0), torch.ones(3))


def test_divisors_of_dead_channels_and_extremes():
    nan, inf = float("nan"), float("inf")
    x, w = torch.tensor([0, 1, 2, nan, inf, 1e9, 1e-9]), torch.tensor([1, 0, 0, 1, 1, 1, 1e9])
    assert divisors(x, w, 0.9, 0.1).tolist() == pytest.approx([1, 1, 1, 1, 1, 1e4, 1e-4])
    assert divisors(torch.tensor([0.0, 4.0]), torch.tensor([0.25, 0.0]), 0.0, 0.5).tolist() == [1, 1]
    assert divisors(torch.tensor([4.0, 4.0]), torch.tensor([0.25, 0.0]), 0.5, 0.0).tolist() == [2, 1]


def test_candidates_are_those_of_the_authors():
    choices = candidates(20)
    assert len(choices) == len(set(choices)) == 39 and choices[0] == (0.0, 0.0)
    for alpha, beta in choices[1:]:
        assert 0 < alpha < 1 and (beta == 0 or alpha + beta == pytest.approx(1))
    assert {round(20 * alpha) for alpha, _ in choices} == set(range(20))
    assert set(candidates(10)) <= set(choices)
