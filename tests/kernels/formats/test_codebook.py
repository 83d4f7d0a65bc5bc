"""Codebook grids: the nearest of 16 levels, and what rounders ask of a grid."""

import pytest
import torch

import ptq4dm  # noqa: F401
from ptq4dm.kernels.formats.codebook import CodebookGrid, operand

LEVELS = [-127, -90, -71, -55, -40, -27, -15, -4, 3, 14, 26, 39, 54, 70, 91, 127]


def grid(by_row, n=6, groups=3, seed=0):
    generator = torch.Generator().manual_seed(seed)
    scales = torch.rand(n, groups, generator=generator) * 0.02 + 0.001
    levels = torch.tensor([LEVELS], dtype=torch.int8)
    if by_row:
        levels = torch.randint(-127, 128, (n, 16), generator=generator, dtype=torch.int8).sort(1).values
    return CodebookGrid(scales, levels), torch.randn(n, 12, generator=generator)


@pytest.mark.parametrize("by_row", [False, True])
def test_codes_are_those_of_the_nearest_level(by_row):
    book, weight = grid(by_row)
    values = book.levels.expand(6, -1).float()[:, None, :] * book.scales.repeat_interleave(4, 1)[:, :, None]
    off = (weight[:, :, None] - values).abs()
    found = book.codes(weight)
    assert found.dtype == torch.int8 and found.min() >= -8 and found.max() <= 7
    assert torch.allclose((weight - book.values(found)).abs(), off.amin(2), atol=1e-7)
    assert torch.equal(book.values(book.codes(book.values(found))), book.values(found))


@pytest.mark.parametrize("by_row", [False, True])
def test_columns_and_rows_are_parts_of_the_grid(by_row):
    book, weight = grid(by_row)
    order = torch.randperm(12, generator=torch.Generator().manual_seed(1))
    part, whole = book.columns(order), book.values(book.codes(weight))
    for place, column in enumerate(order):
        assert torch.equal(part.nearest(weight[:, column], place), whole[:, column])
    assert torch.equal(book.rows(slice(2, 4)).codes(weight[2:4]), book.codes(weight)[2:4])


def test_grids_of_several_parts_are_one():
    (one, weight), (other, more) = grid(False), grid(True, seed=1)
    both = CodebookGrid.stacked([one, other])
    assert both.levels.shape == (12, 16)
    assert torch.equal(both.codes(torch.cat([weight, more])), torch.cat([one.codes(weight), other.codes(more)]))


def test_the_lowest_code_is_the_lowest_level():
    codes = torch.arange(-8, 8, dtype=torch.int8)[None]
    assert operand(codes, torch.tensor([LEVELS], dtype=torch.int8)).tolist() == [LEVELS]
