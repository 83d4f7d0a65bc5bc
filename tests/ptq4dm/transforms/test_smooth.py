"""Smoothing divisors against their formula, and the candidates that are searched."""

import pytest
import torch

from ptq4dm.errors import UserError
from ptq4dm.transforms.base import TRANSFORMS
from ptq4dm.transforms.named import named
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


@pytest.mark.parametrize(
    "text, options",
    [
        ("rotate", {}),
        ("smooth", {}),
        ("smooth:alpha=0.3", {"alpha": 0.3}),
        ("smooth:0.3", {"alpha": 0.3}),
        ("hadamard:64", {"group": 64}),
        ("hadamard", {}),
    ],
)
def test_transforms_are_named_with_their_options(text, options):
    transform, found = named(text)
    assert transform is TRANSFORMS[text.partition(":")[0]] and found == options


@pytest.mark.parametrize(
    "text, words",
    [
        ("smoth", "transform 'smoth' is unknown"),
        ("smoth:alpha=0.3", "transform 'smoth' is unknown"),
        ("smooth:beta=0.3", "'smooth' has no option 'beta'; it has alpha"),
        ("rotate:block=4", "'rotate' has no option 'block'; it has none"),
        ("smooth:", "'smooth' has no option ''"),
        ("smooth:alpha", "'smooth:alpha' gives alpha no number; write 'smooth:alpha=0.5'"),
        ("smooth:alpha=x", "gives alpha no number"),
        ("rotate:4", "'rotate' has no option '4'; it has none"),
        ("hadamard:32", "'hadamard': a regular rotation has groups of 16, 64 or 256, not 32"),
        ("sylvester:8", "'sylvester': a sylvester rotation has groups of 16, 32, 64, 128 or 256, not 8"),
        ("hadamard:16.5", "groups of 16, 64 or 256, not 16.5"),
        ("hadamard:inf", "groups of 16, 64 or 256, not inf"),
        ("hadamard:nan", "groups of 16, 64 or 256, not nan"),
        ("smooth:alpha=1.5", "alpha of 'smooth' is a share from 0 to 1"),
        ("smooth-attention:alpha=nan", "alpha of 'smooth-attention' is a share from 0 to 1"),
    ],
)
def test_wrong_names_of_transforms(text, words):
    with pytest.raises(UserError, match=words):
        named(text)
