"""The W8A8 ops: codes against the plain formula, every kernel against a float64 reference, over odd shapes."""

import pytest
import torch
import torch.nn.functional as F

import ptq4dm  # noqa: F401
from ptq4dm.kernels.formats import int8
from ptq4dm.kernels.w8a8 import layer as w8a8

CUDA = torch.cuda.is_available()
gpu = pytest.mark.gpu
needs_gpu = pytest.mark.skipif(not CUDA, reason="needs a CUDA device")
LINEAR_SHAPES = [(1, 5, 3), (7, 64, 48), (33, 1152, 130), (130, 40, 16), (0, 8, 4)]
CONV_SHAPES = [  # batch, C, H, W, N, kernel, stride, padding, dilation, groups
    (2, 3, 9, 11, 8, 3, 1, 1, 1, 1),
    (1, 16, 7, 5, 5, 1, 1, 0, 1, 1),
    (2, 33, 8, 8, 20, 3, 2, 1, 1, 1),
    (1, 8, 9, 9, 12, 3, 1, 2, 2, 1),
    (2, 8, 6, 6, 8, 3, 1, 1, 1, 4),
    (1, 4, 12, 10, 6, 5, 3, 0, 1, 1),
]
MODES = ["static", "symmetric", "dynamic"]


def operands(x, weight, mode, bits, seed=1):
    generator = torch.Generator().manual_seed(seed)
    scale = weight.flatten(1).abs().amax(1) / 127
    codes = int8.quantize_weight(weight, scale)
    bias = torch.randn(len(weight), generator=generator)
    if mode == "dynamic":
        return codes, scale, bias, None, None
    low, high = (float(v) for v in torch.aminmax(x)) if x.numel() else (-1.0, 1.0)
    s, z = int8.affine_parameters(0.8 * low, 0.7 * high, bits, mode == "symmetric")
    scales = torch.tensor(s)
    if mode == "a scale a row":
        scales = s * (1 + torch.arange(len(x)) % 5)
    return codes, scale, bias, scales, torch.tensor(z, dtype=torch.int32)


def plain_codes(x, scale, zero_point, bits):
    """The formula, in float64 but for the product that every implementation rounds to float32 first."""
    v = (x * (1.0 / scale)).double().round() + zero_point
    return v.clamp(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)


def expected_linear(x, codes, scale, bias, input_scale, input_zero, bits):
    if input_scale is None:
        input_scale = x.abs().amax(1, keepdim=True) / (2 ** (bits - 1) - 1)
        input_zero = torch.zeros_like(input_scale)
    input_scale = input_scale.view(-1, 1)
    q = plain_codes(x, input_scale, input_zero, bits) - input_zero
    return (q @ codes.double().T) * input_scale.double() * scale.double() + bias.double()


def expected_conv(x, codes, scale, bias, input_scale, input_zero, bits, *geometry):
    if input_scale is None:
        input_scale = x.abs().amax((1, 2, 3), keepdim=True) / (2 ** (bits - 1) - 1)
        input_zero = torch.zeros_like(input_scale)
    q = plain_codes(x, input_scale, input_zero, bits) - input_zero
    y = F.conv2d(q, codes.double(), None, *geometry)
    return y * input_scale.double() * scale.double()[:, None, None] + bias.double()[:, None, None]


def kernels(table):
    """(name, function, device) of every kernel this machine can run."""
    cases = [pytest.param(table["reference"], "cpu", id="reference")]
    if w8a8.kernel_name(torch.device("cpu")) == w8a8.ONEDNN:
        cases.append(pytest.param(table["onednn-int8"], "cpu", id="onednn-int8"))
    where = "cuda" if CUDA else "cpu"
    marks = [gpu] if CUDA else []
    cases.append(pytest.param(table["triton-int8"], where, id="triton-int8", marks=marks))
    return cases


def to(device, *tensors):
    return [t if t is None else t.to(device) for t in tensors]


@pytest.mark.parametrize("bits", [8, 6])
@pytest.mark.parametrize("mode", [*MODES, "a scale a row"])
@pytest.mark.parametrize("shape", LINEAR_SHAPES, ids=str)
@pytest.mark.parametrize("kernel, device", kernels(w8a8._LINEAR))
def test_linear(kernel, device, shape, mode, bits):
    m, k, n = shape
    if m == 0:
        kernel = w8a8.reference.linear  # the op sends empty batches there
    generator = torch.Generator().manual_seed(0)
    x, weight = torch.randn(m, k, generator=generator) * 3, torch.randn(n, k, generator=generator)
    given = operands(x, weight, mode, bits)
    y = kernel(*to(device, x, *given), bits).cpu().double()
    expected = expected_linear(x, *given, bits)
    assert y.shape == (m, n)
    if m:
        # one code may fall to the other side of a tie: at most one step of one input
        step = 0 if mode == "dynamic" else float(given[3].max()) * float(weight.abs().max())
        assert (y - expected).abs().max() <= 1e-6 * expected.abs().max() + step * (
            kernel is not w8a8.reference.linear
        )
        assert (y - expected).norm() <= 2e-3 * expected.norm()


@pytest.mark.parametrize("bits", [8, 6])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("shape", CONV_SHAPES, ids=str)
@pytest.mark.parametrize("kernel, device", kernels(w8a8._CONV2D))
def test_conv2d(kernel, device, shape, mode, bits):
    batch, c, h, w, n, size, stride, padding, dilation, groups = shape
    if groups > 1 and kernel is w8a8._CONV2D["triton-int8"]:
        assert w8a8.kernel_name(torch.device("cuda"), 8, groups) == w8a8.REFERENCE
        return
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(batch, c, h, w, generator=generator) * 3
    weight = torch.randn(n, c // groups, size, size, generator=generator)
    given = operands(x, weight, mode, bits)
    geometry = ([stride] * 2, [padding] * 2, [dilation] * 2, groups)
    y = kernel(*to(device, x, *given), bits, *geometry).cpu().double()
    expected = expected_conv(x, *given, bits, *geometry)
    assert y.shape == expected.shape
    step = 0 if mode == "dynamic" else float(given[3]) * float(weight.abs().max())
    assert (y - expected).abs().max() <= 1e-6 * expected.abs().max() + step * (kernel is not w8a8.reference.conv2d)
    assert (y - expected).norm() <= 2e-3 * expected.norm()


def test_codes_are_the_formula():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(100_000, generator=generator) * 4
    for low, high, symmetric in [(-3.0, 5.0, False), (0.0, 4.0, False), (-3.0, 5.0, True)]:
        scale, zero = int8.affine_parameters(low, high, 8, symmetric)
        expected = plain_codes(x, torch.tensor(scale), zero, 8)
        assert torch.equal(int8.quantize_activation(x, torch.tensor(scale), zero).double(), expected)
        fast = int8.quantize_activation_uint8(x, scale, zero).double() - 128
        assert (fast != expected).sum() <= 5 and (fast - expected).abs().max() <= 1


def test_affine_grid_covers_range_and_zero():
    for low, high in [(-3.0, 5.0), (1.0, 4.0), (-6.0, -2.0), (0.0, 0.0)]:
        for bits in (8, 6, 4):
            scale, zero = int8.affine_parameters(low, high, bits)
            limit = 2 ** (bits - 1)
            assert -limit <= zero <= limit - 1
            ends = [(code - zero) * scale for code in (-limit, limit - 1)]
            assert ends[0] <= min(low, 0) + scale and ends[1] >= max(high, 0) - scale


def test_weight_round_trip():
    weight = torch.randn(6, 4, 3, 3, generator=torch.Generator().manual_seed(0))
    weight[2] = 0
    for bits in (8, 6, 4):
        scale = weight.flatten(1).abs().amax(1) / int8.weight_limit(bits)
        scale[2] = 1
        codes = int8.quantize_weight(weight, scale, bits)
        error = (int8.dequantize_weight(codes, scale) - weight).abs()
        assert codes.dtype == torch.int8 and codes.abs().max() == int8.weight_limit(bits)
        assert (error <= scale[:, None, None, None] / 2 * 1.001).all()


def test_op_keeps_dtype_shape_and_handles_views():
    weight = torch.randn(6, 8, generator=torch.Generator().manual_seed(0))
    x = torch.randn(2, 3, 16, generator=torch.Generator().manual_seed(1))[..., ::2]
    given = operands(x.reshape(-1, 8), weight, "static", 8)
    y = w8a8.w8a8_linear(x, *given, 8)
    assert y.shape == (2, 3, 6) and torch.equal(y, w8a8.w8a8_linear(x.contiguous(), *given, 8))
    half = w8a8.w8a8_linear(x.bfloat16(), *given, 8)
    assert half.dtype == torch.bfloat16 and (half.float() - y).abs().max() < 0.1


def test_prepared_weight_follows_changes():
    weight = torch.randn(4, 8, generator=torch.Generator().manual_seed(0))
    x = torch.randn(3, 8, generator=torch.Generator().manual_seed(1))
    given = list(operands(x, weight, "static", 8))
    before = w8a8.w8a8_linear(x, *given, 8)
    given[0].neg_()
    bias = given[2]
    assert torch.allclose(w8a8.w8a8_linear(x, *given, 8) - bias, bias - before, atol=1e-5)


@pytest.mark.parametrize("op", ["linear", "conv2d"])
def test_opcheck(op):
    generator = torch.Generator().manual_seed(0)
    if op == "linear":
        x, weight = torch.randn(5, 8, generator=generator), torch.randn(6, 8, generator=generator)
        arguments = (x, *operands(x, weight, "static", 8), 8)
        torch.library.opcheck(torch.ops.ptq4dm.w8a8_linear.default, arguments)
    else:
        x, weight = torch.randn(2, 8, 5, 5, generator=generator), torch.randn(6, 8, 3, 3, generator=generator)
        arguments = (x, *operands(x, weight, "static", 8), 8, [1, 1], [1, 1], [1, 1], 1)
        torch.library.opcheck(torch.ops.ptq4dm.w8a8_conv2d.default, arguments)


@pytest.mark.parametrize("shape", CONV_SHAPES, ids=str)
def test_fake_convolutions_have_the_shape_of_real_ones(shape):
    batch, channels, h, w, outputs, kernel, stride, padding, dilation, groups = shape
    x = torch.empty(batch, channels, h, w, dtype=torch.float16)
    geometry = ([stride] * 2, [padding] * 2, [dilation] * 2)
    expected = F.conv2d(x.float(), torch.zeros(outputs, channels // groups, kernel, kernel), None, *geometry, groups)
    found = w8a8.empty_images(x, outputs, [kernel] * 2, *geometry)
    assert found.shape == expected.shape and found.dtype == x.dtype
    assert found.is_contiguous(memory_format=torch.channels_last)


@gpu
@needs_gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_unet_sized_convolution_on_gpu(dtype):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(16, 128, 32, 32, generator=generator)
    weight = torch.randn(128, 128, 3, 3, generator=generator)
    given = operands(x, weight, "static", 8)
    geometry = ([1, 1], [1, 1], [1, 1], 1)
    x = x.to("cuda", dtype)
    y = w8a8.w8a8_conv2d(x, *to("cuda", *given), 8, *geometry)
    expected = expected_conv(x.float().cpu(), *given, 8, *geometry)
    assert y.dtype == dtype
    tolerance = {torch.float32: 1e-3, torch.bfloat16: 5e-3, torch.float16: 2e-3}[dtype]
    assert (y.double().cpu() - expected).norm() <= tolerance * expected.norm()
