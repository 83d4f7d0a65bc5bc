"""Levels of a codebook in Triton's kernels against the formulas: in its interpreter, or on a GPU."""

import pytest
import torch

import ptq4dm  # noqa: F401
from packed_layers import packed, whole
from ptq4dm.kernels.w4 import grouped, int4_codes, int4_floats, integer, layer
from ptq4dm.kernels.w4.tokens import token_codes
from ptq4dm.layers import int4_ops
from ptq4dm.layers.codebook import CodebookPlan
from ptq4dm.layers.registry import quantized_copy

int4_codes_triton = pytest.importorskip(
    "ptq4dm.kernels.w4.int4_codes_triton", reason="needs Triton", exc_type=ImportError
)

from ptq4dm.kernels.w4.products import product_short, short_levels  # noqa: E402

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
POINTERS = dict(TMA=False, BM=32, BN=64, BK=64, BAND=2, num_warps=4, num_stages=2)
CONFIGS = [POINTERS, POINTERS | dict(BM=16, BK=128), POINTERS | dict(UNPACK=True)]
if CUDA:  # the interpreter runs no PTX, and its tiles come by pointers here
    CONFIGS += [POINTERS | dict(PACKED=False)]
    if torch.cuda.get_device_capability() >= (9, 0):
        CONFIGS += [dict(TMA=True, BM=64, BN=64, BK=128, BAND=2, num_warps=4, num_stages=2)]
SIZES = [(1, 7, 64), (3, 40, 192), (33, 96, 320), (5, 24, 200)]  # M, N, K
pytestmark = [pytest.mark.usefixtures("one_thread")] + [pytest.mark.gpu] * CUDA


def there(*tensors):
    return [None if one is None else one.to(DEVICE) for one in tensors]


def groups_of(k):
    return [1] + [k // size for size in (32, 64, 128) if k % size == 0 and k > size]


def book(n, by_row):
    """Levels int8 [1, 16] or [n, 16], rising, that reach both ends."""
    levels = whole(-127, 127, n if by_row else 1, 16, seed=3)
    levels[:, :2] = torch.tensor([-127, 127])
    return levels.sort(1).values


@pytest.mark.parametrize("by_row", [False, True])
@pytest.mark.parametrize("config", CONFIGS, ids=str)
@pytest.mark.parametrize(("m", "n", "k"), SIZES)
def test_sums_of_levels_are_exact(m, n, k, config, by_row):
    """Of one scale an output, and of groups where the settings are for them; scales that are powers of two."""
    x, codes, levels = whole(-7, 7, m, k).float(), whole(-8, 7, n, k), book(n, by_row)
    x[:, 0] = 127  # their own codes, as `tokens`, and so few bits that sums of groups are exact in float32
    for groups in groups_of(k)[: 1 if "UNPACK" in config else None]:
        scales = 2.0 ** whole(-1, 1, n, groups, seed=2)
        operands = (packed(codes), scales, None, None)
        y = integer.grouped_through(*there(x, *operands), config, levels=there(levels)[0])
        assert torch.equal(y.cpu(), grouped.reference(x, *operands, levels)), groups
        exact = levels.expand(n, -1).gather(1, codes.long() + 8).double().view(n, groups, -1) * scales[:, :, None]
        q, s = token_codes(x)
        assert torch.equal(y.cpu().double(), (q.double() * s[:, None]) @ exact.view(n, k).T)


@pytest.mark.parametrize("by_row", [False, True])
@pytest.mark.parametrize(("n", "k"), [(7, 64), (40, 192), (3, 384)])
def test_unpacked_levels_are_those_of_the_formula(n, k, by_row):
    """As int8 under one scale a row, and as floats."""
    codes, levels = whole(-8, 7, n, k), book(n, by_row)
    for groups in groups_of(k):
        scales = torch.rand(n, groups, generator=torch.Generator().manual_seed(1)) + 0.1
        weight = packed(codes), scales, None
        found = int4_codes_triton.int4_codes(*there(*weight), k, 1.0, there(levels)[0])
        for one, wanted in zip(found, int4_codes.reference(*weight, k, levels), strict=True):
            assert torch.equal(one.cpu(), wanted)
        floats = int4_codes_triton.int4_floats(*there(*weight), k, torch.float32, there(levels)[0])
        assert torch.equal(floats.cpu(), int4_floats.reference(*weight, k, levels))
        exact = levels.expand(n, -1).gather(1, codes.long() + 8).view(n, groups, -1) * scales[:, :, None]
        assert torch.equal(floats.cpu(), exact.view(n, k))
        off = (found[0].cpu() * found[1].cpu()[:, None] - exact.view(n, k)).abs().amax(1)
        assert (off <= (0.5001 if groups > 1 else 0) * scales.amax(1)).all()  # half a step of the largest scale


def float_weight(codes, levels, scales):
    """w [N, K] float64."""
    n, k = codes.shape
    exact = levels.expand(n, -1).gather(1, codes.long() + 8).double().view(n, scales.shape[1], -1)
    return (exact * scales.double()[:, :, None]).view(n, k)


SHORT = [dict(BM=8, BN=16, AHEAD=1, num_warps=1), dict(BM=16, BN=32, AHEAD=2, num_warps=1),
         dict(BM=8, BN=16, AHEAD=1, num_warps=2), dict(BM=32, BN=64, AHEAD=3, num_warps=4)]  # fmt: skip
SHORT += [one | dict(PACKED=False) for one in SHORT] if CUDA else []


@pytest.mark.parametrize("by_row", [False, True])
@pytest.mark.parametrize(
    "dtype", [torch.float16] + [torch.bfloat16] * CUDA, ids=str
)  # the interpreter has no bf16 dots
@pytest.mark.parametrize("config", SHORT, ids=str)
@pytest.mark.parametrize(("m", "n", "k"), [(1, 130, 320), (19, 24, 128), (9, 25, 192), (17, 32, 512)])
def test_few_rows_of_float_inputs_are_the_formula(m, n, k, config, dtype, by_row):
    codes, levels = whole(-8, 7, n, k), book(n, by_row)
    generator = torch.Generator().manual_seed(m)
    x, bias = (torch.randn(size, generator=generator).to(dtype) for size in ((m, k), (n,)))
    scales = (torch.rand(n, k // 64, generator=generator) / 64 + 0.01).to(dtype)
    right = x.double() @ float_weight(codes, levels, scales).T + bias.double()
    out = torch.full((m, n), float("nan"), dtype=dtype, device=DEVICE)
    tables = short_levels.tables_of(levels, dtype)
    q, s, t, b, rows = there(packed(codes), scales, tables, bias, x)
    product_short.short_product(rows, None, q, s, None, None, b, out, config, tables=t)
    assert float((out.cpu().double() - right).norm() / right.norm()) < (8e-4 if dtype == torch.float16 else 5e-3)


@pytest.mark.parametrize("by_row", [False, True])
@pytest.mark.parametrize("group", [64, 128])
def test_few_rows_of_a_layer(group, by_row):
    codes, levels, x = whole(-8, 7, 70, 384), book(70, by_row), torch.randn(5, 384).half()
    scales = (torch.rand(70, 384 // group) / 64 + 0.01).half()
    right = x.double() @ float_weight(codes, levels, scales).T
    operands = there(x, packed(codes), scales, None, None, levels)
    for _ in range(2):
        found = layer.few_rows(*operands)
        assert float((found.cpu().double() - right).norm() / right.norm()) < 8e-4
    with pytest.raises(ValueError, match="levels are int8"):
        layer.few_rows(*operands[:5], operands[5].float())


@pytest.mark.parametrize("levels", ["tensor", "row"])
def test_a_quantized_layer_of_few_rows_is_its_dequantized_weight(levels, monkeypatch):
    monkeypatch.setattr(int4_ops, "kernel_name", lambda *_: layer.WEIGHT_ONLY)
    torch.manual_seed(0)
    plan = CodebookPlan(activation_bits=16, group_size=64, levels=levels)
    made, x = quantized_copy(torch.nn.Linear(256, 24).half(), plan, "layer"), torch.randn(2, 3, 256).half()
    right = x.double() @ made.dequantized_weight().double().T + made.bias.double()
    found = made.to(DEVICE)(x.to(DEVICE)).cpu()
    assert found.dtype == torch.float16 and (found.double() - right).norm() < 1e-3 * right.norm()


def test_levels_that_do_not_belong_to_a_weight_are_refused():
    codes, scales = whole(-8, 7, 4, 64), torch.ones(4, 1)
    for levels in (book(1, False)[:, :8], book(3, True), book(4, True).float()):
        with pytest.raises(ValueError, match="levels are int8"):
            grouped.grouped_linear(torch.randn(2, 64), packed(codes), scales, None, None, levels)
    with pytest.raises(ValueError, match="no zero points"):
        grouped.grouped_linear(torch.randn(2, 64), packed(codes), scales, whole(0, 0, 4, 1), None, book(4, True))
