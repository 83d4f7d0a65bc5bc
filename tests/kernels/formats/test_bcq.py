"""Binary-coded weights: the fit against every choice there is, uniform grids as sums of planes, packing."""

import itertools

import pytest
import torch

from ptq4dm.kernels.formats import bcq
from ptq4dm.kernels.formats.bcq import BinaryGrid
from ptq4dm.ranges.weights import weight_grid

CODES = [(1, 1), (3, 31), (64, 32), (70, 33), (130, 200)]


def weight(n, k, seed=0):
    return torch.randn(n, k, generator=torch.Generator().manual_seed(seed))


def error(rows, grid):
    return (rows - grid.values(grid.codes(rows))).double().square().sum(1)


def least_error(row, bits):
    """Of all sign planes there are, each with its best scales, float64."""
    planes = torch.tensor(list(itertools.product([-1.0, 1.0], repeat=len(row)))).double()[: 2 ** (len(row) - 1)]
    least = float("inf")
    for chosen in itertools.combinations(planes, bits):
        basis = torch.stack(chosen, 1)
        left = row - basis @ torch.linalg.lstsq(basis, row[:, None]).solution[:, 0]
        least = min(least, float(left.square().sum()))
    return least


@pytest.mark.parametrize("bits, size, far", [(1, 8, 1 + 1e-6), (2, 6, 1.25)])
def test_fit_is_as_good_as_the_best_of_all_planes(bits, size, far):
    """Alternating steps end in a minimum that need not be the least: how far from it, over 40 groups, is bounded."""
    rows = weight(40, size, 1)
    found = error(rows, bcq.fit(rows, bits))
    best = torch.tensor([least_error(row.double(), bits) for row in rows])
    assert (found >= best * (1 - 1e-5) - 1e-9).all()
    assert found.sum() <= far * best.sum()


@pytest.mark.parametrize("bits", [1, 2, 3, 4])
def test_no_round_raises_the_error(bits):
    rows = weight(50, 64)
    errors = torch.stack([error(rows, bcq.fit(rows, bits, None, rounds)) for rounds in range(6)])
    assert (errors[1:] <= errors[:-1] * (1 + 1e-5)).all()
    if bits > 1:
        assert errors[5].sum() < 0.95 * errors[0].sum()


def test_emphasis_keeps_large_weights():
    """Plain least squares make weights shorter, the large ones most; errors that count by |w| make up for it."""
    rows = weight(50, 128)
    large = rows.abs() > 2
    shorter = []
    for emphasis in (0.0, 1.0):
        grid = bcq.fit(rows, 2, None, 15, emphasis)
        values = grid.values(grid.codes(rows))
        shorter.append(
            [float(1 - (values * rows)[part].sum() / rows.square()[part].sum()) for part in (large, rows != 0)]
        )
    assert shorter[0][0] > 0.1 and shorter[0][1] > 0.05
    assert shorter[1][0] < 0.7 * shorter[0][0] and shorter[1][1] < 0.7 * shorter[0][1]


def test_greedy_start_by_hand():
    """Signs and mean magnitude: 1.75, then what is left of it, of magnitudes 0.75, 0.25, 0.75, 0.25."""
    grid = bcq.fit(torch.tensor([[1.0, -2.0, 2.5, -1.5]]), 2, None, 0)
    assert grid.alphas.flatten().tolist() == [1.75, 0.5]
    assert grid.values(grid.codes(torch.tensor([[1.0, -2.0, 2.5, -1.5]]))).tolist() == [[1.25, -2.25, 2.25, -1.25]]


@pytest.mark.parametrize("rows", [torch.zeros(2, 32), torch.ones(2, 32), torch.full((2, 32), -3.0)])
def test_planes_that_are_alike_have_finite_scales(rows):
    grid = bcq.fit(rows, 3)
    assert grid.alphas.isfinite().all() and (grid.alphas >= 0).all()
    torch.testing.assert_close(grid.values(grid.codes(rows)), rows)


@pytest.mark.parametrize("bits", [1, 2, 3, 4])
@pytest.mark.parametrize("group_size", [None, 32, 64])
@pytest.mark.parametrize("affine", [True, False])
def test_uniform_grids_are_sums_of_planes(bits, group_size, affine):
    """The same codes, counted from 0, and the same values; there and back."""
    if bits == 1 and not affine:
        pytest.skip("a symmetric grid of one bit has one code")
    rows = weight(20, 128)
    uniform = weight_grid(rows, bits, "max", None, group_size, affine)
    binary, codes = bcq.from_uniform(uniform), uniform.codes(rows)
    assert binary.bits == bits
    torch.testing.assert_close(binary.values(codes - uniform.low), uniform.values(codes), rtol=0, atol=1e-6)
    assert torch.equal(binary.codes(uniform.values(codes)), codes - uniform.low)
    stored = BinaryGrid(binary.alphas.half(), binary.offsets.half())  # as layers keep them
    assert torch.equal(stored.codes(uniform.values(codes)), codes - uniform.low)
    packed = bcq.pack(codes - uniform.low, bits)
    assert torch.equal(bcq.unpack(packed, 20, 128) + uniform.low, codes)


@pytest.mark.parametrize("n, k", CODES)
@pytest.mark.parametrize("bits", [1, 2, 3, 4])
def test_packing(n, k, bits):
    codes = torch.randint(0, 2**bits, (n, k), generator=torch.Generator().manual_seed(k), dtype=torch.int8)
    words = bcq.pack(codes, bits)
    assert words.shape == (-(-n // 64), -(-k // 32), bits, 64) and words.dtype == torch.int32
    assert torch.equal(bcq.unpack(words, n, k), codes)
    row, column = n - 1, k - 1  # by hand: bit j of a word is the sign of input 32 w + j
    word = int(words[row // 64, column // 32, bits - 1, row % 64])
    assert (word >> (column % 32 // 2 + column % 2 * 16) & 1) == (int(codes[row, column]) >> (bits - 1) & 1)


def test_scales_of_tiles():
    for shape in ((70, 3, 2), (64, 1, 4), (130, 5)):
        scales = torch.rand(shape)
        tiles = bcq.tiled(scales)
        assert tiles.shape == (-(-shape[0] // 64), *shape[1:], 64)
        assert torch.equal(bcq.rows_of(tiles, shape[0]), scales)
        assert not tiles.movedim(-1, 1).flatten(0, 1)[shape[0] :].any()


def test_nearest_of_one_column_is_that_of_all():
    rows = weight(30, 64)
    grid = bcq.fit(rows, 2, 32)
    order = torch.randperm(64, generator=torch.Generator().manual_seed(0))
    ordered, values = grid.columns(order), grid.values(grid.codes(rows))
    for place in (0, 17, 63):
        torch.testing.assert_close(ordered.nearest(rows[:, order[place]], place), values[:, order[place]])
    part = grid.rows(slice(5, 9))
    assert torch.equal(part.codes(rows[5:9]), grid.codes(rows)[5:9])
    both = BinaryGrid.stacked([grid.rows(slice(0, 7)), grid.rows(slice(7, 30))])
    assert torch.equal(both.alphas, grid.alphas) and both.offsets is None


def test_groups_that_do_not_divide():
    with pytest.raises(ValueError, match="33 columns do not divide into groups of 32"):
        bcq.fit(weight(2, 33), 2, 32)
