"""Group-wise Hadamard rotations: orthonormal, their own inverse, what spreads and what stays, wrong input."""

import pytest
import torch

from ptq4dm.kernels.formats.rotation import GROUPS, KINDS, groups_of, matrix, rotate

ALL = [(group, kind) for kind in KINDS for group in groups_of(kind)]


@pytest.mark.parametrize(("group", "kind"), ALL)
def test_matrices_are_orthonormal_and_symmetric(group, kind):
    H = matrix(group, kind)
    torch.testing.assert_close(H @ H.T, torch.eye(group, dtype=torch.float64), rtol=0, atol=1e-14)
    assert torch.equal(H, H.T)
    torch.testing.assert_close(H.abs(), torch.full_like(H, group**-0.5), rtol=1e-14, atol=0)


def test_the_regular_matrix_is_that_of_the_paper():
    """Signs of the 4 x 4 matrix as ConvRot gives it; digits base four of row and column choose the factors."""
    four = [[1, 1, 1, -1], [1, 1, -1, 1], [1, -1, 1, 1], [-1, 1, 1, 1]]
    H = matrix(16, "regular")
    due = [[four[r // 4][c // 4] * four[r % 4][c % 4] for c in range(16)] for r in range(16)]
    assert (H * 4).tolist() == due


def test_groups_of_a_kind():
    assert groups_of("sylvester") == GROUPS and groups_of("regular") == (16, 64, 256)


@pytest.mark.parametrize("group", groups_of("regular"))
def test_sums_of_regular_rows_are_alike(group):
    """So that a common mean stays where it is; Sylvester's first column gathers it."""
    assert torch.equal(matrix(group, "regular").sum(0), torch.ones(group, dtype=torch.float64))
    assert matrix(group, "sylvester").sum(0)[0] == pytest.approx(group**0.5)
    mean = torch.full((3, 2 * group), 5.0)
    torch.testing.assert_close(rotate(mean, group, "regular"), mean)


@pytest.mark.parametrize(("group", "kind"), ALL)
def test_products_stay_and_rotations_undo_themselves(group, kind):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 5, 2 * group, generator=generator)
    w = torch.randn(7, 2 * group, generator=generator)
    turned = rotate(x, group, kind)
    assert turned.shape == x.shape and not torch.allclose(turned, x, atol=0.1)
    torch.testing.assert_close(turned @ rotate(w, group, kind).T, x @ w.T, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(rotate(turned, group, kind), x, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_an_outlier_is_spread_over_its_group_alone(kind):
    x = torch.zeros(1, 48)
    x[0, 20] = 8.0
    turned = rotate(x, 16, kind)
    assert turned[0, 16:32].abs().tolist() == [2.0] * 16
    assert not turned[0, :16].any() and not turned[0, 32:].any()


def test_dtypes_stay_and_sums_are_wide():
    """In bfloat16 itself, 256 summands would leave an error of the order of 1."""
    x = torch.randn(4, 256, generator=torch.Generator().manual_seed(0)).bfloat16()
    turned = rotate(x, 256, "regular")
    assert turned.dtype == torch.bfloat16
    exact = x.double() @ matrix(256, "regular")
    assert torch.equal(turned, rotate(x.float(), 256, "regular").bfloat16())
    torch.testing.assert_close(turned.double(), exact, rtol=2**-8, atol=1e-5)
    assert rotate(x.double(), 256, "regular").sub(exact).abs().max() < 1e-12


def test_wrong_input():
    with pytest.raises(ValueError, match="40 inputs do not divide into groups of 16"):
        rotate(torch.zeros(2, 40), 16, "regular")
    with pytest.raises(ValueError, match="a regular rotation has groups of 16, 64 or 256, not 32"):
        rotate(torch.zeros(2, 64), 32, "regular")
    with pytest.raises(ValueError, match="a rotation is regular or sylvester, not 'random'"):
        rotate(torch.zeros(2, 64), 32, "random")
