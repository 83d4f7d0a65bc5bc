"""SVDQuant's Triton kernels against float64 formulas: in Triton's interpreter, or on a GPU where there is one.

The interpreter multiplies no bf16, so there inputs are fp16; it loses the carry where rounding to e4m3 reaches the
next power of two, so there up to 4% of what is rounded to e4m3 may be wrong.
"""

import math

import pytest
import torch

import ptq4dm  # noqa: F401
from helpers import crossed, distance
from ptq4dm.kernels.formats import int4
from ptq4dm.kernels.w4 import layer as svdq_linear
from ptq4dm.kernels.w4 import reference as svdq

svdq_activation = pytest.importorskip("ptq4dm.kernels.w4.activation", reason="needs Triton", exc_type=ImportError)
from ptq4dm.kernels.runtime import settings as tuning  # noqa: E402
from ptq4dm.kernels.w4 import unpack as svdq_unpack  # noqa: E402
from ptq4dm.kernels.w4.products import product_short as w4a16  # noqa: E402
from ptq4dm.kernels.w4.products import product_w4a4 as svdq_w4a4  # noqa: E402
from ptq4dm.kernels.w4.products import product_w4a8 as svdq_gemm  # noqa: E402

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
FP8 = torch.float8_e4m3fn
DTYPES = [torch.float16, torch.bfloat16] if CUDA else [torch.float16]
WRONG = 0.0 if CUDA else 0.04
MODERN = not CUDA or torch.cuda.get_device_capability() >= (8, 9)
HOPPER = not CUDA or torch.cuda.get_device_capability() >= (9, 0)
CODES = [torch.int8] + [FP8] * MODERN
PREPARE = dict(BM=16, BK=128, STAGES=2, ROWS=4, STEP=128, num_warps=4, UNPACK_BYTES=4096)
TMA = dict(TMA=True, BM=64, BN=64, BK=64, BAND=2, PIECES=2, PER_SM=1, num_warps=4, num_stages=2)
POINTERS = dict(TMA=False, BM=32, BN=64, BK=64, BAND=2, num_warps=4, num_stages=2)
W4A4 = dict(BM=64, BN=64, BAND=2, PER_SM=1, num_warps=4, num_stages=2)
PRODUCTS = [POINTERS] + [TMA, TMA | dict(PIECES=1)] * HOPPER
NAMES = [svdq_linear.INT8, svdq_linear.INT4, svdq_linear.WEIGHT_ONLY] + [svdq_linear.FP8] * MODERN
pytestmark = [pytest.mark.usefixtures("one_thread")] + [pytest.mark.gpu] * CUDA


class Layer:
    """Random operands; the second group of inputs is zero everywhere, and one output is."""

    def __init__(self, m, n, k, rank, dtype=torch.float16, shift=0.0):
        generator = torch.Generator().manual_seed(m + n + k + rank)

        def normal(*size):
            return torch.randn(*size, generator=generator)

        weight = normal(n, k) / k**0.5
        weight[:, 64:128] = 0
        weight[n // 2] = 0
        self.x = (2 * normal(m, k)).to(DEVICE, dtype)
        self.codes, scales = int4.quantize_groups(weight, 64, dtype)
        self.qweight, self.wscales = int4.pack_int4(self.codes, 64).to(DEVICE), scales.to(DEVICE)
        self.smooth = (0.5 + torch.rand(k, generator=generator)).to(DEVICE, dtype)
        self.down = (normal(rank, k) / k**0.5).to(DEVICE, dtype) if rank else None
        self.up = (normal(n, rank) / rank**0.5).to(DEVICE, dtype) if rank else None
        self.bias = normal(n).to(DEVICE, dtype)
        self.shift = shift

    def weight(self):
        return int4.dequantize_groups(self.codes, self.wscales.cpu()).double()

    def inputs(self):
        """Smoothed, float32."""
        return (self.x.float().cpu() + self.shift) / self.smooth.float().cpu()

    def branch(self):
        return (
            0 if self.down is None else self.x.double().cpu() @ self.down.double().cpu().T @ self.up.double().cpu().T
        )

    def expected(self, mode):
        x = self.x.float().cpu() if mode == "none" else self.inputs()
        x = svdq.round_activation(x, mode, 64, self.shift != 0).double()
        return x @ self.weight().T + self.branch() + self.bias.double().cpu()

    def prepared(self, mode, dtype, setting=PREPARE):
        """What the launch before a product leaves; all of it poisoned first."""
        rows = svdq_activation.empty_activation(self.x, mode, 0 if self.down is None else len(self.down), dtype)
        weight = svdq_unpack.empty_weight(self.qweight, dtype, mode)
        for tensor in (*rows, *weight):
            tensor.view(torch.uint8).fill_(0x7F)
        svdq_unpack.prepare(
            self.x, self.smooth, self.down, mode, self.shift, rows, self.qweight, self.wscales, weight, setting
        )
        return rows, weight


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("setting", [PREPARE, PREPARE | dict(ROWS=1, STEP=256)], ids=["4 rows", "1 row"])
@pytest.mark.parametrize("mode, codes", [("int8", torch.int8), ("fp8", FP8), ("int4", torch.int8), ("int4", FP8)])
@pytest.mark.parametrize("rank, shift", [(0, 0.0), (12, 0.0), (16, 0.171875)])
def test_activation(mode, codes, setting, rank, shift, dtype):
    if codes not in CODES:
        pytest.skip("no e4m3 on this GPU")
    layer = Layer(19, 24, 320, rank, dtype, shift)
    (found, scales, branch), _ = layer.prepared(mode, codes, setting)
    found, scales = found.float().cpu(), scales.cpu()
    if mode == "int4":
        expected, wanted = int4.quantize_activation_groups(layer.inputs(), 64, shift != 0)
        assert torch.allclose(scales, wanted.T, rtol=1e-6)
    else:
        limit = 448 if mode == "fp8" else 127
        wanted = layer.inputs().abs().amax(1, keepdim=True) / limit
        assert torch.allclose(scales, wanted[:, 0], rtol=1e-6)
        expected = layer.inputs() / wanted
        expected = expected.to(FP8).float() if mode == "fp8" else expected.round()
    # within float rounding of a tie, the other neighbour
    step = (expected.abs() / 8).clamp(min=2**-9) if mode == "fp8" else torch.ones(())
    wrong = WRONG if mode == "fp8" else 0
    assert ((found - expected).abs() > step).float().mean() <= wrong
    assert (found != expected).float().mean() <= 1e-3 + wrong
    if rank:
        exact = layer.x.double().cpu() @ layer.down.double().cpu().T
        assert distance(branch[:, :rank], exact) < 4e-3 and (branch[:, rank:] == 0).all()


@pytest.mark.parametrize("codes", CODES, ids=str)
@pytest.mark.parametrize("k", [128, 320])
def test_folded_weights(codes, k):
    layer = Layer(3, 37, k, 0)
    _, (w8, channel) = layer.prepared("fp8" if codes == FP8 else "int8", codes)
    found = w8.double().cpu() * channel.double().cpu()[:, None]
    error, exact = (found - layer.weight()).abs(), layer.weight()
    if codes == FP8:
        assert (error > (2**-4 + 2**-10) * exact.abs()).float().mean() <= WRONG
    else:
        assert (error <= 0.55 * channel.double().cpu()[:, None]).all()
    wide = layer.weight().abs().unflatten(1, (-1, 64)).amax(2)
    top = wide.argmax(1)  # the group of the largest scale is exact
    groups = error.unflatten(1, (-1, 64))[torch.arange(37), top]
    assert (groups <= 1e-6 * wide.amax(1)[:, None]).all()
    assert (channel[37 // 2] == 1).all() and (found[37 // 2] == 0).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_unfolded_weights(dtype):
    layer = Layer(3, 37, 192, 0, dtype)
    for codes in CODES:
        _, (w, scales) = layer.prepared("int4", codes)
        assert torch.equal(w.float().cpu(), layer.codes.float())
        assert torch.equal(scales.cpu(), layer.wscales.float().cpu().T)
    weight = svdq_unpack.empty_weight(layer.qweight, dtype, "none")
    svdq_unpack.unpack(layer.qweight, layer.wscales, weight, "none", dict(UNPACK_BYTES=2048, num_warps=4))
    assert torch.equal(weight[0].cpu(), layer.weight().to(dtype))


def test_every_nibble():
    codes = torch.arange(-8, 8, dtype=torch.int8).repeat(4).expand(3, 64).contiguous()
    layer = Layer(1, 3, 64, 0)
    layer.qweight, layer.wscales = int4.pack_int4(codes, 64).to(DEVICE), layer.wscales[:, :1].contiguous()
    for dtype in CODES:
        assert torch.equal(layer.prepared("int4", dtype)[1][0].float().cpu(), codes.float())
        folded, channel = layer.prepared("fp8" if dtype == FP8 else "int8", dtype)[1]
        assert torch.equal(folded.float().cpu(), codes.float() * svdq_unpack.PEAK[dtype])
        assert torch.allclose(channel * svdq_unpack.PEAK[dtype], layer.wscales[:, 0].float(), rtol=1e-6)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@crossed(
    "setting, codes, shape",
    PRODUCTS,
    CODES,
    [(70, 130, 192, 12), (1, 24, 128, 0), (130, 136, 256, 40), (33, 264, 128, 16)],
)
def test_product(setting, codes, shape, dtype):
    m, n, k, rank = shape
    layer = Layer(m, n, k, rank, dtype)
    rows, weight = layer.prepared("fp8" if codes == FP8 else "int8", codes)
    out = torch.full((m, n), float("nan"), dtype=dtype, device=DEVICE)
    svdq_gemm.product(rows, weight, layer.up, layer.bias, out, setting)
    (x8, row_scale, branch), (w8, channel) = ([t.double().cpu() for t in side] for side in (rows, weight))
    expected = (x8 * row_scale[:, None]) @ (w8 * channel[:, None]).T + layer.bias.double().cpu()
    if rank:
        expected += branch[:, :rank] @ layer.up.double().cpu().T
    assert distance(out, expected) < (4e-4 if dtype == torch.float16 else 3e-3)
    svdq_gemm.product(rows, weight, layer.up, None, again := torch.empty_like(out), setting)
    assert distance(again, expected - layer.bias.double().cpu()) < (4e-4 if dtype == torch.float16 else 3e-3)


@pytest.mark.gpu
@pytest.mark.skipif(not CUDA or torch.cuda.get_device_capability()[0] != 9, reason="needs Hopper")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("codes", CODES, ids=str)
@pytest.mark.parametrize("stages", [2, 6])
@pytest.mark.parametrize(
    "m, n, k, rank", [(1, 24, 128, 0), (70, 130, 192, 12), (333, 264, 960, 100), (2050, 2056, 64, 9)]
)
def test_w4a8_on_hopper(stages, m, n, k, rank, codes, dtype):
    """The ring with fewer stages than a tile has steps and with more; more tiles than programs; every tail."""
    setting = dict(GLUON=True, BM=128, BN=128, BK=128, BAND=2, STAGES=stages)
    layer = Layer(m, n, k, rank, dtype)
    rows, weight = layer.prepared("int8" if codes == torch.int8 else "fp8", codes)
    expected = torch.empty(m, n, dtype=dtype, device=DEVICE)
    svdq_gemm.product(rows, weight, layer.up, layer.bias, expected, POINTERS)
    for _ in range(3):
        out = torch.full((m, n), float("nan"), dtype=dtype, device=DEVICE)
        svdq_gemm.product(rows, weight, layer.up, layer.bias, out, setting)
        assert distance(out, expected.double().cpu()) < (4e-4 if dtype == torch.float16 else 3e-3)


@pytest.mark.parametrize(
    "mode, product, setting",
    [
        ("int8", svdq_gemm.product, dict(BM=128, BN=128, BK=128, BAND=2, STAGES=4)),
        ("int4", svdq_w4a4.product, dict(BN=128, BAND=2, STAGES=4)),
    ],
    ids=["w4a8", "w4a4"],
)
def test_gluon_settings_name_what_they_are_for(mode, product, setting):
    layer = Layer(33, 64, 128, 16)
    (codes, *more), weight = layer.prepared(mode, torch.int8)
    wrong = codes.view(torch.uint8)
    with pytest.raises(ValueError, match="for torch.float8_e4m3fn.* on Hopper, not for torch.uint8"):
        product((wrong, *more), weight, layer.up, layer.bias, layer.x.new_empty(33, 64), setting | dict(GLUON=True))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("codes", CODES, ids=str)
@pytest.mark.parametrize("tma", [False] + [True] * HOPPER)
@pytest.mark.parametrize("m, n, k, rank, shift", [(70, 130, 192, 12, 0.0), (33, 136, 128, 40, 0.171875)])
def test_w4a4(tma, codes, m, n, k, rank, shift, dtype):
    layer = Layer(m, n, k, rank, dtype, shift)
    rows, weight = layer.prepared("int4", codes)
    out = torch.full((m, n), float("nan"), dtype=dtype, device=DEVICE)
    svdq_w4a4.product(rows, weight, layer.up, layer.bias, out, W4A4 | dict(TMA=tma))
    assert distance(out, layer.expected("int4")) < (6e-4 if dtype == torch.float16 else 4e-3)


@pytest.mark.skipif(not CUDA or torch.cuda.get_device_capability()[0] != 9, reason="the Gluon product is for Hopper")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bn, stages", [(128, 5), (128, 2), (64, 3)])
@pytest.mark.parametrize(
    "m, n, k, rank, shift",
    [
        (1, 24, 128, 0, 0.0), (70, 130, 192, 12, 0.0), (33, 136, 64, 40, 0.171875), (301, 265, 256, 16, 0.0),
        (4600, 3080, 320, 0, 0.0), (300, 264, 3072, 32, 0.0),
    ],
)  # fmt: skip
def test_w4a4_on_hopper(bn, stages, m, n, k, rank, shift, dtype):
    """Rows of scales that are whole 16 bytes and that are not, an odd number of groups, more steps than stages."""
    layer = Layer(m, n, k, rank, dtype, shift)
    rows, weight = layer.prepared("int4", FP8)
    setting = dict(GLUON=True, BN=bn, STAGES=stages, BAND=4)
    out = torch.full((m, n), float("nan"), dtype=dtype, device=DEVICE)
    svdq_w4a4.product(rows, weight, layer.up, layer.bias, out, setting)
    assert distance(out, layer.expected("int4")) < (6e-4 if dtype == torch.float16 else 4e-3)
    svdq_w4a4.product(rows, weight, layer.up, layer.bias, again := torch.empty_like(out), setting)
    assert torch.equal(out, again)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@crossed(
    "mode, sizes, shape",
    ["none", "int8"] + ["fp8"] * MODERN,
    [(8, 16, 1, 1), (16, 32, 2, 1), (8, 16, 1, 2), (32, 64, 3, 4)],
    [(1, 130, 320, 0), (19, 24, 128, 12), (9, 25, 192, 12), (17, 32, 512, 0)],
)
def test_short_product(mode, sizes, shape, dtype):
    """Numbers of groups and outputs that are odd, that fill all blocks, that are fewer than warps read."""
    m, n, k, rank = shape
    setting = dict(zip(("BM", "BN", "AHEAD", "num_warps"), sizes, strict=True))
    layer = Layer(m, n, k, rank, dtype)
    rows = svdq_activation.empty_activation(
        layer.x, mode, rank, {"int8": torch.int8, "fp8": FP8, "none": dtype}[mode]
    )
    if mode == "none":
        branch = torch.zeros(rows[2].shape, dtype=dtype, device=DEVICE)
        if rank:
            branch[:, :rank] = layer.x @ layer.down.T
        rows = (layer.x, None, branch)
    else:
        svdq_activation.quantize_activation(layer.x, layer.smooth, layer.down, mode, 0.0, rows, PREPARE)
    out = torch.full((m, n), float("nan"), dtype=dtype, device=DEVICE)
    branch = rows[2] if rank else None
    w4a16.short_product(*rows[:2], layer.qweight, layer.wscales, branch, layer.up, layer.bias, out, setting)
    tolerance = 8e-4 if dtype == torch.float16 else 5e-3
    if mode == "fp8" and not CUDA:
        tolerance = 9e-2
    assert distance(out, layer.expected(mode)) < tolerance


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("sizes", [(8, 16, 1, 1), (16, 32, 2, 1), (8, 16, 1, 2), (32, 64, 3, 4)], ids=str)
@pytest.mark.parametrize("m, n, k", [(1, 130, 320), (19, 24, 128), (9, 25, 192), (17, 32, 512)])
def test_short_product_with_zero_points(sizes, m, n, k, dtype):
    """Of inputs that are far from zero, whose sums count; the smallest and the largest zero point among them."""
    setting = dict(zip(("BM", "BN", "AHEAD", "num_warps"), sizes, strict=True))
    layer, generator = Layer(m, n, k, 0, dtype), torch.Generator().manual_seed(m)
    zeros = torch.randint(-8, 8, (n, k // 64), generator=generator, dtype=torch.int8)
    zeros[0], zeros[1] = -8, 7
    x = layer.x + 3
    steps = layer.codes.double().view(n, k // 64, 64) - zeros[:, :, None]
    weight = (steps * layer.wscales.cpu().double()[:, :, None]).flatten(1)
    right = x.cpu().double() @ weight.T + layer.bias.cpu().double()
    out = torch.full((m, n), float("nan"), dtype=dtype, device=DEVICE)
    operands = (x, None, layer.qweight, layer.wscales, None, None, layer.bias, out, setting)
    w4a16.short_product(*operands, wzeros=zeros.to(DEVICE))
    assert distance(out, right) < (8e-4 if dtype == torch.float16 else 5e-3)


@pytest.mark.parametrize("group", [64, 128])
@pytest.mark.parametrize("affine", [False, True], ids=["symmetric", "zeros"])
def test_few_rows_of_plain_weights(group, affine):
    m, n, k = 5, 70, 384
    layer = Layer(m, n, k, 0)
    scales = layer.wscales[:, :: group // 64].contiguous() + 0.01
    zeros = torch.randint(-8, 8, scales.shape, dtype=torch.int8, device=DEVICE) if affine else None
    steps = layer.codes.double().view(n, k // group, group)
    steps = steps if zeros is None else steps - zeros.cpu().double()[:, :, None]
    weight = (steps * scales.cpu().double()[:, :, None]).flatten(1)
    for _ in range(2):
        found = svdq_linear.few_rows(layer.x, layer.qweight, scales, zeros, layer.bias)
        assert distance(found, layer.x.cpu().double() @ weight.T + layer.bias.cpu().double()) < 8e-4
    with pytest.raises(ValueError, match="16 bits for whole runs"):
        svdq_linear.few_rows(layer.x, layer.qweight, scales.float(), zeros, layer.bias)


def through(name, layer, x=None, nonlinearity=""):
    x = layer.x if x is None else x
    smooth = None if name == svdq_linear.WEIGHT_ONLY else layer.smooth
    return svdq_linear.rows_through(
        name, x, layer.qweight, layer.wscales, smooth, layer.down, layer.up, layer.bias, layer.shift,
        nonlinearity,
    )  # fmt: skip


EXACT = {
    "gelu": lambda y: y * torch.special.erfc(-y / 2**0.5) / 2,
    "gelu_tanh": lambda y: y * (1 + torch.tanh((2 / math.pi) ** 0.5 * (y + 0.044715 * y**3))) / 2,
    "silu": lambda y: y / (1 + torch.exp(-y)),
}


@crossed(
    "nonlinearity, product, shape",
    EXACT,
    ["pointers", "tma", "w4a4", "short"],
    [(35, 70, 192, 12), (1, 24, 128, 0)],
)
def test_nonlinearity(product, shape, nonlinearity):
    """Of the sums before they are rounded, which the same kernel without one stores; also far from 0."""
    m, n, k, rank = shape
    if product == "tma" and not HOPPER:
        pytest.skip("no TMA on this GPU")
    layer = Layer(m, n, k, rank)
    layer.bias = torch.linspace(-9, 9, n).to(DEVICE, torch.float16)
    rows, weight = layer.prepared("int4" if product == "w4a4" else "int8", torch.int8)
    outputs = []
    for kind in ("", nonlinearity):
        out = torch.full((m, n), float("nan"), dtype=torch.float16, device=DEVICE)
        if product == "short":
            setting = dict(BM=8, BN=16, AHEAD=1, num_warps=2)
            operands = (*rows[:2], layer.qweight, layer.wscales, rows[2] if rank else None, layer.up, layer.bias, out)
            w4a16.short_product(*operands, setting, kind)
        elif product == "w4a4":
            svdq_w4a4.product(rows, weight, layer.up, layer.bias, out, W4A4 | dict(TMA=False), kind)
        else:
            setting = POINTERS if product == "pointers" else TMA
            svdq_gemm.product(rows, weight, layer.up, layer.bias, out, setting, kind)
        outputs.append(out.double().cpu())
    sums, y = outputs
    expected = EXACT[nonlinearity](sums)
    rounding = sums.abs() * 2**-11 * 1.2 + expected.abs() * 2**-11 + 2**-24  # of the sums (slope to 1.2), of y
    assert ((y - expected).abs() <= rounding).all()
    assert (y != sums).float().mean() > 0.5


@pytest.mark.gpu
@pytest.mark.skipif(not CUDA or torch.cuda.get_device_capability()[0] != 9, reason="needs Hopper")
@pytest.mark.parametrize("nonlinearity", EXACT)
@pytest.mark.parametrize("mode", ["fp8", "int4"])
@pytest.mark.parametrize("m, n, k, rank", [(70, 130, 192, 12), (333, 264, 960, 40), (1, 24, 128, 0)])
def test_nonlinearity_on_hopper(mode, m, n, k, rank, nonlinearity):
    layer = Layer(m, n, k, rank)
    layer.bias = torch.linspace(-9, 9, n).to(DEVICE, torch.float16)
    rows, weight = layer.prepared(mode, FP8)
    product = svdq_w4a4.product if mode == "int4" else svdq_gemm.product
    setting = dict(GLUON=True, BM=128, BN=128, BK=128, BAND=2, STAGES=4)
    outputs = []
    for kind in ("", nonlinearity):
        out = torch.full((m, n), float("nan"), dtype=torch.float16, device=DEVICE)
        product(rows, weight, layer.up, layer.bias, out, setting, kind)
        outputs.append(out.double().cpu())
    sums, y = outputs
    expected = EXACT[nonlinearity](sums)
    assert ((y - expected).abs() <= sums.abs() * 2**-11 * 1.2 + expected.abs() * 2**-11 + 2**-24).all()


@pytest.mark.parametrize("name", NAMES)
def test_an_unknown_nonlinearity(name):
    layer = Layer(3, 24, 128, 8)
    names = ("x", "qweight", "wscales", "smooth", "down", "up", "bias")
    arguments = [getattr(layer, one) for one in names]
    with pytest.raises(ValueError, match="one of '', 'gelu', 'gelu_tanh', 'silu', not 'relu'"):
        svdq_linear.svdq_linear(*arguments, svdq_linear.MODES[name], 0.0, "relu")


@crossed("nonlinearity, m, name", ["", "gelu", "gelu_tanh", "silu"], [17, 70], NAMES)
def test_whole_calls_with_a_nonlinearity(name, m, nonlinearity):
    layer = Layer(m, 40, 192, 8, DTYPES[-1])
    expected = layer.expected(svdq_linear.MODES[name])
    expected = EXACT[nonlinearity](expected) if nonlinearity else expected
    y = through(name, layer, nonlinearity=nonlinearity)
    tolerance = {"int4": 6e-3, "none": 6e-3, "int8": 1.5e-2, "fp8": 4e-2 if CUDA else 9e-2}[svdq_linear.MODES[name]]
    assert distance(y, expected) < tolerance


@pytest.mark.parametrize("m", [1, 17, 70])
@pytest.mark.parametrize("name", NAMES)
def test_whole_calls(name, m):
    layer = Layer(m, 40, 192, 8, DTYPES[-1])
    y = through(name, layer)
    mode = svdq_linear.MODES[name]
    tolerance = {"int4": 6e-3, "none": 6e-3, "int8": 1.5e-2, "fp8": 4e-2 if CUDA else 9e-2}[mode]
    assert y.dtype == layer.x.dtype and distance(y, layer.expected(mode)) < tolerance
    assert torch.equal(y, through(name, layer))  # the same bits


@pytest.mark.parametrize("name", NAMES)
def test_what_is_not_finite_stays_in_its_row(name):
    for m in (5, 70):
        layer = Layer(m, 40, 192, 8)
        clean = through(name, layer)
        layer.x[1, 70], layer.x[3, 0] = float("nan"), float("inf")
        y = through(name, layer)
        mode = svdq_linear.MODES[name]
        reference = svdq.svdq_linear(
            layer.x.float().cpu(), layer.qweight.cpu(), layer.wscales.cpu(),
            None if mode == "none" else layer.smooth.cpu(), layer.down.cpu(), layer.up.cpu(), layer.bias.cpu(), mode,
        )  # fmt: skip
        others = [i for i in range(m) if i not in (1, 3)]
        assert not torch.isfinite(y[[1, 3]]).any() and not torch.isfinite(reference[[1, 3]]).any()
        assert torch.equal(y[others], clean[others])


@pytest.mark.parametrize("name", NAMES)
def test_views_and_empty_inputs(name):
    layer = Layer(6, 40, 128, 8)
    y = through(name, layer)
    assert torch.equal(through(name, layer, layer.x.T.contiguous().T), y)
    assert torch.equal(through(name, layer, torch.cat([layer.x, layer.x], 1)[:, :128]), y)
    assert torch.equal(through(name, layer, layer.x[:1].expand(6, -1)), y[:1].expand(6, -1))
    assert through(name, layer, layer.x[:0]).shape == (0, 40)


def test_the_op_says_its_shape_without_computing():
    layer = Layer(6, 40, 128, 8)
    names = ("qweight", "wscales", "smooth", "down", "up", "bias")
    meta = [getattr(layer, name).to("meta") for name in names]
    y = svdq_linear.svdq_linear(torch.empty(2, 3, 128, device="meta"), *meta, "int8", 0.0)
    assert y.shape == (2, 3, 40) and y.dtype == torch.float32


def test_kernel_names():
    cpu = torch.device("cpu")
    assert svdq_linear.kernel_name(cpu, "fp8", 64) == svdq_linear.REFERENCE
    layer = Layer(6, 40, 128, 8)
    arguments = [getattr(layer, n).cpu() for n in ("x", "qweight", "wscales", "smooth", "down", "up", "bias")]
    with pytest.raises(ValueError, match="no kernel for fp8 activations on cpu"):
        svdq_linear.svdq_linear(*arguments, "fp8", 0.0)
    if CUDA:
        gpu = torch.device("cuda")
        assert svdq_linear.kernel_name(gpu, "fp8", 32) == svdq_linear.REFERENCE
        assert svdq_linear.kernel_name(gpu, "fp8", 64) == (svdq_linear.FP8 if MODERN else svdq_linear.INT8)


def test_settings_are_there_for_every_kernel():
    for path in tuning.FOLDER.glob("sm_*.json"):
        table = tuning._read(path.stem)
        for name, mode in svdq_linear.MODES.items():
            for rows in (1, 1000):
                for step in svdq_linear.steps(name, rows):
                    entries = table.get(f"{mode}.{step}", [])
                    assert step == "cublas" or entries, (path.name, mode, step)
                    assert all(len(entry) == 4 for entry in entries)
    near = tuning.best_config("none.short", torch.device(DEVICE), 1, 20000, 3072)
    assert near == tuning.best_config("none.short", torch.device(DEVICE), 2, 18432, 3072)


def test_settings_for_any_outputs(monkeypatch):
    """The nearest M and K count, whatever N they were measured with."""
    table = {"fp8.prepare": [[4608, 12288, 3072, {"ROWS": 2}], [4608, 64, 12288, {"ROWS": 1}]]}
    monkeypatch.setattr(tuning, "_merged", lambda _: table)
    tuning._best.cache_clear()
    sizes = [(4608, None, 15360), (4608, 15360, 12288), (512, None, 3072)]
    found = [tuning.best_config("fp8.prepare", torch.device(DEVICE), *size)["ROWS"] for size in sizes]
    tuning._best.cache_clear()
    assert found == [1, 2, 2]


@pytest.mark.skipif(not CUDA, reason="needs a CUDA device")
@pytest.mark.parametrize("activation", ["fp8", "int8", "int4", "none"])
def test_the_op_on_a_gpu(activation):
    for m in (5, 300):
        layer = Layer(m, 136, 256, 16, torch.bfloat16)
        names = ("x", "qweight", "wscales", "smooth", "down", "up", "bias")
        arguments = [getattr(layer, name) for name in names] + [activation, 0.0]
        if activation == "none":
            arguments[3] = None
        torch.library.opcheck(torch.ops.ptq4dm.svdq_linear.default, tuple(arguments))
        y = svdq_linear.svdq_linear(*arguments)
        compiled = torch.compile(svdq_linear.svdq_linear, fullgraph=True, backend="eager")
        assert torch.equal(compiled(*arguments), y)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            again = svdq_linear.svdq_linear(*arguments)
        for _ in range(3):
            graph.replay()
        assert torch.equal(again, y)
        wide = svdq_linear.svdq_linear(layer.x.float(), *arguments[1:])
        assert wide.dtype == torch.float32 and torch.equal(wide.bfloat16(), y)
