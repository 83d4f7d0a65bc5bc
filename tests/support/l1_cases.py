"""Cases of L1 normalization, and kernels of it against its formula."""

import math

import torch

from ptq4dm.kernels.shift import l1_formula
from ptq4dm.kernels.shift.noise import noise_of

RATIO, EPS = math.sqrt(math.pi / 2), 1e-5
CASES = {  # rows, pixels, channels, groups
    "images": (3, 70, 24, 4),
    "groups of ten": (2, 33, 40, 4),
    "one group": (2, 17, 20, 1),
    "a channel each": (2, 300, 5, 5),
    "one pixel": (5, 1, 24, 3),
    "tokens": (13, 1, 48, 1),
    "wide tokens": (70, 1, 1152, 1),
}


def made(case, dtype, affine, device="cpu"):
    """(x, gamma, beta, dy): of rows with means and spreads of their own."""
    rows, pixels, channels, _ = CASES[case]
    g = torch.Generator().manual_seed(1)
    x = torch.randn(rows, pixels, channels, generator=g) * torch.logspace(-2, 1, rows)[:, None, None]
    x = x + torch.randn(rows, 1, channels, generator=g)
    dy = torch.randn(rows, pixels, channels, generator=g) * torch.logspace(0, -3, rows)[:, None, None]
    gamma, beta = (torch.randn(channels, generator=g) if affine else None for _ in range(2))
    return tuple(None if one is None else one.to(device) for one in (x.to(dtype), gamma, beta, dy.to(dtype)))


def compare(kernels, case, dtype, affine, device="cpu"):
    """Both passes of a module's kernels against the formula: codes to the bit, the rest as near as its dtype is."""
    number, seed = CASES[case][3], torch.tensor(2**40 + 5)
    given = made(case, dtype, affine)
    x, gamma, beta, dy = made(case, dtype, affine, device)
    y, codes, stats = kernels.normalize(x, gamma, beta, number, math.sqrt(EPS), RATIO)
    expected = l1_formula.normalized(*given[:3], number, EPS, RATIO)
    assert torch.equal(codes.cpu(), expected[1]) and y.dtype == dtype
    torch.testing.assert_close(stats.cpu(), expected[2], rtol=1e-5, atol=1e-6)
    tolerance = 1e-5 if dtype == torch.float32 else 8e-3
    torch.testing.assert_close(y.cpu(), expected[0], rtol=tolerance, atol=tolerance)
    dx, sums = kernels.gradient(dy, codes, stats, gamma, seed.to(device))
    noise = noise_of(seed, dy.numel()).view(dy.shape)
    by_input, by_affine = l1_formula.gradient(given[3], *expected[1:], given[1], noise)
    for one, other in ((dx, by_input), (sums, by_affine)):
        assert one.dtype == other.dtype and one.shape == other.shape
        close = tolerance * other.float().abs().max().item()
        torch.testing.assert_close(one.cpu(), other, rtol=tolerance, atol=close + 1e-12)
    assert by_affine.any() == affine


def check_flat_and_undefined(kernels, number):
    """Of a constant group eps is the floor, and a NaN stays one, in its group alone."""
    x = torch.full((2, 6 if number > 1 else 1, 8), 3.0)
    x[1, 0, 5] = float("nan")
    y, _, stats = kernels.normalize(x, None, None, number, 1e-2, RATIO)
    assert y[0].abs().max() < 1e-3 and (stats[4, 0] == 0).all() and (stats[2, 0] == torch.tensor(1e-2)).all()
    size = 8 // number
    assert y[1, :, 5 // size * size :].isnan().all() and y[1, :, : 5 // size * size].isfinite().all()
