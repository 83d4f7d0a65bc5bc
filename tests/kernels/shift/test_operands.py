"""Codes that a GPU's products read, and these products: each kernel against its formula, which is exact."""

import pytest
import torch
import torch.nn.functional as F

from ptq4dm.kernels.formats import shift
from ptq4dm.kernels.shift import operands
from ptq4dm.kernels.shift.noise import mix, noise_of
from ptq4dm.kernels.w8a8.window import same_window

pytest.importorskip("triton")
from ptq4dm.kernels.shift import over_rows, rounding, turned  # noqa: E402

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
pytestmark = [pytest.mark.gpu] * CUDA
IMAGES = {  # batch, height, width, channels, padding
    "images": (3, 7, 5, 40, (1, 1)),
    "a wide image": (2, 3, 40, 70, (2, 0)),
    "tokens": (300, 1, 1, 72, (0, 0)),
    "samples": (3, 1, 100, 33, (0, 0)),
}

WINDOWS = {
    "3x3": same_window(3, 7, 5, (3, 3), padding=(1, 1)),
    "dilated": same_window(2, 9, 9, (3, 3), padding=(2, 2), dilation=(2, 2)),
    "3x2": same_window(2, 8, 6, (3, 2), padding=(0, 1)),
    "1x3": same_window(2, 8, 6, (1, 3), padding=(0, 1)),
    "5x5, 20 wide": same_window(1, 4, 20, (5, 5), padding=(2, 2)),
    "tokens": same_window(300, 1, 1),
    "samples": same_window(3, 1, 100),
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
    seed = torch.tensor(2**61 + 12345) if noise else None
    expected = operands.images_in_torch(x.cpu(), bits, groups, padding, seed)
    found = rounding.encode_images(x, bits, groups, padding, None if seed is None else seed.to(DEVICE))
    same([one.cpu() for one in found], expected)
    assert expected[0].unique().numel() > 10 and expected[0].abs().max() >= 2 ** (bits - 1) - 1


@pytest.mark.parametrize("size", [(48, 3, 3, 40), (5, 1, 1, 96), (70, 2, 1, 3)])
@pytest.mark.parametrize(("bits", "groups"), [(6, 3), (8, 1)])
def test_a_weight_in_codes(size, bits, groups):
    weight = uneven(*size)
    expected = operands.shift_weight(weight.cpu(), bits, groups)
    same([one.cpu() for one in rounding.encode_weight(weight, bits, groups)], expected)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.filterwarnings("ignore:invalid value")  # of the interpreter
def test_what_is_not_finite_makes_the_steps_so(value):
    x = uneven(2, 4, 4, 32)
    x[1, 2, 3, 4] = value
    found = rounding.encode_images(x, 6, 3, (1, 1), None)
    assert not found.row_steps.isfinite().any() and not found.column_steps.isfinite().any()
    zeros = rounding.encode_images(torch.zeros_like(x), 6, 3, (1, 1), None)
    assert not zeros.flat.any() and zeros.row_steps.isfinite().all()


@pytest.mark.parametrize("window", WINDOWS.values(), ids=WINDOWS)
@pytest.mark.parametrize("tma", [False, True])
@pytest.mark.parametrize("most", [None, 128])
def test_the_product_over_rows_is_exact(window, tma, most, monkeypatch):
    if CUDA and tma and torch.cuda.get_device_capability() < (9, 0):
        pytest.skip("TMA is of Hopper and later")
    monkeypatch.setattr(over_rows, "capability", lambda device: (9, 0) if tma else (8, 0))
    monkeypatch.setattr(over_rows, "LEAST", 1)
    if most is not None:
        monkeypatch.setattr(over_rows, "TERMS", most)
    over_rows._plan.cache_clear()
    n, c = 40, 70
    output = turned.gradient_window(window)
    dy, x = uneven(window.batch, output.h, output.w, n, seed=1), uneven(window.batch, window.h, window.w, c)
    d, pixels = (
        operands.images_in_torch(one.cpu(), bits, groups, of.padding, None)
        for one, bits, groups, of in ((dy, 6, 3, output), (x, 4, 5, window))
    )
    values = [
        shift.decode(shift.encode(one.cpu().reshape(len(one), -1, one.shape[3]), *how)).view(one.shape).double()
        for one, how in ((dy, (6, 3)), (x, (4, 5)))
    ]
    weight = torch.zeros(n, c, *window.kernel, dtype=torch.float64, requires_grad=True)
    images = [one.permute(0, 3, 1, 2) for one in values]
    F.conv2d(images[1], weight, None, 1, window.padding, window.dilation).backward(images[0])
    expected = weight.grad.permute(0, 2, 3, 1)
    given = [t for one, groups in ((d, 3), (pixels, 5)) for t in (*one[:3], one[4], groups)]
    size = (window.batch, window.h, window.w), window.kernel, window.padding, window.dilation
    formula = operands.shift_over_rows(*given, *size)
    torch.testing.assert_close(formula.double(), expected, rtol=1e-6, atol=1e-6 * expected.abs().max().item())
    given = [t.to(DEVICE) if isinstance(t, torch.Tensor) else t for t in given]
    gradient = turned.turn_gradient(*given[:3], 3, window)
    found = over_rows.weight_gradient(
        gradient, turned.turn_pixels(*given[5:8], 5, window), given[3], given[8], window
    )
    torch.testing.assert_close(found.cpu(), formula, rtol=1e-6, atol=1e-6 * formula.abs().max().item())
    over_rows._plan.cache_clear()


def test_noise_has_no_pattern():
    """Known values of the mixer; mean and variance of what is uniform; no correlation of places or of seeds."""
    assert [int(one) for one in mix(torch.tensor([0, 1, 2, 0xFFFFFFFF]))] == [0, 0x688990C0, 0xD1132181, 0x6768824A]
    values = noise_of(torch.tensor(7), 64000).double()
    assert values.min() > 0 and values.max() < 1 and torch.equal(values, noise_of(torch.tensor(7), 64000).double())
    assert abs(values.mean() - 0.5) < 4 / (12 * values.numel()) ** 0.5
    assert abs(values.var() - 1 / 12) < 0.001
    centred = values - 0.5
    for away in (1, 2, 64, 256, 4096):
        assert abs((centred[away:] * centred[:-away]).mean() * 12) < 4 / (len(centred) - away) ** 0.5
    for other in (6, 8, 7 + 2**20, 7 + 2**32, 7 + 2**61):
        noise = noise_of(torch.tensor(other), 64000).double() - 0.5
        assert abs((centred * noise).mean() * 12) < 4 / centred.numel() ** 0.5
        assert abs((centred[1:] * noise[:-1]).mean() * 12) < 4 / centred.numel() ** 0.5
    draws = torch.stack([noise_of(torch.tensor(seed * 1234567891011), 50) for seed in range(2000)]).double()
    assert (draws.mean(0) - 0.5).abs().max() < 4.5 / (12 * 2000) ** 0.5  # of each place, over seeds
    assert (draws.var(0) * 12 - 1).abs().max() < 0.1


def test_operands_that_do_not_belong_together_are_refused():
    found = operands.shift_images(torch.randn(2, 4, 4, 32), 6, 3, (1, 1), None)
    weight = operands.shift_weight(torch.randn(8, 3, 3, 32), 6, 3)[0]
    with pytest.raises(ValueError, match="do not belong to Window"):
        operands.shift_flat_conv2d(
            found[0], weight, found[3], torch.ones(8), None, (2, 5, 4), (3, 3), (1, 1), (1, 1), (1, 1), torch.float32
        )
    operand = *found[:3], found[4], 3
    with pytest.raises(ValueError, match="do not belong to Window"):
        operands.shift_over_rows(*operand, *operand, (2, 4, 4), (3, 3), (0, 0), (1, 1))
    with pytest.raises(ValueError, match="codes of 8 bits have at most 1 groups"):
        operands.shift_images(torch.randn(2, 4, 4, 32), 8, shift.MOST, (1, 1), None)
