"""The products as a GPU runs them, by their formulas: the same as product.py's, but for where noise comes from."""

import pytest
import torch

from ptq4dm.kernels.formats import shift
from ptq4dm.layers.shift import fused, product
from ptq4dm.layers.shift.fused import FusedProduct, spread
from ptq4dm.layers.shift.product import Product
from ptq4dm.layers.shift.widths import Widths

CASES = {  # images, outputs, kernel, (stride, padding, dilation)
    "3x3": ((3, 6, 5, 8), 12, 3, ((1, 1), (1, 1), (1, 1))),
    "stride 2": ((3, 8, 7, 8), 12, 3, ((2, 2), (1, 1), (1, 1))),
    "dilated": ((2, 9, 8, 8), 5, 3, ((1, 1), (2, 2), (2, 2))),
    "patches": ((2, 8, 8, 3), 12, 2, ((2, 2), (0, 0), (1, 1))),
    "tokens": ((40, 1, 1, 24), 20, 1, ((1, 1), (0, 0), (1, 1))),
}


def passes(kind, case, dtype=torch.float32, bias=True, device="cpu"):
    """(output, gradients by input, weight and bias)."""
    size, n, k, geometry = CASES[case]
    g = torch.Generator().manual_seed(0)
    x = torch.randn(size, generator=g) * torch.logspace(-1.5, 0, size[0]).reshape(-1, 1, 1, 1)
    weight = torch.randn(n, k, k, size[3], generator=g)
    tensors = [t.to(device).requires_grad_() for t in (x.to(dtype), weight, torch.randn(n, generator=g))]
    given = tensors if bias else [*tensors[:2], None]
    y = kind.apply(*given, geometry, Widths(6, 5, 4), dtype)
    dy = torch.randn(y.shape, generator=g).to(dtype) * torch.logspace(-1, 0, len(y)).reshape(-1, 1, 1, 1)
    y.backward(dy.to(device, dtype))
    return [y.detach(), *(t.grad for t in tensors if t.grad is not None)]


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_is_the_same_product(case, dtype, monkeypatch):
    """With noise of a half both round gradients in the same way."""
    monkeypatch.setattr(product, "uniform", lambda x: torch.full(x.shape, 0.5))
    half = lambda seed, number: torch.full((number,), 0.5)  # noqa: E731
    monkeypatch.setattr("ptq4dm.kernels.shift.operands.noise_of", half)
    for bias in (True, False):
        found, expected = (passes(kind, case, dtype, bias) for kind in (FusedProduct, Product))
        assert len(found) == len(expected) == 3 + bias
        for one, other in zip(found, expected, strict=True):
            assert one.dtype == other.dtype and one.shape == other.shape
            torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-6 * other.abs().max().item())


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("case", CASES)
def test_a_gpu_has_the_same_codes(case, monkeypatch):
    monkeypatch.setattr(fused, "new_seed", lambda device: torch.tensor(2**40 + 5, device=device))
    for dtype, tolerance in ((torch.float32, 1e-6), (torch.bfloat16, 8e-3)):
        found, expected = (passes(FusedProduct, case, dtype, device=device) for device in ("cuda", "cpu"))
        for one, other in zip(found, expected, strict=True):
            assert one.dtype == other.dtype
            close = tolerance * other.abs().max().item()
            torch.testing.assert_close(one.cpu(), other, rtol=tolerance, atol=close)


def test_noise_follows_torchs_seed():
    torch.manual_seed(3)
    one, other = passes(FusedProduct, "3x3"), passes(FusedProduct, "3x3")
    torch.manual_seed(3)
    again = passes(FusedProduct, "3x3")
    assert all(torch.equal(a, b) for a, b in zip(one, again, strict=True))
    assert torch.equal(one[0], other[0]) and not torch.equal(one[2], other[2])


def test_gradients_are_unbiased():
    """The mean of 1,000 draws of a weight's gradient is that of exact dy at the codes of the input."""
    torch.manual_seed(0)
    x, weight, dy = torch.randn(6, 1, 4, 8), torch.randn(5, 1, 1, 8), torch.randn(6, 1, 4, 5)
    dy *= torch.logspace(-1.5, 0, 6).reshape(-1, 1, 1, 1)
    found = []
    for _ in range(1000):
        given = weight.clone().requires_grad_()
        FusedProduct.apply(x, given, None, CASES["tokens"][3], Widths(4, 4, 4), torch.float32).backward(dy)
        found.append(given.grad[:, 0, 0])
    rounded = shift.decode(shift.encode(x[:, 0], 4, 4)).double()
    exact = dy.reshape(-1, 5).double().T @ rounded.reshape(-1, 8)
    each = torch.stack(found).double() - exact
    z = each.mean(0) / (each.std(0) / 1000**0.5)
    assert z.abs().max() < 4 and z.square().mean() < 2  # of 40 entries
    along = (each * exact).sum((1, 2))
    assert along.mean().abs() < 3 * along.std() / 1000**0.5


def test_zeros_go_between_pixels():
    x = torch.arange(1.0, 5).reshape(1, 2, 2, 1)
    assert spread(x, (2, 3), (4, 5))[0, :, :, 0].tolist() == [[1, 0, 0, 2, 0], [0] * 5, [3, 0, 0, 4, 0], [0] * 5]
