"""Norms that give codes, in the kernels that are compiled for this CPU: against the same in float64."""

import pytest
import torch
import torch.nn.functional as F

from ptq4dm.kernels.cpu import codes

pytestmark = pytest.mark.usefixtures("instructions")
SHAPES = [(2, 128, 8, 8, 32), (1, 24, 5, 7, 4), (2, 320, 4, 4, 32), (3, 40, 33, 1, 8), (1, 6, 1, 1, 3)]
DTYPES = [torch.float32, torch.bfloat16, torch.uint8]
GRID = (0.03, -20, 8)


def images(batch, channels, height, width, dtype, seed=0):
    x = torch.randn(batch, channels, height, width, generator=torch.Generator().manual_seed(seed))
    return (3 * x + 50).to(dtype).contiguous(memory_format=torch.channels_last)  # a mean far from zero


def vectors(*shape, seed=1):
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)) + 0.5


def check(y, exact, grid=GRID):
    """y against exact values, float64; a code may be off by one where the exact value is next to a tie."""
    assert y.shape == exact.shape
    if y.dtype != torch.uint8:
        bound = {torch.float32: 2e-5, torch.bfloat16: 2**-8}[y.dtype]
        assert ((y.double() - exact).abs() <= bound * (1 + exact.abs())).all()
        return
    scale, zero, bits = grid
    steps = exact / torch.tensor(scale).double()
    expected = (steps.round() + zero).clamp(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) + 128
    wrong = (y.double() - expected).abs()
    near = ((steps - steps.floor()) - 0.5).abs() < 1e-3
    assert (wrong[~near] == 0).all() and wrong.max() <= 1


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("given", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("silu", [True, False])
def test_group_norm(silu, given, dtype):
    for batch, channels, height, width, groups in SHAPES:
        x, gamma, beta = images(batch, channels, height, width, given), vectors(channels), vectors(channels, seed=2)
        for added in (None, vectors(batch, channels, seed=3)):
            y = codes.cpu_group_norm(x, added, gamma, beta, groups, 1e-5, silu, dtype, *GRID)
            exact = x.double() if added is None else x.double() + added.double()[:, :, None, None]
            exact = F.group_norm(exact, groups, gamma.double(), beta.double(), 1e-5)
            check(y, F.silu(exact) if silu else exact)
            assert y.dtype == dtype and y.permute(0, 2, 3, 1).is_contiguous()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("given", [None, torch.float32, torch.bfloat16])
def test_layer_norm(given, dtype):
    for batch, tokens, channels in [(2, 5, 256), (1, 3, 40), (3, 7, 5)]:
        x = images(batch, tokens, channels, 1, torch.float32)[..., 0]
        added = None if given is None else images(batch, tokens, channels, 1, given, seed=4)[..., 0]
        gate, gain, shift = (vectors(batch, channels, seed=seed) for seed in (5, 6, 7))
        sums, y = codes.cpu_layer_norm(x, added, gate, gain, shift, 1e-6, dtype, *GRID)
        exact = x.double() if added is None else x.double() + gate.double()[:, None] * added.double()
        normed = F.layer_norm(exact, (channels,), eps=1e-6) * gain.double()[:, None] + shift.double()[:, None]
        check(y, normed)
        assert sums.numel() == 0 if added is None else torch.allclose(sums.double(), exact, rtol=1e-6)
        if added is not None:
            assert torch.equal(codes.cpu_gated_sum(x, added, gate), sums)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("given", [torch.float32, torch.bfloat16])
def test_codes_of_values(given, bits):
    x = 6 * torch.randn(3, 41, generator=torch.Generator().manual_seed(0)).to(given)
    check(codes.cpu_codes(x, 0.25, 3, bits), x.double(), (0.25, 3, bits))
    images_of = x.view(3, 41, 1, 1).expand(3, 41, 2, 2).contiguous(memory_format=torch.channels_last)
    assert codes.cpu_codes(images_of, 0.25, 3, bits).is_contiguous(memory_format=torch.channels_last)


def test_values_that_have_no_code_are_zero_and_the_rest_is_clamped():
    x = torch.tensor([float("nan"), float("inf"), -float("inf"), 1e30, -1e30, 0.5, 1.5, -0.5])
    assert codes.cpu_codes(x, 1.0, 10, 8).tolist() == [138, 255, 0, 255, 0, 138, 140, 138]


def test_the_bits_do_not_depend_on_threads():
    x, gamma, beta = images(3, 128, 9, 7, torch.float32), vectors(128), vectors(128, seed=2)
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            found.append(codes.cpu_group_norm(x, None, gamma, beta, 32, 1e-5, True, torch.float32, *GRID))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(*found)


def test_the_formula_is_there_without_the_kernels(monkeypatch):
    x, gamma, beta = images(2, 24, 5, 7, torch.float32), vectors(24), vectors(24, seed=2)
    added, tokens = vectors(2, 24, seed=3), x.flatten(2).transpose(1, 2)
    calls = [
        lambda: codes.cpu_group_norm(x, added, gamma, beta, 4, 1e-5, True, torch.uint8, *GRID),
        lambda: codes.cpu_layer_norm(tokens, tokens, added, added, added, 1e-5, torch.uint8, *GRID)[1],
        lambda: codes.cpu_codes(tokens, *GRID),
    ]
    kernels = [call() for call in calls]
    monkeypatch.setattr(codes.library, "available", lambda: False)
    for kernel, call in zip(kernels, calls, strict=True):
        wrong = (kernel.int() - call().int()).abs()
        assert wrong.max() <= 1 and wrong.float().mean() < 1e-2
