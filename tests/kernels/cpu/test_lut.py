"""Look-up tables on this CPU: outputs against whole numbers and float64, the same bits however it is run."""

import pytest
import torch

from ptq4dm.kernels.cpu import library, lut
from ptq4dm.kernels.formats import bcq
from ptq4dm.kernels.formats.bcq import BinaryGrid
from ptq4dm.kernels.lut.layer import bcq_linear
from ptq4dm.kernels.lut.reference import reference

compiled = pytest.mark.usefixtures("compiled")
SHAPES = [(1, 5, 27), (2, 64, 32), (3, 70, 192), (5, 130, 256), (17, 33, 1024), (4, 1, 130), (1, 200, 1100)]


def operands(n, k, group, bits, offsets=True, dtype=torch.float16):
    """(weight [N, K] float64, scales and offsets of all inputs, words, alphas, offsets of tiles)."""
    generator = torch.Generator().manual_seed(n + k + bits)
    groups = 1 if group is None else k // group
    codes = torch.randint(0, 2**bits, (n, k), generator=generator, dtype=torch.int8)
    alphas = torch.rand(n, groups, bits, generator=generator).to(dtype)
    shift = torch.randn(n, groups, generator=generator).to(dtype) if offsets else None
    grid = BinaryGrid(alphas.double(), None if shift is None else shift.double())
    weight = grid.values(codes).double()
    return weight, bcq.pack(codes, bits), bcq.tiled(alphas), None if shift is None else bcq.tiled(shift)


def whole(x, group):
    """x rounded as the kernel does, float64, and the steps of all inputs."""
    size = lut.UNIT if group is None else group
    parts, steps = [], []
    for part in x.split(size, 1):
        step = part.abs().amax(1, keepdim=True) / lut.LIMIT
        codes = (part * (1 / step.double()).float()).clamp(-lut.LIMIT, lut.LIMIT).round()
        parts.append(codes.double() * step.double())
        steps.append(step.expand_as(part))
    return torch.cat(parts, 1), torch.cat(steps, 1)


@pytest.mark.parametrize("bits", [1, 2, 3, 4])
@pytest.mark.parametrize("group", [None, 32, 64, 128])
def test_outputs_are_those_of_the_formula(bits, group, instructions):
    seen = 0
    for m, n, k in SHAPES:
        if group and k % group:
            continue
        for offsets, dtype in ((False, torch.float16), (True, torch.float16), (True, torch.bfloat16)):
            weight, words, alphas, shift = operands(n, k, group, bits, offsets, dtype)
            x, bias = torch.randn(m, k), torch.randn(n)
            found = lut.linear(x, words, alphas, shift, bias, n)
            near, steps = whole(x, group)
            right = near @ weight.T + bias.double()
            units = -(-k // (group or lut.UNIT))
            alone = bcq.rows_of(alphas, n).double().sum(-1).amax(1)  # no term is more than this times |x|
            most = alone + (0 if shift is None else bcq.rows_of(shift, n).double().abs().amax(1))
            bound = near.abs().sum(1, keepdim=True) * most + bias.abs().double()
            assert ((found - right).abs() <= (units * (bits + 1) + 3) * 2**-23 * bound).all(), (m, n, k, dtype)
            exact = x.double() @ weight.T + bias.double()
            rounding = (steps.double() / 2 * 1.001) @ weight.abs().T
            assert ((found - exact).abs() <= rounding + 1e-5 * bound).all(), (m, n, k, dtype)
            seen += 1
    assert seen


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_close_to_float64(bits, instructions):
    """Relative error of a layer's outputs on normal inputs: far below what rounding to 16 bits makes of them."""
    for group in (64, 128, None):
        weight, words, alphas, shift = operands(300, 1152, group, bits, False)
        x = torch.randn(4, 1152)
        right = x.double() @ weight.T
        found = lut.linear(x, words, alphas, shift, None, 300)
        assert (found - right).norm() <= 3e-4 * right.norm()


@compiled
def test_same_bits_for_all_instructions_threads_and_rows(monkeypatch):
    monkeypatch.setattr(library, "_found", library.found())
    weight, words, alphas, shift = operands(200, 512, 128, 3)
    x, before = torch.randn(7, 512), torch.get_num_threads()
    found = []
    for name in library.FLAGS:
        try:
            library.use(name)
        except ValueError:
            continue
        for threads in (1, 2):
            torch.set_num_threads(threads)
            found.append(lut.linear(x, words, alphas, shift, None, 200))
        found.append(torch.cat([lut.linear(row[None], words, alphas, shift, None, 200) for row in x]))
    torch.set_num_threads(before)
    assert len(found) >= 3 and all(torch.equal(one, found[0]) for one in found)


@compiled
def test_extremes(instructions):
    """Zeros, rows of one large input, all signs alike, and what is not finite."""
    weight, words, alphas, shift = operands(70, 256, 64, 4)
    zero = lut.linear(torch.zeros(2, 256), words, alphas, shift, None, 70)
    assert not zero.any()
    x = torch.zeros(3, 256)
    x[0, 5], x[1, 255], x[2] = 3e4, -1e-30, 1e3
    right = x.double() @ weight.T
    found = lut.linear(x, words, alphas, shift, None, 70)
    assert ((found - right).abs() <= 1e-5 * (x.double().abs() @ weight.abs().T) + 1e-36).all()
    x[0, 9], x[1, 9] = float("nan"), float("inf")
    found = lut.linear(x, words, alphas, shift, None, 70)
    assert not found[:2].isfinite().any() and found[2].isfinite().all()


@compiled
def test_the_op_runs_it(monkeypatch):
    weight, words, alphas, shift = operands(70, 256, 64, 2)
    x = torch.randn(2, 3, 256, dtype=torch.bfloat16)
    called = []
    monkeypatch.setattr("ptq4dm.kernels.lut.layer._LINEAR", {lut.NAME: lambda *a: called.append(1) or lut.linear(*a)})
    y = bcq_linear(x, words, alphas, shift, None, 70)
    assert called and y.dtype == torch.bfloat16 and y.shape == (2, 3, 70)
    right = reference(x.double().reshape(6, 256), words, alphas, shift, None, 70)
    assert (y.double().view(6, 70) - right).norm() < 5e-3 * right.norm()
