"""L1 normalization in Triton against its formula: codes and what is kept, both results, any split into groups."""

import math

import pytest
import torch

from ptq4dm.kernels.shift import l1, l1_groups, l1_rows
from ptq4dm.kernels.shift.noise import noise_of

RATIO = math.sqrt(math.pi / 2)
CASES = {  # rows, pixels, channels, groups
    "images": (3, 70, 24, 4),
    "groups of ten": (2, 33, 40, 4),
    "one group": (2, 17, 20, 1),
    "a channel each": (2, 300, 5, 5),
    "one pixel": (5, 1, 24, 3),
    "tokens": (13, 1, 48, 1),
    "wide tokens": (3, 1, 1152, 1),
}


def made(case, dtype, affine, device="cpu"):
    """(x, gamma, beta, dy): of groups with means and spreads of their own."""
    rows, pixels, channels, _ = CASES[case]
    g = torch.Generator().manual_seed(1)
    x = torch.randn(rows, pixels, channels, generator=g) * torch.logspace(-2, 1, rows)[:, None, None]
    x = x + torch.randn(rows, 1, channels, generator=g)
    dy = torch.randn(rows, pixels, channels, generator=g) * torch.logspace(0, -3, rows)[:, None, None]
    gamma, beta = (torch.randn(channels, generator=g) if affine else None for _ in range(2))
    return tuple(None if one is None else one.to(device) for one in (x.to(dtype), gamma, beta, dy.to(dtype)))


def kernels_of(case):
    return l1_rows if CASES[case][1] == CASES[case][3] == 1 else l1_groups


def compare(case, dtype, affine, device="cpu"):
    number, seed = CASES[case][3], torch.tensor(2**40 + 5)
    given = made(case, dtype, affine)
    x, gamma, beta, dy = made(case, dtype, affine, device)
    y, codes, stats = kernels_of(case).normalize(x, gamma, beta, number, math.sqrt(1e-5), RATIO)
    expected = l1.normalized(*given[:3], number, 1e-5, RATIO)
    assert torch.equal(codes.cpu(), expected[1]) and y.dtype == dtype
    torch.testing.assert_close(stats.cpu(), expected[2], rtol=1e-5, atol=1e-6)
    tolerance = 1e-5 if dtype == torch.float32 else 8e-3
    torch.testing.assert_close(y.cpu(), expected[0], rtol=tolerance, atol=tolerance)
    dx, sums = kernels_of(case).gradient(dy, codes, stats, gamma, seed.to(device))
    noise = noise_of(seed, dy.numel()).view(dy.shape)
    by_input, by_affine = l1.gradient(given[3], *expected[1:], given[1], noise)
    for one, other in ((dx, by_input), (sums, by_affine)):
        assert one.dtype == other.dtype and one.shape == other.shape
        close = tolerance * other.float().abs().max().item()
        torch.testing.assert_close(one.cpu(), other, rtol=tolerance, atol=close + 1e-12)
    assert by_affine.any() == affine


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize(("dtype", "affine"), [(torch.float32, True), (torch.bfloat16, False)])
def test_kernels_are_the_formula(case, dtype, affine, monkeypatch):
    for kernels in (l1_groups, l1_rows):  # tiles that a case needs several of
        monkeypatch.setattr(kernels, "VALUES", 512)
    compare(case, dtype, affine)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_gpu_computes_the_formula(case, dtype, affine):
    compare(case, dtype, affine, "cuda")


def test_flat_and_undefined_groups():
    """Of a constant group eps is the floor, and a NaN stays one, in its group alone."""
    x = torch.full((2, 6, 8), 3.0)
    x[1, 2, 5] = float("nan")
    for kernels, number, x in ((l1_groups, 2, x), (l1_rows, 1, x[:, :1] * 1.0)):
        y, _, stats = kernels.normalize(x.contiguous(), None, None, number, 1e-2, RATIO)
        assert y[0].abs().max() < 1e-3 and (stats[4, 0] == 0).all() and (stats[2, 0] == torch.tensor(1e-2)).all()
        if number == 2:
            assert y[1, :, 4:].isnan().all() and y[1, :, :4].isfinite().all()


def test_ops_on_a_cpu_are_the_formula_and_sums_that_may_pass_an_int32_are_refused():
    x, gamma, beta, dy = made("images", torch.float32, True)
    y, codes, stats = l1.shift_l1_norm(x, gamma, beta, 4, 1e-5, RATIO)
    assert torch.equal(y, l1.normalized(x, gamma, beta, 4, 1e-5, RATIO)[0])
    dx, sums = l1.shift_l1_gradient(dy, codes, stats, gamma, torch.tensor(7))
    assert dx.shape == x.shape and sums.shape == (2, 24)
    with pytest.raises(ValueError, match="sums over 70000 x 2 codes of 8 bits may pass an int32"):
        l1.shift_l1_norm(torch.zeros(1, 1, 4).expand(1, 70000, 4), None, None, 2, 1e-5, RATIO)
