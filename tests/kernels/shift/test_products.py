"""Products of int8 operands against float64: the convolution, its gradients, on each kernel that this machine has."""

import pytest
import torch
import torch.nn.functional as F

from ptq4dm.kernels.formats.shift import TERMS
from ptq4dm.kernels.runtime import settings
from ptq4dm.kernels.shift import products, weight_gradient
from ptq4dm.kernels.shift.transposed import shift_input_gradient, takes
from ptq4dm.kernels.w8a8.layer import ONEDNN, TRITON, kernel_name

# batch, height, width, inputs, outputs, kernel, stride, padding, dilation
CASES = {
    "3x3": (3, 9, 7, 5, 6, 3, 1, 1, 1),
    "3x3 stride 2": (2, 8, 8, 32, 40, 3, 2, 1, 1),
    "3x3 stride 2, odd": (2, 9, 8, 16, 8, 3, 2, 1, 1),
    "dilated": (2, 9, 9, 16, 8, 3, 1, 2, 2),
    "patches": (2, 8, 8, 3, 64, 2, 2, 0, 1),
    "tokens": (4, 1, 10, 24, 17, 1, 1, 0, 1),
    "one token": (20, 1, 1, 40, 33, 1, 1, 0, 1),
}
VNNI = kernel_name(torch.device("cpu")) == ONEDNN
KERNELS = {"int-mm": products._multiplied, "triton": products._triton}
if VNNI:
    KERNELS["onednn"] = products._onednn


def operands(case, device="cpu"):
    b, h, w, c, n, k, s, p, d = CASES[case]
    g = torch.Generator().manual_seed(0)
    sizes = (b, h, w, c), (n, k, k, c)
    x, weight = (torch.randint(-127, 128, size, generator=g, dtype=torch.int8).to(device) for size in sizes)
    exact = F.conv2d(x.double().permute(0, 3, 1, 2), weight.double().permute(0, 3, 1, 2), None, s, p, d)
    gradient = torch.randint(-127, 128, exact.permute(0, 2, 3, 1).shape, generator=g, dtype=torch.int8).to(device)
    return x, weight, gradient, ((s, s), (p, p), (d, d))


ON_GPU = [pytest.mark.gpu] * torch.cuda.is_available()


@pytest.fixture(params=[pytest.param(name, marks=ON_GPU if name == "triton" else []) for name in KERNELS])
def kernel(request, monkeypatch):
    """All products by one kernel; Triton's is interpreted where there is no GPU."""
    if request.param == "triton":
        pytest.importorskip("triton")
    for name in products._CONVOLUTIONS:
        monkeypatch.setitem(products._CONVOLUTIONS, name, KERNELS[request.param])
    return "cuda" if request.param == "triton" and torch.cuda.is_available() else "cpu"


def conv(x, weight, geometry):
    """float64 [B, H', W', N] of codes."""
    y = F.conv2d(x.double().permute(0, 3, 1, 2), weight.double().permute(0, 3, 1, 2), None, *geometry)
    return y.permute(0, 2, 3, 1)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_convolution(kernel, case, dtype):
    x, weight, _, geometry = operands(case, kernel)
    steps, outputs, bias = (torch.rand(n, device=kernel) + 0.5 for n in (len(x), len(weight), len(weight)))
    expected = conv(x, weight, geometry) * steps[:, None, None, None].double() * outputs + bias
    for given in (bias, None):
        y = products.shift_conv2d(x, weight, steps, outputs, given, *geometry, dtype)
        right = expected if given is not None else expected - bias
        assert y.dtype == dtype and y.is_contiguous() and y.shape == right.shape
        tolerance = 3e-7 if dtype == torch.float32 else 8e-3  # Triton's interpreter cuts bfloat16 off
        assert (y - right).abs().max() <= tolerance * right.abs().max()


@pytest.mark.parametrize("case", CASES)
def test_the_gradient_by_the_input(kernel, case):
    x, weight, gradient, geometry = operands(case, kernel)
    assert takes(weight.shape[1:3], *geometry[1:])
    steps, channels = torch.rand(len(x), device=kernel) + 0.5, torch.rand(x.shape[3], device=kernel) + 0.5
    given = x.double().requires_grad_()
    conv(given, weight, geometry).backward(gradient.double())
    expected = given.grad * steps[:, None, None, None] * channels
    found = shift_input_gradient(gradient, weight, steps, channels, x.shape[1:3], *geometry, torch.float32)
    assert (found - expected).abs().max() <= 3e-7 * expected.abs().max()


@pytest.mark.parametrize("case", CASES)
def test_the_gradient_by_the_weight_is_exact(case):
    x, weight, gradient, geometry = operands(case)
    given = weight.double().requires_grad_()
    conv(x, given, geometry).backward(gradient.double())
    found = products.shift_weight_gradient(gradient, x, weight.shape[1:3], *geometry)
    assert found.dtype == torch.int32 and torch.equal(found.double(), given.grad)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("most", [1, 4])
def test_the_gradient_by_the_weight_in_triton(case, most, monkeypatch):
    pytest.importorskip("triton")
    monkeypatch.setattr(weight_gradient, "LEAST", 1)  # so that several programs share a sum
    monkeypatch.setattr(weight_gradient, "PROGRAMS", most)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    x, weight, gradient, geometry = operands(case, device)
    given = weight.double().requires_grad_()
    conv(x, given, geometry).backward(gradient.double())
    window = products._window(x, weight.shape[1:3], *geometry)
    assert torch.equal(weight_gradient.weight_gradient(gradient, x, window).double(), given.grad)


@pytest.mark.parametrize("case", ["3x3", "tokens"])
def test_steps_of_an_expanded_tensor(kernel, case):
    x, weight, _, geometry = operands(case, kernel)
    steps, outputs = torch.full((1,), 0.5, device=kernel), torch.full((1,), 3.0, device=kernel)
    steps, outputs = steps.expand(len(x)), outputs.expand(len(weight))
    y = products.shift_conv2d(x, weight, steps, outputs, None, *geometry, torch.float32)
    torch.testing.assert_close(y.double(), conv(x, weight, geometry) * 1.5, rtol=1e-6, atol=0)


def test_codes_at_their_ends_do_not_overflow():
    x = torch.full((2, 1, 300, 16), -127, dtype=torch.int8)
    weight = torch.full((8, 1, 1, 16), -127, dtype=torch.int8)
    ones, point = torch.ones(2), ((1, 1), (0, 0), (1, 1))
    assert (products.shift_conv2d(x, weight, ones, torch.ones(8), None, *point, torch.float32) == 16 * 127**2).all()
    gradient = torch.full((2, 1, 300, 8), 127, dtype=torch.int8)
    assert (products.shift_weight_gradient(gradient, x, (1, 1), *point) == -600 * 127**2).all()
    assert TERMS * 127**2 < 2**31 and products.rows_at_once(300) * 300 * 127**2 < 2**31


def test_what_is_refused():
    x, weight, gradient, geometry = operands("3x3")
    ones = torch.ones(3), torch.ones(6), None
    with pytest.raises(ValueError, match="operands must be int8, and are torch.float32 and torch.int8"):
        products.shift_conv2d(x.float(), weight, *ones, *geometry, torch.float32)
    with pytest.raises(ValueError, match="may pass an int32"):
        long = torch.zeros(1, 1, TERMS + 1, 1, dtype=torch.int8)
        products.shift_weight_gradient(long, long, (1, 1), (1, 1), (0, 0), (1, 1))


def test_which_kernel_serves():
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    for capability, name in (((8, 0), TRITON), ((7, 5), products.EXACT)):
        with settings.target(settings.Target(capability, 132, pytest.fail)):
            assert products.kernel_name(gpu, (3, 3)) == products.kernel_name(gpu, (1, 1)) == name
    assert products.kernel_name(cpu, (1, 1)) == (products.INT_MM if VNNI else products.EXACT)
    assert products.kernel_name(cpu, (3, 3)) == (ONEDNN if VNNI else products.EXACT)


@pytest.mark.parametrize("terms", [1, 1024, 1025, 3000])
@pytest.mark.parametrize("autocast", [False, True])
def test_sums_of_floats_are_exact(terms, autocast):
    """Of the largest codes, all of one sign, and of codes of all sizes."""
    g = torch.Generator().manual_seed(terms)
    drawn = torch.randint(-128, 128, (5, terms), generator=g, dtype=torch.int8)
    for a in (torch.full((5, terms), -128, dtype=torch.int8), drawn):
        b = torch.cat([a, drawn]).T
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            found = products.exact_sums(a, b)
        assert found.dtype == torch.int32 and torch.equal(found.double(), a.double() @ b.double())
