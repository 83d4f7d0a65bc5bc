"""L1 normalization on codes: its formula and gradients in float64, what it keeps, and what a Gaussian sees of it."""

import math

import pytest
import torch
from diffusers.models.normalization import FP32LayerNorm
from torch import nn

from ptq4dm.layers.shift.l1 import RATIO
from ptq4dm.layers.shift.norms import ShiftGroupNorm, ShiftLayerNorm, normalizes

CASES = {
    "images": (lambda: nn.GroupNorm(4, 16), (3, 16, 5, 5)),
    "sequences": (lambda: nn.GroupNorm(4, 16), (3, 16, 12)),
    "tokens": (lambda: nn.LayerNorm(24), (2, 7, 24)),
    "tokens, plain": (lambda: nn.LayerNorm(24, elementwise_affine=False), (2, 7, 24)),
    "tokens, float32": (lambda: FP32LayerNorm(24), (2, 7, 24)),
}


def made(case, seed=0):
    """(norm, the same by the mean magnitude, input, gradient)."""
    build, size = CASES[case]
    torch.manual_seed(seed)
    norm = build()
    for parameter in norm.parameters():
        nn.init.normal_(parameter, 1.0, 0.4)
    shifted = ShiftGroupNorm(norm) if isinstance(norm, nn.GroupNorm) else ShiftLayerNorm(norm)
    return norm, shifted, torch.randn(size) * 2 + 0.5, torch.randn(size)


def exact(norm, x, gradient):
    """(y, dx, dgamma, dbeta) of the formula in float64, by autograd."""
    x = x.double().requires_grad_()
    groups = isinstance(norm, nn.GroupNorm)
    flat = x.reshape(len(x), norm.num_groups, -1) if groups else x
    centred = flat - flat.mean(-1, keepdim=True)
    width = (RATIO * centred.abs().mean(-1, keepdim=True)).clamp_min(math.sqrt(norm.eps))
    y = (centred / width).reshape(x.shape)
    affine = [p.detach().double().requires_grad_() for p in norm.parameters()]
    if affine:
        shape = (-1, *[1] * (x.ndim - 2)) if groups else (-1,)
        y = y * affine[0].reshape(shape) + affine[1].reshape(shape)
    y.backward(gradient.double())
    return [y.detach(), x.grad, *(p.grad for p in affine)]


def found(norm, x, gradient):
    x = x.clone().requires_grad_()
    norm.zero_grad()
    y = norm(x)
    y.backward(gradient)
    return [y.detach(), x.grad, *(p.grad.clone() for p in norm.parameters())]


def distance(one, other):
    return ((one - other).norm() / other.norm()).item()


@pytest.mark.parametrize("case", CASES)
def test_both_passes_follow_the_formula(case):
    norm, shifted, x, gradient = made(case)
    torch.manual_seed(1)
    for one, other in zip(found(shifted, x, gradient), exact(norm, x, gradient), strict=True):
        assert one.shape == other.shape and distance(one, other) < 0.03


@pytest.mark.parametrize("case", ["images", "tokens"])
def test_gradients_are_unbiased(case):
    norm, shifted, x, gradient = made(case)
    codes = x.clone()  # the input that the codes stand for: a rounded input is rounded to itself
    for _ in range(2):
        codes = dequantized(norm, codes)
    expected = exact(norm, codes, gradient)
    torch.manual_seed(1)
    draws = [found(shifted, codes, gradient)[1:] for _ in range(400)]
    for i, one in enumerate(expected[1:]):
        each = torch.stack([grads[i] for grads in draws]).double()
        z = (each.mean(0) - one) / (each.std(0) / 400**0.5 + 2e-5 * one.abs().max())
        assert z.abs().max() < 5 and z.square().mean() < 1.6


def dequantized(norm, x):
    groups = norm.num_groups if isinstance(norm, nn.GroupNorm) else 1
    flat = x.reshape(len(x), groups, -1) if groups > 1 else x
    step = flat.abs().amax(-1, keepdim=True) / 127
    return (torch.round(flat / step) * step).reshape(x.shape)


@pytest.mark.parametrize("case", CASES)
def test_what_is_kept_is_codes(case):
    _, shifted, x, _ = made(case)
    x, kept = x.requires_grad_(), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        shifted(x)
    assert sum(t.numel() for t in kept if t.dtype == torch.int8) == x.numel()
    assert all(t.numel() <= x.numel() // 4 for t in kept if t.dtype != torch.int8)


def test_gaussian_values_are_normalized_as_before():
    torch.manual_seed(0)
    for norm, x in (
        (nn.GroupNorm(4, 64), torch.randn(4, 64, 16, 16) * 3),
        (nn.LayerNorm(4096), torch.randn(8, 4096)),
    ):
        shifted = ShiftGroupNorm(norm) if isinstance(norm, nn.GroupNorm) else ShiftLayerNorm(norm)
        assert distance(shifted(x), norm(x)) < 0.015
        assert shifted(x).stride() == x.stride()


def test_constant_and_tiny_groups():
    norm = nn.GroupNorm(2, 8)
    shifted, x = ShiftGroupNorm(norm), torch.full((2, 8, 3, 3), 5.0).requires_grad_()
    shifted(x).square().sum().backward()
    assert x.grad.abs().max() < 1e-3 and shifted(x).abs().max() < 1e-3
    y = shifted(torch.randn(2, 8, 3, 3) * 1e-6)
    assert y.isfinite().all() and y.abs().max() < 1e-2  # eps is a floor
    assert not shifted(torch.full((2, 8, 3, 3), float("nan"))).isfinite().any()


def test_dtypes_and_memory_layout():
    _, shifted, x, _ = made("images")
    x = x.to(memory_format=torch.channels_last)
    assert shifted(x).is_contiguous(memory_format=torch.channels_last)
    y = shifted(x.bfloat16())
    assert y.dtype == torch.bfloat16 and distance(y.float(), shifted(x)) < 0.02


def test_which_norms_are_taken():
    assert all(normalizes(build()) for build, _ in CASES.values())
    assert not normalizes(nn.BatchNorm2d(4)) and not normalizes(nn.RMSNorm(4))
