"""Weights in clusters: packed bits and clusters come back, and the two formulas."""

import pytest
import torch

from ptq4dm.kernels.formats.clusters import (
    code_values,
    literal_values,
    pack_bits,
    pack_thirds,
    unpack_bits,
    unpack_thirds,
)


def numbers(rows, columns, below, seed=0):
    return torch.randint(below, (rows, columns), generator=torch.Generator().manual_seed(seed)).to(torch.uint8)


@pytest.mark.parametrize("columns", [1, 3, 8, 17, 40])
@pytest.mark.parametrize("bits", range(1, 9))
def test_bits_come_back(bits, columns):
    codes = numbers(3, columns, 2**bits)
    packed = pack_bits(codes, bits)
    assert packed.shape == (3, -(-columns * bits // 8)) and packed.dtype == torch.uint8
    assert torch.equal(unpack_bits(packed, bits, columns), codes)
    codes.fill_(2**bits - 1)
    assert torch.equal(unpack_bits(pack_bits(codes, bits), bits, columns), codes)


@pytest.mark.parametrize("columns", [1, 4, 5, 23])
def test_clusters_come_back(columns):
    ids = numbers(4, columns, 3)
    packed = pack_thirds(ids)
    assert packed.shape == (4, -(-columns // 5)) and torch.equal(unpack_thirds(packed, columns), ids)
    assert int(pack_thirds(torch.full((1, 5), 2, dtype=torch.uint8))) == 242


def test_bits_lie_lowest_first():
    assert pack_bits(torch.tensor([[1, 2, 3, 0]], dtype=torch.uint8), 2).item() == 0b00111001
    assert pack_thirds(torch.tensor([[1, 2]], dtype=torch.uint8)).item() == 1 + 3 * 2


@pytest.mark.parametrize("rows", [1, 4])
def test_values_are_those_of_the_formulas(rows):
    low, step = torch.randn(rows, 3), torch.rand(rows, 3)
    codes, ids = numbers(4, 7, 4), numbers(4, 7, 3, seed=1)
    found = code_values(codes, ids, low, step)
    zeros, three = numbers(rows, 3, 4, seed=2), torch.stack([numbers(4, 7, 4, seed=3 + i) for i in range(3)])
    summed = literal_values(three, zeros, step)
    for n in range(4):
        r = 0 if rows == 1 else n
        for k in range(7):
            c = int(ids[n, k])
            assert found[n, k] == low[r, c] + step[r, c] * int(codes[n, k])
            expected = sum(step[r, c] * (int(three[c, n, k]) - int(zeros[r, c])) for c in range(3))
            assert torch.isclose(summed[n, k], expected, atol=1e-6)
