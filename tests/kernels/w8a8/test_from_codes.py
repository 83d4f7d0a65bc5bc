"""W8A8 on codes: the flat layout, the Triton kernels tile by tile, the norm that hands over codes, and the ops."""

import itertools
import json
import math

import pytest
import torch
import torch.nn.functional as F

import ptq4dm  # noqa: F401
from helpers import normal
from ptq4dm.kernels.formats import fp8, int8
from ptq4dm.kernels.runtime import settings as tuning
from ptq4dm.kernels.w8a8 import configs as w8a8_configs
from ptq4dm.kernels.w8a8 import from_codes as w8a8_codes
from ptq4dm.kernels.w8a8 import layer as w8a8
from ptq4dm.kernels.w8a8 import norm as w8a8_norm
from ptq4dm.kernels.w8a8 import product as w8a8_triton
from ptq4dm.kernels.w8a8 import quantize as w8a8_quantize
from ptq4dm.kernels.w8a8 import reference
from ptq4dm.kernels.w8a8 import steps as w8a8_launch
from ptq4dm.kernels.w8a8.configs import Config
from ptq4dm.kernels.w8a8.window import Window
from ptq4dm.layers.plan import LayerPlan
from ptq4dm.layers.registry import quantized_copy

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"  # the kernels themselves run: compiled, or in Triton's interpreter
pytestmark = [pytest.mark.gpu] if CUDA else []
E4M3 = torch.arange(256, dtype=torch.uint8).view(fp8.DTYPE).float()
E4M3 = E4M3[E4M3.isfinite()]

WINDOWS = [  # channels, outputs, window
    (3, 8, Window(2, 9, 11, (3, 3), (1, 1), (1, 1))),
    (33, 20, Window(2, 8, 8, (3, 3), (2, 2), (1, 1))),
    (64, 40, Window(3, 5, 6, (3, 3), (1, 1), (2, 2), (2, 2))),
    (32, 16, Window(1, 7, 12, (5, 1), (1, 3), (2, 0))),
    (40, 130, Window(2, 4, 3)),
    (8, 24, Window(37, 1, 1)),
]


def on_grid(*size, seed=0):
    """Values that e4m3 has: their codes are themselves in every implementation (the interpreter rounds wrongly)."""
    draw = torch.randint(len(E4M3), size, generator=torch.Generator().manual_seed(seed))
    return E4M3[draw]


def grid(dtype, zero=-11):
    """(scale, zero point) on the device."""
    if dtype == torch.int8:
        return torch.tensor(0.03, device=DEVICE), torch.tensor(zero, dtype=torch.int32, device=DEVICE)
    return torch.tensor(2.0**-5, device=DEVICE), None


def inputs(dtype, *size):
    return normal(*size) if dtype == torch.int8 else on_grid(*size) * 2.0**-5


def weights(dtype, n, *size):
    """(codes, scales) of random weights."""
    weight = normal(n, *size, seed=1)
    if dtype == torch.int8:
        scale = weight.flatten(1).abs().amax(1) / 127
        return int8.quantize_weight(weight, scale), scale
    scale = fp8.scale_of(weight, tuple(range(1, weight.ndim)))
    return fp8.quantize(weight, scale), scale.flatten()


def expected(x, scale, zero, qweight, weight_scale, bias, window):
    """The formula on x in float64."""
    z = 0 if zero is None else int(zero)
    v = (x * (1 / scale.cpu())).double()
    q = (v.round() + z).clamp(-128, 127) - z if zero is not None else v.clamp(-448, 448).to(fp8.DTYPE).double()
    y = F.conv2d(q, qweight.double(), None, window.stride, window.padding, window.dilation)
    return y * float(scale) * weight_scale.double()[:, None, None] + bias.double()[:, None, None]


def close(y, e, tolerance=1e-5):
    assert y.shape == e.shape and (y.double().cpu() - e).norm() <= tolerance * e.norm()


def tolerance(dtype):
    """Tensor cores add e4m3 products in fewer bits than float32 has."""
    return 2e-3 if CUDA and dtype == fp8.DTYPE else 1e-5


# --- the layout ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("_, __, window", WINDOWS, ids=str)
def test_every_tap_reads_its_pixel(_, __, window):
    """Rows of the layout numbered, and padding -1: each tap of each output finds the pixel that unfold does."""
    pixels = torch.arange(window.batch * window.h * window.w, dtype=torch.float64)
    pixels = pixels.view(window.batch, 1, window.h, window.w)
    flat = torch.full((window.rows, 1), -1.0, dtype=torch.float64)
    reference.images(flat, window, 1).copy_(pixels)
    ph, pw = window.padding
    padded = F.pad(pixels, (pw, pw, ph, ph), value=-1)
    taken = F.unfold(padded, window.kernel, window.dilation, 0, window.stride)
    (hp, wp), (oh, ow) = window.padded, window.output
    for b, oy, ox, ky, kx in itertools.product(*map(range, (window.batch, oh, ow, *window.kernel))):
        row = (b * hp + oy * window.stride[0]) * wp + ox * window.stride[1]
        row += ky * window.dilation[0] * wp + kx * window.dilation[1]
        assert row < window.rows
        assert flat[row, 0] == taken[b, ky * window.kernel[1] + kx, oy * ow + ox]


@pytest.mark.parametrize("dtype", [torch.int8, fp8.DTYPE], ids=["int8", "fp8"])
@pytest.mark.parametrize("upsample", [1, 2])
@pytest.mark.parametrize(
    "channels, size, padding", [(3, (2, 5, 4), (1, 1)), (40, (3, 3, 7), (2, 0)), (32, (5, 1, 1), (0, 0))]
)
@pytest.mark.parametrize("layout", ["nchw", "nhwc", "sliced"])
def test_quantize_is_the_formula_in_the_layout(dtype, upsample, channels, size, padding, layout):
    batch, h, w = size
    x = inputs(dtype, batch, channels, h, 2 * w)
    x = x.contiguous(memory_format=torch.channels_last) if layout == "nhwc" else x
    x = x[..., ::2] if layout == "sliced" else x[..., :w]
    for bits in (6, 8) if dtype == torch.int8 else (8,):
        scale, zero = grid(dtype)
        codes = w8a8_quantize.quantize(x.to(DEVICE), scale, zero, bits, dtype, padding, upsample).cpu()
        zero = None if zero is None else zero.cpu()
        right = reference.quantize(x, scale.cpu(), zero, bits, dtype, padding, upsample)
        assert codes.dtype == dtype and torch.equal(codes.float(), right.float())
    big = F.interpolate(x, scale_factor=upsample, mode="nearest")
    window = Window(batch, h * upsample, w * upsample, padding=padding)
    z = 0 if zero is None else zero
    seen = (reference.images(codes, window, channels).float() - z) * scale.cpu()
    if dtype == torch.int8:
        seen, big = (torch.where(big.abs() < 3.4, t, 0.0) for t in (seen, big))  # int8 clips what is larger
    assert (seen - big).abs().max() <= (0.5001 * scale.cpu() if dtype == torch.int8 else 0)


def test_scales_of_long_and_short_rows():
    for rows, length in [(3, 40_000), (70, 24), (1, 5)]:
        x = normal(rows, length)
        x[0] = 0
        found = w8a8_quantize.scales(x.to(DEVICE), 127).cpu()
        assert torch.equal(found, int8.dynamic_scale(x, (1,)).flatten())


@pytest.mark.parametrize("dtype", [torch.int8, fp8.DTYPE], ids=["int8", "fp8"])
@pytest.mark.parametrize(
    "rows, length, kind",
    [(70, 24, torch.float32), (5, 300, torch.float16), (3, 2080, torch.float32), (2, 5000, torch.float16)]
    + [(1, 9000, torch.float32), (2, 17_000, torch.float32)],
)  # fmt: skip
def test_codes_of_rows_are_those_of_two_launches(rows, length, kind, dtype):
    """Also of every other row of a tensor, of zeros, and of what is not finite; long rows are given to two."""
    x = (normal(2 * rows, length) * 5).to(kind)[::2]
    x[0] = 0
    if rows > 2:
        x[1, length // 2], x[2, length - 1] = math.nan, math.inf
    for bits in (8, 6) if dtype == torch.int8 else (8,):
        codes, scale = w8a8_quantize.quantize_rows(x.to(DEVICE), bits, dtype)
        limit = int8.weight_limit(bits) if dtype == torch.int8 else 448.0
        right = w8a8_quantize.scales(x.contiguous().to(DEVICE), limit)
        assert torch.equal(scale.nan_to_num(7.0), right.nan_to_num(7.0)) and codes.shape == (
            rows,
            -(-length // 32) * 32,
        )
        both = w8a8_quantize.quantize(x[:, :, None, None].to(DEVICE), right, None, bits, dtype)
        assert torch.equal(codes.view(torch.int8), both.view(torch.int8))


# --- the product --------------------------------------------------------------------------------------------

TILES = [Config("tma", 64, 32, 32, 4, 3), Config("gather", 32, 64, 32, 4, 3), Config("gather", 64, 16, 32, 4, 2, 1)]
TILES += [Config("tma", 64, 64, 32, 4, 2, 1, 128)]


@pytest.mark.parametrize("dtype", [torch.int8, fp8.DTYPE], ids=["int8", "fp8"])
@pytest.mark.parametrize("config", TILES, ids=lambda c: f"{c.mode}-{c.bm}-{c.bn}-{c.programs}")
@pytest.mark.parametrize("channels, outputs, window", WINDOWS, ids=str)
def test_product_of_codes(channels, outputs, window, config, dtype):
    """With bias, shift and residual, over every tile form; outputs are poisoned before."""
    if config.mode == "tma" and max(window.stride) > 1:
        config = Config("gather", 16, 16, 32, 4, 2)
    x = inputs(dtype, window.batch, channels, window.h, window.w)
    scale, zero = grid(dtype)
    qweight, weight_scale = weights(dtype, outputs, channels, *window.kernel)
    bias, shift = normal(outputs, seed=2), normal(window.batch, outputs, seed=3)
    residual = normal(window.batch, *window.output, outputs, seed=4)
    codes = w8a8_quantize.quantize(x.to(DEVICE), scale, zero, 8, dtype, window.padding)
    rows = w8a8_launch.weight_rows(qweight).to(DEVICE)
    sums = qweight.flatten(1).float().sum(1).int().to(DEVICE)
    out = torch.full((window.batch, *window.output, outputs), math.nan, device=DEVICE)
    more = [t.to(DEVICE) for t in (bias, shift, residual)]
    w8a8_triton.conv2d(codes, window, rows, scale, zero, weight_scale.to(DEVICE), sums, *more, out, 8, config)
    y = expected(x, scale, zero, qweight, weight_scale, bias, window) + shift.double()[:, :, None, None]
    close(out.permute(0, 3, 1, 2), y + residual.double().permute(0, 3, 1, 2), tolerance(dtype))


HOPPER = CUDA and torch.cuda.get_device_capability()[0] == 9


@pytest.mark.skipif(not HOPPER, reason="needs a Hopper GPU")
@pytest.mark.parametrize("kind", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("dtype", [torch.int8, fp8.DTYPE], ids=["int8", "fp8"])
@pytest.mark.parametrize("scales", ["one", "rows"])
@pytest.mark.parametrize(
    "shape", [(128, 128, 128), (1000, 300, 416), (70, 130, 72), (1, 5, 40), (5000, 1032, 1152)], ids=str
)
def test_the_product_of_hopper_is_that_of_triton(shape, scales, dtype, kind):
    """With a zero point and a bias; whole numbers to the bit, whatever the tiles; and the same every time."""
    rows, outputs, channels = shape
    x = inputs(dtype, rows, channels)
    scale, zero = grid(dtype)
    if scales == "rows":
        scale = scale * (1 + torch.arange(rows, device=DEVICE) % 3)
    qweight, weight_scale = weights(dtype, outputs, channels)
    window = Window(rows, 1, 1)
    codes = w8a8_quantize.quantize(x[:, :, None, None].to(DEVICE), scale, zero, 8, dtype)
    layer = w8a8_launch.Parameters(
        *(t.to(DEVICE) for t in (qweight, weight_scale, normal(outputs, seed=2))), scale, zero
    )
    found = [
        w8a8_launch.multiply(codes, window, layer, kind, config=config)
        for config in (w8a8_configs.GLUON, w8a8_configs.GLUON, Config("gather", 32, 64, 32, 4, 3))
    ]
    assert found[0].dtype == kind and torch.equal(found[0], found[1])
    if dtype == torch.int8:
        assert torch.equal(found[0], found[2])
    assert (found[0].double() - found[2].double()).norm() <= 4e-3 * found[2].double().norm()


@pytest.mark.skipif(not HOPPER, reason="needs a Hopper GPU")
def test_what_hopper_does_not_add_goes_to_triton():
    """A residual, and scales of images of many pixels: the settings that fit are chosen then."""
    qweight, weight_scale = (t.to(DEVICE) for t in weights(torch.int8, 1024, 512))
    x, residual = inputs(torch.int8, 4096, 512).to(DEVICE), normal(4096, 1024, seed=4).to(DEVICE)
    given = (x, qweight, weight_scale, None, *grid(torch.int8), 8)
    alone = w8a8_launch.triton_linear(*given)
    assert torch.equal(w8a8_launch.triton_linear(*given, residual), alone + residual)


@pytest.mark.parametrize("dtype", [torch.int8, fp8.DTYPE], ids=["int8", "fp8"])
@pytest.mark.parametrize("outputs", [3, 100, 160])  # quantized while loading, and before
@pytest.mark.parametrize("static", [True, False])
def test_linear_of_floats(dtype, outputs, static):
    x = inputs(dtype, 35, 72)
    x[:, 0] = 448 * 2.0**-5  # dynamic e4m3 scales are powers of two: see on_grid
    qweight, weight_scale = weights(dtype, outputs, 72)
    bias, residual = normal(outputs, seed=2), normal(35, outputs, seed=4)
    scale, zero = grid(dtype) if static else (None, None)
    given = [t if t is None else t.to(DEVICE) for t in (x, qweight, weight_scale, bias, scale, zero)]
    y = w8a8_launch.triton_linear(*given, 8, residual.to(DEVICE))
    given = [t if t is None else t.cpu() for t in given]
    close(y, (reference.linear(*given, 8) + residual).double(), tolerance(dtype))


@pytest.mark.parametrize("dtype", [torch.int8, fp8.DTYPE], ids=["int8", "fp8"])
def test_dynamic_convolution(dtype):
    """A scale for each image."""
    x = inputs(dtype, 3, 36, 6, 5) * torch.tensor([1.0, 0.25, 16.0])[:, None, None, None]
    x[:, 0, 0, 0] = torch.tensor([1.0, 0.25, 16.0]) * 448 * 2.0**-5
    qweight, weight_scale = weights(dtype, 20, 36, 3, 3)
    bias, geometry = normal(20, seed=2), ([1, 1], [1, 1], [1, 1], 1)
    given = (x, qweight, weight_scale, bias)
    y = w8a8_launch.triton_conv2d(*(t.to(DEVICE) for t in given), None, None, 8, *geometry)
    close(y, reference.conv2d(*given, None, None, 8, *geometry).double(), tolerance(dtype))


def test_same_bits_every_time():
    x, (scale, zero) = normal(4, 64, 9, 9).to(DEVICE), grid(torch.int8)
    qweight, weight_scale = (t.to(DEVICE) for t in weights(torch.int8, 48, 64, 3, 3))
    geometry = ([1, 1], [1, 1], [1, 1], 1)
    runs = [w8a8_launch.triton_conv2d(x, qweight, weight_scale, None, scale, zero, 8, *geometry) for _ in range(3)]
    assert torch.equal(runs[0], runs[1]) and torch.equal(runs[0], runs[2])


# --- NaN, infinity, nothing ---------------------------------------------------------------------------------


def test_nan_and_infinity():
    x = normal(4, 64)
    x[0, 3], x[1, 5], x[2, 7] = math.nan, math.inf, -math.inf
    qweight, weight_scale = weights(torch.int8, 16, 64)
    on = [t.to(DEVICE) for t in (x, qweight, weight_scale)]
    scale, zero = grid(torch.int8)
    y = w8a8_launch.triton_linear(*on, None, scale, zero, 8).cpu()
    clean = torch.where(x.isnan(), 0.0, x).clamp(-1000, 1000)
    right = reference.linear(clean, qweight, weight_scale, None, scale.cpu(), zero.cpu(), 8)
    assert torch.allclose(y, right, rtol=1e-5, atol=1e-5)  # NaN has the code of zero, infinity the last one
    same = reference.linear(x, qweight, weight_scale, None, scale.cpu(), zero.cpu(), 8)
    assert torch.equal(same, right)
    y = w8a8_launch.triton_linear(*on, None, None, None, 8).cpu()
    assert not y[:3].isfinite().any() and y[3].isfinite().all()  # dynamic: the rows cannot be represented
    if not CUDA:
        return  # what e4m3's NaN is multiplied to in the interpreter is not the GPU's business
    qweight, weight_scale = weights(fp8.DTYPE, 16, 64)
    y = w8a8_launch.triton_linear(on[0], qweight.cuda(), weight_scale.cuda(), None, *grid(fp8.DTYPE), 8).cpu()
    assert y[0].isnan().all() and y[1:].isfinite().all()


def test_empty_batches(monkeypatch):
    monkeypatch.setattr(w8a8, "kernel_name", lambda *_: w8a8.TRITON)
    scale, zero = grid(torch.int8)
    qweight, weight_scale = (t.to(DEVICE) for t in weights(torch.int8, 5, 8, 3, 3))
    x, gamma = torch.empty(0, 8, 4, 4, device=DEVICE), torch.ones(8, device=DEVICE)
    codes = w8a8_codes.w8a8_quantize(x, scale, zero, 8, torch.int8, [1, 1], 1)
    normed = w8a8_codes.w8a8_group_norm(x, gamma, gamma, 2, 1e-5, True, scale, zero, 8, torch.int8, [1, 1])
    assert codes.shape == normed.shape == (Window(0, 4, 4, padding=(1, 1)).rows, 32)
    assert w8a8_codes.group_norm_silu(x, gamma, gamma, 2, 1e-5, True).shape == x.shape
    geometry = ([1, 1], [1, 1], [1, 1])
    operands = (qweight, weight_scale, None, scale, zero)
    y = w8a8_codes.w8a8_conv2d_codes(codes, [0, 4, 4], *operands, *geometry, None, None, torch.float32)
    assert y.shape == (0, 5, 4, 4)
    assert w8a8.w8a8_conv2d(x, *operands, 8, *geometry, 1).shape == (0, 5, 4, 4)
    assert w8a8.w8a8_linear(torch.empty(0, 8, device=DEVICE), qweight[:, :, 0, 0], *operands[1:], 8).shape == (0, 5)


def test_shapes_that_do_not_belong_together(monkeypatch):
    """Said before anything is launched: the kernels do not look."""
    monkeypatch.setattr(w8a8, "kernel_name", lambda *_: w8a8.TRITON)
    scale, zero = grid(torch.int8)
    qweight, weight_scale = (t.to(DEVICE) for t in weights(torch.int8, 5, 8, 3, 3))
    geometry = ([1, 1], [1, 1], [1, 1])
    with pytest.raises(ValueError, match="the input has 16 channels where the layer needs 8"):
        x = normal(1, 16, 6, 6).to(DEVICE)
        w8a8.w8a8_conv2d(x, qweight, weight_scale, None, scale, zero, 8, *geometry, 1)
    codes = w8a8_codes.w8a8_quantize(normal(2, 8, 4, 4).to(DEVICE), scale, zero, 8, torch.int8, [1, 1], 1)
    operands = (qweight, weight_scale, None, scale, zero, *geometry)
    for image, shift, residual, wrong in [
        ([2, 4, 5], None, None, "the input has shape"),
        ([2, 4, 4], normal(2, 4), None, "the shift has shape"),
        ([2, 4, 4], None, normal(2, 5, 4, 5), "the residual has shape"),
    ]:
        more = [t if t is None else t.to(DEVICE) for t in (shift, residual)]
        with pytest.raises(ValueError, match=wrong):
            w8a8_codes.w8a8_conv2d_codes(codes, image, *operands, *more, torch.float32)


# --- the norm -----------------------------------------------------------------------------------------------

NORMS = [(8, 2, 5, 4), (20, 4, 3, 7), (64, 32, 4, 4), (96, 2, 6, 1), (40, 40, 2, 2)]  # channels, groups, H, W


@pytest.mark.parametrize("whole", [True, False])
@pytest.mark.parametrize("mean", [0.0, 300.0])
@pytest.mark.parametrize("channels, groups, h, w", NORMS)
def test_group_norm(channels, groups, h, w, mean, whole, monkeypatch):
    if not whole:
        monkeypatch.setattr(w8a8_norm, "WHOLE", 0)
    x = normal(3, channels, h, w) + mean
    gamma, beta = normal(channels, seed=1), normal(channels, seed=2)
    pixels = x.permute(0, 2, 3, 1).contiguous().to(DEVICE)
    on = [t.to(DEVICE) for t in (gamma, beta)]
    for silu in (True, False):
        right = F.group_norm(x.double(), groups, gamma.double(), beta.double(), 1e-5)
        right = F.silu(right) if silu else right
        y = w8a8_norm.group_norm(pixels, *on, groups, 1e-5, silu)
        assert (y.cpu().permute(0, 3, 1, 2) - right).abs().max() <= (1e-4 if mean else 3e-5)
    scale, zero = grid(torch.int8)
    for padding in ((1, 1), (0, 2), (0, 0)):
        codes = w8a8_norm.group_norm_quantize(pixels, *on, groups, 1e-5, False, scale, zero, 8, torch.int8, padding)
        expected = reference.quantize(right.float(), scale.cpu(), zero.cpu(), 8, torch.int8, padding, 1)
        difference = (codes.cpu().float() - expected.float())[:, :channels].abs()  # a value on a tie may turn
        assert codes.shape == expected.shape and difference.max() <= 1 and difference.mean() <= 0.01


def test_group_norm_in_e4m3():
    """Codes stay within one step of e4m3 of the formula's; channels that only fill up hold zeros, not NaN."""
    x, ones = normal(2, 8, 4, 4), torch.ones(8)
    scale, _ = grid(fp8.DTYPE)
    pixels = x.permute(0, 2, 3, 1).contiguous().to(DEVICE)
    on = ones.to(DEVICE)
    codes = w8a8_norm.group_norm_quantize(pixels, on, on, 2, 1e-5, True, scale, None, 8, fp8.DTYPE, (1, 1)).cpu()
    right = reference.group_norm(x, ones, ones, 2, 1e-5, True)
    seen = reference.images(codes, Window(2, 4, 4, padding=(1, 1)), 8).float() * scale.cpu()
    if CUDA:
        assert (seen - right).abs().max() <= right.abs().max() / 16
    assert (codes[:, 8:].float() == 0).all() and codes.float().isfinite().all()


# --- torch.compile ------------------------------------------------------------------------------------------


@pytest.fixture
def fresh():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def layer_of(dtype, outputs, features, *, static=True, device=DEVICE):
    """A Linear of int8 or e4m3 codes."""
    float_layer = torch.nn.Linear(features, outputs)
    with torch.no_grad():
        float_layer.weight.copy_(normal(outputs, features, seed=1) / 8)
        float_layer.bias.copy_(normal(outputs, seed=2))
    scale, zero = (None, None) if not static else grid(dtype)
    plan = LayerPlan(
        "int8" if dtype == torch.int8 else "fp8",
        input_scale=None if scale is None else float(scale),
        input_zero_point=None if zero is None else int(zero),
    )
    return quantized_copy(float_layer, plan, "linear").to(device)


@pytest.mark.parametrize("dtype", [torch.int8, fp8.DTYPE], ids=["int8", "fp8"])
@pytest.mark.parametrize(
    "features, static, plain", [(64, True, True), (72, True, False), (64, False, False)], ids=str
)
def test_what_a_compiler_sees_of_a_linear(dtype, features, static, plain, monkeypatch, fresh):
    """Codes by plain operations where the kernel takes codes, else the op alone; the same bits either way."""
    monkeypatch.setattr(w8a8, "kernel_name", lambda *_: w8a8.TRITON)
    layer, x = layer_of(dtype, 136, features, static=static), inputs(dtype, 5, 7, features).to(DEVICE)
    x[..., 0] = 448 * 2.0**-5
    seen = []

    def look(graph, _):
        seen.extend(str(node.target) for node in graph.graph.nodes if node.op == "call_function")
        return graph

    with torch.no_grad():
        expected = layer(x)
        assert torch.equal(torch.compile(layer, backend=look, fullgraph=True)(x), expected)
    ours = [name for name in seen if "ptq4dm" in name]
    assert ours == ["ptq4dm.w8a8_conv2d_codes.default" if plain else "ptq4dm.w8a8_linear.default"]


@pytest.mark.parametrize("dtype", [torch.int8, fp8.DTYPE], ids=["int8", "fp8"])
@pytest.mark.parametrize("backend, x_dtype", [("eager", torch.float32), ("aot_eager", torch.bfloat16)], ids=str)
def test_codes_of_a_compiled_linear_are_those_of_the_op(dtype, backend, x_dtype, monkeypatch, fresh):
    """The reference's bits: for inputs of any strides, with NaN and infinity, none at all, and sizes that change."""
    layer = layer_of(dtype, 24, 64, device="cpu")
    x = (normal(6, 3, 64) * 4).to(x_dtype)
    x[0, 0, 0], x[1, 0, 0], x[2, 0, 0] = math.nan, math.inf, -math.inf
    shapes = [x, x[:4], x[:3].transpose(0, 1), x[:0], x[:, 0].T.contiguous().T, x[0, 0]]
    monkeypatch.setattr(w8a8, "kernel_name", lambda *_: w8a8.REFERENCE)
    with torch.no_grad():
        expected = [layer(one) for one in shapes]
        monkeypatch.setattr(w8a8_codes, "takes_codes", lambda *_: True)
        monkeypatch.setattr(w8a8, "w8a8_linear", None)
        compiled = torch.compile(layer, backend=backend, fullgraph=True)
        for one, right in zip(shapes, expected, strict=True):
            y = compiled(one)
            assert y.dtype == x_dtype and torch.equal(y.nan_to_num(7e4), right.nan_to_num(7e4))


def test_the_inverse_of_a_scale_is_rounded_once():
    scale = normal(100_000).abs() * torch.randint(-30, 30, (100_000,)).float().exp2()
    assert torch.equal(int8.inverse(scale), 1.0 / scale)


@pytest.mark.skipif(not CUDA, reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [torch.int8, fp8.DTYPE], ids=["int8", "fp8"])
def test_a_compiled_linear_on_the_gpu(dtype, monkeypatch, fresh):
    """In inductor's kernels: the same bits from the same x; after a norm, those of a norm that nobody rounded."""
    layer = layer_of(dtype, 384, 256).to(torch.bfloat16)
    x = normal(300, 256).cuda().bfloat16()
    x[:3, 0] = torch.tensor([math.nan, math.inf, -math.inf])
    norm = torch.nn.LayerNorm(256, device="cuda", dtype=torch.bfloat16)
    model = torch.nn.Sequential(norm, layer)
    with torch.no_grad():
        expected, normed = layer(x), model(x[3:])
        exact = norm.float()(x[3:].float()) @ layer.dequantized_weight().T + layer.bias.float()
        norm.bfloat16()
        monkeypatch.setattr(w8a8_quantize, "quantize", None)  # the kernel that is not to run
        assert torch.equal(torch.compile(layer, fullgraph=True)(x).nan_to_num(7e4), expected.nan_to_num(7e4))
        y = torch.compile(model, fullgraph=True)(x[3:])
    error = (normed.float() - exact).norm()
    assert (y.float() - normed.float()).norm() <= error and (y.float() - exact).norm() <= 1.05 * error


# --- ops and configurations ---------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.int8, fp8.DTYPE], ids=["int8", "fp8"])
def test_opcheck(dtype):
    scale, zero = (t if t is None else t.cpu() for t in grid(dtype))
    x, gamma = inputs(dtype, 2, 8, 5, 5), torch.ones(8)
    qweight, weight_scale = weights(dtype, 6, 8, 3, 3)
    every = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
    tests = every if dtype == torch.int8 else every[2:3]  # the others multiply what they compare, which e4m3 cannot

    def check(op, arguments):
        torch.library.opcheck(op, arguments, test_utils=tests)

    ops = torch.ops.ptq4dm
    check(ops.w8a8_quantize.default, (x, scale, zero, 8, dtype, [1, 1], 2))
    check(ops.group_norm_silu.default, (x, gamma, gamma, 2, 1e-5, True))
    check(ops.w8a8_group_norm.default, (x, gamma, gamma, 2, 1e-5, True, scale, zero, 8, dtype, [1, 1]))
    codes = reference.quantize(x, scale, zero, 8, dtype, (1, 1), 1)
    shift, residual = normal(2, 6), normal(2, 6, 5, 5)
    operands = (codes, [2, 5, 5], qweight, weight_scale, None, scale, zero, [1, 1], [1, 1], [1, 1])
    check(ops.w8a8_conv2d_codes.default, (*operands, shift, residual, torch.bfloat16))


def test_configurations_fit_their_shapes():
    """What ships is usable: known fields, tiles that divide the channels, the copy engine only for stride 1."""
    found = 0
    for path in tuning.FOLDER.glob("*.json"):
        device, entries = path.stem, json.loads(path.read_text()).get("w8a8", {})
        found += len(entries)
        for name, entry in entries.items():
            config, parts = Config(**entry), name.split()
            channels = int(next(part[1:] for part in parts if part.startswith("C")))
            assert config.mode in ("tma", "gather", "on-load", "gluon"), (device, name)
            assert channels % config.bk == 0 or config.mode == "gluon", (device, name)
            assert (config.mode == "on-load") == ("on-load" in parts), (device, name)
            assert config.mode != "tma" or name.split("/")[1].startswith("1"), (device, name)
    assert found > 10
    for channels, n, capability in itertools.product((32, 96, 320, 1280), (3, 130), ((8, 0), (9, 0), (12, 0))):
        for window in (Window(2, 8, 8), Window(99, 64, 64, (3, 3), (2, 2), (1, 1))):
            config = w8a8_configs.default(fp8.DTYPE, window, channels, n, capability, False)
            assert channels % config.bk == 0
            assert config.mode == "gather" or (capability >= (9, 0) and window.stride == (1, 1))


@pytest.mark.skipif(not CUDA, reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [torch.int8, fp8.DTYPE], ids=["int8", "fp8"])
@pytest.mark.parametrize("channels", [128, 256])
def test_big_convolution(dtype, channels):
    x = F.silu(normal(64, channels, 32, 32)).cuda().bfloat16().contiguous(memory_format=torch.channels_last)
    qweight, weight_scale = weights(dtype, 128, channels, 3, 3)
    scale, zero = grid(dtype, -100)
    geometry = ([1, 1], [1, 1], [1, 1], 1)
    y = w8a8.w8a8_conv2d(x, qweight.cuda(), weight_scale.cuda(), None, scale, zero, 8, *geometry)
    some = x[[0, 31, 63]].float().cpu()
    z = None if zero is None else zero.cpu()
    right = reference.conv2d(some, qweight, weight_scale, None, scale.cpu(), z, 8, *geometry).double()
    close(y[[0, 31, 63]], right, 4e-3)
    assert y.is_contiguous(memory_format=torch.channels_last)
