"""Convolutions in the kernel that is compiled for this CPU: against float64, and against whole numbers."""

import pytest
import torch
import torch.nn.functional as F

from ptq4dm.kernels.cpu import w4a8_conv
from ptq4dm.kernels.cpu.w4a8_conv import cpu_w4a8_conv2d
from ptq4dm.kernels.formats.int4 import pack_int4

compiled = pytest.mark.usefixtures("compiled")
GEOMETRIES = [  # B, C, N, H, W, kernel, stride, padding, dilation
    (2, 32, 70, 7, 5, (3, 3), (1, 1), (1, 1), (1, 1)),
    (3, 64, 17, 9, 11, (3, 2), (2, 1), (0, 1), (1, 2)),
    (1, 128, 64, 6, 6, (1, 1), (1, 1), (0, 0), (1, 1)),
    (2, 5, 3, 8, 4, (3, 3), (2, 2), (1, 1), (1, 1)),
    (1, 96, 5, 5, 9, (5, 5), (3, 1), (4, 2), (2, 1)),
    (1, 64, 33, 40, 40, (3, 3), (1, 1), (1, 1), (1, 1)),
    (2, 64, 9, 1, 1, (3, 3), (1, 1), (1, 1), (1, 1)),
]


def weight(n, channels, kernel, group, zeros, progressive=False, seed=0):
    """(w [N, C, kh, kw] float64, qweight, wscales, wzeros, wsteps)."""
    generator, k = torch.Generator().manual_seed(seed), kernel[0] * kernel[1] * channels
    groups = 1 if group is None else k // group
    whole = lambda low, high, *shape: torch.randint(  # noqa: E731
        low, high + 1, shape, generator=generator, dtype=torch.int8
    )
    codes, wzeros = whole(-8, 7, n, k), whole(-8, 7, n, groups) if zeros else None
    wsteps = whole(1, 16, n, groups) if progressive else None
    wscales = torch.rand(n, *(() if progressive else (groups,)), generator=generator) + 0.1
    wscales = wscales if group is None or progressive else wscales.half()
    steps = codes.double().unflatten(1, (groups, -1)) - (0 if wzeros is None else wzeros[:, :, None])
    factors = wsteps * wscales.double()[:, None] if progressive else wscales.double()
    operand = (steps * factors[:, :, None]).flatten(1).unflatten(1, (*kernel, channels)).permute(0, 3, 1, 2)
    return operand, pack_int4(F.pad(codes, (0, -k % 64)), 64), wscales, wzeros, wsteps


def rounded(x, scale, zero):
    """What the 8-bit codes of x stand for, float64; scale None: dynamic, by picture."""
    if scale is None:
        step = x.abs().amax((1, 2, 3), keepdim=True) / 127
        return (x * (1.0 / step.double()).float()).round().double() * step.double()
    return ((x * (1 / scale)).round() + zero).clamp(-128, 127).sub(zero).double() * scale


def run(x, operands, bias, scale, zero, geometry):
    grid = (None, None) if scale is None else (torch.tensor(scale), torch.tensor(zero, dtype=torch.int32))
    return cpu_w4a8_conv2d(x, *operands, bias, *grid, 8, *map(list, geometry))


@compiled
@pytest.mark.parametrize("progressive", [False, True], ids=["scales", "steps"])
@pytest.mark.parametrize("zeros", [False, True], ids=["symmetric", "zeros"])
@pytest.mark.parametrize("scale, zero", [(None, 0), (0.03125, 9), (0.03125, -128)])
def test_outputs_are_those_of_the_formula(scale, zero, zeros, progressive):
    for batch, channels, n, height, width, kernel, *rest in GEOMETRIES:
        for group in (None, 32, 64, 128):
            k = kernel[0] * kernel[1] * channels
            if group and channels % group:
                continue
            operand, *operands = weight(n, channels, kernel, group, zeros, progressive)
            x, bias = torch.randn(batch, channels, height, width), torch.randn(n)
            found = run(x, operands, bias, scale, zero, (kernel, *rest))
            seen = rounded(x, scale, zero)
            right = F.conv2d(seen, operand, bias.double(), *rest)
            bound = F.conv2d(seen.abs(), operand.abs(), bias.abs().double(), *rest)
            groups = 1 if group is None else k // group
            assert found.shape == right.shape and found.is_contiguous(memory_format=torch.channels_last)
            assert ((found - right).abs() <= (groups + 2) * 2**-24 * bound).all(), (channels, group)
            grid = (None, None) if scale is None else (torch.tensor(scale), torch.tensor(zero))
            size = w4a8_conv.sizes(x.shape, kernel, *rest)
            formula = w4a8_conv.reference(x, *operands, bias, *grid, 8, size)
            assert (formula - right).abs().max() <= 2e-7 * bound.max()


@compiled
@pytest.mark.parametrize("group", [None, 64])
def test_sums_are_whole_numbers_to_the_last_bit(group, instructions):
    """Inputs whose scale is 1 and weights whose scales are 1; over many windows and few."""
    for side in (1, 2, 19):
        codes, qweight, wscales, wzeros, _ = weight(70, 64, (3, 3), group, True)
        codes = (codes / _wide(wscales, codes)).round()
        x = torch.randint(-127, 128, (2, 64, side, side)).float()
        x[:, 0, 0, 0] = 127
        found = run(x, (qweight, torch.ones_like(wscales), wzeros, None), None, None, 0, ((3, 3), *[(1, 1)] * 3))
        right = F.conv2d(x.double(), codes, padding=1)
        assert right.abs().max() < 2**24 and torch.equal(found.double(), right)


@compiled
def test_a_picture_is_the_same_alone_and_among_others_and_on_all_threads():
    _, *operands = weight(40, 64, (3, 3), 64, True)
    x, geometry, before = torch.randn(5, 64, 21, 20), ((3, 3), (1, 1), (1, 1), (1, 1)), torch.get_num_threads()
    together = run(x, operands, None, None, 0, geometry)
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            alone = torch.cat([run(one, operands, None, None, 0, geometry) for one in x.split(1)])
            assert torch.equal(alone, together)
    finally:
        torch.set_num_threads(before)


@compiled
def test_pictures_without_codes_are_nan_and_no_others():
    _, *operands = weight(20, 32, (3, 3), 32, False)
    x, geometry = torch.randn(3, 32, 6, 6), ((3, 3), (1, 1), (1, 1), (1, 1))
    right = run(x, operands, None, None, 0, geometry)
    x[1, 3, 2, 2] = float("nan")
    found = run(x, operands, None, None, 0, geometry)
    assert found[1].isnan().all() and torch.equal(found[[0, 2]], right[[0, 2]])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_dtypes_strides_and_what_the_compiler_sees(dtype):
    _, *operands = weight(24, 32, (3, 3), 32, True)
    geometry = ([3, 3], [1, 1], [1, 1], [1, 1])
    x = torch.randn(2, 32, 6, 10).to(dtype)[:, :, :, ::2]
    found = cpu_w4a8_conv2d(x, *operands, None, None, None, 8, *geometry)
    right = cpu_w4a8_conv2d(x.float().contiguous(), *operands, None, None, None, 8, *geometry)
    assert found.dtype == dtype and torch.equal(found, right.to(dtype))
    assert cpu_w4a8_conv2d(x[:0], *operands, None, None, None, 8, *geometry).shape == (0, 24, 6, 5)
    if dtype == torch.float32:
        torch.library.opcheck(
            torch.ops.ptq4dm.cpu_w4a8_conv2d.default, (x, *operands, None, None, None, 8, *geometry)
        )


def test_sizes_that_do_not_belong_together():
    _, *operands = weight(24, 32, (3, 3), 32, True)
    with pytest.raises(ValueError, match="are packed as"):
        cpu_w4a8_conv2d(torch.randn(1, 64, 4, 4), *operands, None, None, None, 8, [3, 3], [1, 1], [1, 1], [1, 1])


def _wide(wscales, weight):
    """Scales [N, G] as those of each weight [N, C, kh, kw], whose groups are along (kh, kw, C)."""
    n, channels, *kernel = weight.shape
    wide = wscales.double().repeat_interleave(weight[0].numel() // wscales.shape[1], 1)
    return wide.unflatten(1, (*kernel, channels)).permute(0, 3, 1, 2)
