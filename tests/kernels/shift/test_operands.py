"""Codes that a GPU's products read, and these products: each kernel against its formula, which is exact."""

import pytest
import torch
import torch.nn.functional as F

from ptq4dm.kernels.formats import shift
from ptq4dm.kernels.shift import operands
from ptq4dm.kernels.shift.noise import noise_of, philox
from ptq4dm.kernels.w8a8.window import same_window

pytest.importorskip("triton")
from ptq4dm.kernels.shift import over_rows, rounding  # noqa: E402

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
pytestmark = [pytest.mark.gpu] * CUDA
IMAGES = {  # batch, height, width, channels, padding
    "images": (3, 7, 5, 40, (1, 1)),
    "a wide image": (2, 3, 40, 70, (2, 0)),
    "tokens": (300, 1, 1, 72, (0, 0)),
    "samples": (3, 1, 100, 33, (0, 0)),
}


def uneven(*size, seed=0):
    """Rows and columns whose magnitudes differ by powers of two, and some that are zero."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(size, generator=g) * torch.logspace(-1.5, 0, size[0]).reshape(-1, *[1] * (len(size) - 1))
    x *= torch.exp2(torch.randn(size[-1], generator=g) * 2)
    x[0], x[..., 2] = 0, 0
    return x.to(DEVICE)


def same(found, expected):
    for one, other in zip(found, expected, strict=True):
        assert one.dtype == other.dtype and torch.equal(one, other)


@pytest.mark.parametrize("kind", IMAGES)
@pytest.mark.parametrize(("bits", "groups"), [(6, 3), (4, 5), (6, 1), (8, 1)])
@pytest.mark.parametrize("noise", [False, True])
def test_images_in_codes(kind, bits, groups, noise):
    *size, padding = IMAGES[kind]
    x = uneven(*size).to(torch.bfloat16 if groups == 3 else torch.float32)
    window = same_window(*size[:3], padding=padding)
    seed = torch.tensor(2**61 + 12345, device=DEVICE) if noise else None
    expected = operands.images_in_torch(x, bits, groups, window, seed)
    same(rounding.encode_images(x, bits, groups, padding, seed), expected)
    assert expected[0].unique().numel() > 10 and expected[0].abs().max() >= 2 ** (bits - 1) - 1


@pytest.mark.parametrize("size", [(48, 3, 3, 40), (5, 1, 1, 96), (70, 2, 1, 3)])
@pytest.mark.parametrize(("bits", "groups"), [(6, 3), (8, 1)])
def test_a_weight_in_codes(size, bits, groups):
    weight = uneven(*size)
    expected = operands.shift_weight(weight.cpu(), bits, groups)
    same([one.cpu() for one in rounding.encode_weight(weight, bits, groups)], expected)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_makes_the_steps_so(value):
    x = uneven(2, 4, 4, 32)
    x[1, 2, 3, 4] = value
    found = rounding.encode_images(x, 6, 3, (1, 1), None)
    assert not found[2].isfinite().any() and not found[3].isfinite().any()
    same(
        rounding.encode_images(torch.zeros_like(x), 6, 3, (1, 1), None)[:2], [torch.zeros_like(t) for t in found[:2]]
    )


@pytest.mark.parametrize("window", [
    same_window(3, 7, 5, (3, 3), padding=(1, 1)), same_window(2, 9, 9, (3, 3), padding=(2, 2), dilation=(2, 2)),
    same_window(2, 8, 6, (3, 2), padding=(0, 1)), same_window(300, 1, 1),
], ids=["3x3", "dilated", "3x2", "tokens"])  # fmt: skip
@pytest.mark.parametrize("tma", [False, True])
@pytest.mark.parametrize("most", [None, 128])
def test_the_product_over_rows_is_exact(window, tma, most, monkeypatch):
    if CUDA and tma and torch.cuda.get_device_capability() < (9, 0):
        pytest.skip("TMA is of Hopper and later")
    if not CUDA and tma and window.taps > 1:
        pytest.skip("the interpreter refuses blocks that begin at any byte, which the hardware takes")
    monkeypatch.setattr(over_rows, "capability", lambda device: (9, 0) if tma else (8, 0))
    monkeypatch.setattr(over_rows, "LEAST", 1)
    if most is not None:
        monkeypatch.setattr(over_rows, "TERMS", most)
    over_rows._plan.cache_clear()
    g = torch.Generator().manual_seed(0)
    n, c = 40, 70
    around = tuple(d * (k - 1) - p for k, p, d in zip(window.kernel, window.padding, window.dilation, strict=True))
    output = same_window(window.batch, *window.output, padding=around)

    def codes(of, channels):
        x = torch.randint(-127, 128, (of.batch, channels, of.h, of.w), generator=g, dtype=torch.int8)
        flat = torch.zeros(operands._long(of), channels, dtype=torch.int8)
        operands.images(flat, of, channels).copy_(x)
        return x.double(), flat.T.contiguous().to(DEVICE)

    (d, d_codes), (x, x_codes) = codes(output, n), codes(window, c)
    d_steps, x_steps = torch.rand(n, generator=g), torch.rand(c, generator=g)
    weight = torch.zeros(n, c, *window.kernel, dtype=torch.float64, requires_grad=True)
    F.conv2d(x, weight, None, 1, window.padding, window.dilation).backward(d)
    expected = weight.grad.permute(0, 2, 3, 1) * d_steps[:, None, None, None] * x_steps
    given = d_codes, x_codes, d_steps.to(DEVICE), x_steps.to(DEVICE)
    found = over_rows.weight_gradient(*given, window)
    torch.testing.assert_close(found.cpu().double(), expected, rtol=1e-6, atol=1e-6 * expected.abs().max().item())
    size = (window.batch, window.h, window.w), window.kernel, window.padding, window.dilation
    formula = operands.shift_over_rows(*(one.cpu() for one in given), *size)
    torch.testing.assert_close(formula.double(), expected, rtol=1e-6, atol=1e-9)
    over_rows._plan.cache_clear()


def test_noise_is_philox():
    """Known answers of its authors, for zeros and for the digits of pi."""
    zero = torch.zeros(1, dtype=torch.int64)
    assert [int(word) for word in philox(0, zero, zero)] == [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]
    values = noise_of(torch.tensor(7), 1000, 64).double()
    assert values.min() > 0 and values.max() < 1
    assert abs(values.mean() - 0.5) < 5 / (12 * values.numel()) ** 0.5
    assert abs(values.var() - 1 / 12) < 0.001 and torch.equal(values, noise_of(torch.tensor(7), 1000, 64).double())
    centred = values - 0.5
    other = noise_of(torch.tensor(8), 1000, 64).double() - 0.5
    for one, two in ((centred[32:], centred[:-32]), (centred[1:], centred[:-1]), (centred[:, 1:], centred[:, :-1])):
        assert abs((one * two).mean() * 12) < 5 / one.numel() ** 0.5
    assert abs((centred * other).mean() * 12) < 5 / centred.numel() ** 0.5


def test_operands_that_do_not_belong_together_are_refused():
    flat, across, *steps = operands.shift_images(torch.randn(2, 4, 4, 32), 6, 3, (1, 1), None)
    weight = operands.shift_weight(torch.randn(8, 3, 3, 32), 6, 3)[0]
    with pytest.raises(ValueError, match="do not belong to Window"):
        operands.shift_flat_conv2d(
            flat, weight, steps[0], torch.ones(8), None, (2, 5, 4), (3, 3), (1, 1), (1, 1), (1, 1), torch.float32
        )
    with pytest.raises(ValueError, match="do not belong to Window"):
        operands.shift_over_rows(across, across, steps[1], steps[1], (2, 4, 4), (3, 3), (0, 0), (1, 1))
    with pytest.raises(ValueError, match="codes of 8 bits have at most 1 groups"):
        operands.shift_images(torch.randn(2, 4, 4, 32), 8, shift.MOST, (1, 1), None)
