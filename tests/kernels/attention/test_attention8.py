"""Attention on 8-bit operands: formula, op and kernels against torch's attention in float64.

Without a GPU the Triton kernels run in the interpreter, which checks every address. It rounds float32 to e4m3 wrongly
where rounding carries (126.4 becomes 64): here torch rounds for it. Hopper's kernel runs on Hopper alone.
"""

import numpy as np
import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from ptq4dm.kernels.attention import layer8, reference8
from ptq4dm.kernels.attention.layer8 import attention8, kernel_name
from ptq4dm.kernels.attention.rotary import Rotary, joined
from ptq4dm.kernels.formats import attention8 as formats
from ptq4dm.kernels.runtime import settings

product8 = pytest.importorskip("ptq4dm.kernels.attention.product8", reason="needs Triton", exc_type=ImportError)
codes8 = pytest.importorskip("ptq4dm.kernels.attention.codes8", reason="needs Triton", exc_type=ImportError)

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
HOPPER = CUDA and torch.cuda.get_device_capability()[0] == 9
pytestmark = [pytest.mark.gpu] * CUDA
SHAPES = [  # B, H, M, L, d
    (1, 1, 1, 1, 8), (2, 3, 5, 77, 40), (1, 2, 130, 300, 64), (2, 1, 33, 128, 72), (1, 2, 129, 129, 128),
    (1, 1, 3, 200, 160),
]  # fmt: skip
KINDS = ("int8", "e4m3")
BOUND = {"int8": 0.045, "e4m3": 0.085}
ROUNDING = 8e-3 if CUDA else 2e-3  # of a kernel beside the formula: tensor cores keep few bits of sums in e4m3


@pytest.fixture(autouse=True)
def interpreter_that_rounds(monkeypatch):
    if CUDA:
        return
    import triton.language as tl
    from triton.runtime import interpreter

    plain = interpreter._convert_float

    def convert(data, source, target, mode):
        if source == tl.float32 and target == tl.float8e4nv:
            values = torch.from_numpy(np.ascontiguousarray(data))
            return values.to(torch.float8_e4m3fn).view(torch.uint8).numpy()
        return plain(data, source, target, mode)

    monkeypatch.setattr(interpreter, "_convert_float", convert)


def operands(shape, dtype=torch.float32, seed=0, mean=3.0):
    """Queries, keys with a common mean, values with one as well; views of [B, n, H, d], as diffusers has them."""
    batch, heads, rows, tokens, width = shape
    generator = torch.Generator().manual_seed(seed)
    q, k, v = (torch.randn(batch, n, heads, width, generator=generator) for n in (rows, tokens, tokens))
    k += mean * torch.randn(batch, 1, heads, width, generator=generator)
    v += mean
    return tuple(x.to(DEVICE, dtype).transpose(1, 2) for x in (q * 2, k, v))


def truth(q, k, v, scale):
    return scaled_dot_product_attention(q.double(), k.double(), v.double(), scale=scale)


def error(y, right):
    """Beside the mean of the values, which is what a query sees without any key."""
    return ((y.double() - right).norm() / (right - 3.0).norm()).item()


def by_triton(q, k, v, scale, kind):
    codes = codes8.quantize8(q, k, v, scale, formats.TYPES[kind])
    batch, heads, rows, width = q.shape
    y = q.new_full((batch, rows, heads, width), torch.nan)
    product8.attention(codes, y, k.shape[2])
    return y.transpose(1, 2)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_it_is_attention(shape, kind):
    given = operands(shape)
    y = attention8(*given, 0.7 * shape[-1] ** -0.5, kind)
    right = truth(*given, 0.7 * shape[-1] ** -0.5)
    assert y.shape == given[0].shape and y.dtype == torch.float32 and y.transpose(1, 2).is_contiguous()
    assert error(y, right) < BOUND[kind]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_kernels_are_the_formula(shape, kind):
    q, k, v = operands(shape)
    scale = shape[-1] ** -0.5
    codes = formats.quantize8(q, k, v, scale, formats.TYPES[kind])
    right = reference8.attention(codes, q.shape[2], k.shape[2], q.shape[3], torch.float64)
    y = q.new_full((shape[0], shape[2], shape[1], shape[4]), torch.nan)
    product8.attention(codes, y, k.shape[2])
    assert error(y.transpose(1, 2), right) < ROUNDING
    assert error(by_triton(q, k, v, scale, kind), truth(q, k, v, scale)) < BOUND[kind] + ROUNDING


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", SHAPES[1:5], ids=str)
def test_codes_of_the_kernel(shape, kind):
    q, k, v = operands(shape)
    dtype = formats.TYPES[kind]
    found, right = codes8.quantize8(q, k, v, 0.1, dtype), formats.quantize8(q, k, v, 0.1, dtype)
    for name, one, other in zip(found._fields, found, right, strict=True):
        assert one.shape == other.shape and one.dtype == other.dtype and one.is_contiguous(), name
        if name in ("q", "k", "v"):
            differ = one.float() != other.float()
            assert differ.float().mean() < 0.005, name
        else:
            torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


def turning(q, words, seed=3):
    """A rotary embedding for queries [B, H, M, d], with a text of so many words."""
    batch, heads, rows, width = q.shape
    generator = torch.Generator().manual_seed(seed)

    def normal(*size):
        return torch.randn(*size, generator=generator).to(q.device)

    angles = normal(rows + words, width // 2)
    cos, sin = (x.repeat_interleave(2, 1).contiguous() for x in (angles.cos(), angles.sin()))
    norms = [1 + 0.2 * normal(width).to(q.dtype) for _ in range(4)]
    text = [normal(batch, words, heads, width).to(q.dtype).transpose(1, 2) for _ in range(3)]
    return Rotary(*norms[:2], cos, sin, 1e-6, (*text, *norms[2:]) if words else None)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("words", [0, 20, 150])
@pytest.mark.parametrize("shape", [(2, 3, 130, 130, 24), (1, 2, 40, 40, 128)], ids=str)
def test_codes_of_what_is_normed_and_turned(shape, words, kind):
    """In the kernel that makes the codes, as by torch before it."""
    q, k, v = operands(shape)
    rotary, dtype = turning(q, words), formats.TYPES[kind]
    right = formats.quantize8(*joined(q, k, v, rotary), 0.1, dtype)
    found = codes8.quantize8(q, k, v, 0.1, dtype, rotary=rotary)
    for name, one, other in zip(found._fields, found, right, strict=True):
        assert one.shape == other.shape and one.dtype == other.dtype and one.is_contiguous(), name
        if name in ("q", "k", "v"):
            assert (one.float() != other.float()).float().mean() < 0.005, name
        else:
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("words", [0, 20])
def test_the_op_with_a_rotary_embedding(words):
    q, k, v = operands((2, 3, 60, 60, 24))
    rotary = turning(q, words)
    text = (None,) * 5 if rotary.words is None else rotary.words
    y = attention8(q, k, v, 0.3, "int8", *rotary[:5], *text)
    whole = joined(q, k, v, rotary)
    assert y.shape == (2, 3, 60 + words, 24) and y.transpose(1, 2).is_contiguous()
    assert error(y, truth(*whole, 0.3)) < BOUND["int8"]
    far = [x if x is None or isinstance(x, float) else x.to("meta") for x in (*rotary[:5], *text)]
    traced = torch.ops.ptq4dm.attention8(*(x.to("meta") for x in (q, k, v)), 0.3, "int8", *far)
    assert traced.shape == y.shape and traced.stride() == y.stride()
    with pytest.raises(ValueError, match="has cos and sin"):
        attention8(q, k, v, 0.3, "int8", *rotary[:2], rotary.cos[1:], rotary.sin, 1e-6, *text)


@pytest.mark.skipif(not HOPPER, reason="needs a Hopper GPU")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "shape",
    [
        (1, 2, 300, 333, 128), (2, 3, 128, 128, 64), (2, 2, 77, 1, 96), (1, 30, 1111, 777, 128),
        (1, 3, 1000, 1500, 128), (2, 10, 1111, 2000, 64),  # tiles of queries are shared by multiprocessors
    ],
    ids=str,
)  # fmt: skip
@pytest.mark.parametrize(
    "setting",
    [{"SPLIT": False}, {"SPLIT": True}, {"SPLIT": False, "STAGES": 3, "HAND": 2}],
    ids=["whole", "shared", "handed over"],
)
def test_hoppers_kernel_is_the_formula(shape, kind, setting):
    from ptq4dm.kernels.attention import product8_hopper

    q, k, v = operands(shape)
    codes = codes8.quantize8(q, k, v, shape[-1] ** -0.5, formats.TYPES[kind])
    right = reference8.attention(codes, q.shape[2], k.shape[2], q.shape[3], torch.float64)
    y = q.new_full((shape[0], shape[2], shape[1], shape[4]), torch.nan)
    setting = product8_hopper.DEFAULT[codes.q.dtype] | setting
    product8_hopper.attention(codes, y, k.shape[2], setting)
    assert error(y.transpose(1, 2), right) < 2 * ROUNDING
    again = torch.empty_like(y)
    product8_hopper.attention(codes, again, k.shape[2], setting)
    assert torch.equal(again, y)


@pytest.mark.skipif(not HOPPER, reason="needs a Hopper GPU")
@pytest.mark.parametrize("kind", KINDS)
def test_sums_over_a_videos_keys_are_no_worse(kind):
    """A tensor core's own sums keep 14 bits: over 32,760 keys they alone would more than double the error."""
    q, k, v = operands((1, 2, 200, 32760, 128))
    found = attention8(q, k, v, 128**-0.5, kind)
    right = truth(q, k, v, 128**-0.5)
    codes = codes8.quantize8(q, k, v, 128**-0.5, formats.TYPES[kind])
    formula = reference8.attention(codes, q.shape[2], k.shape[2], q.shape[3], torch.float64)
    assert error(found, right) < 1.1 * error(formula, right)


def test_a_mean_of_keys_costs_nothing():
    q, k, v = operands((1, 2, 40, 200, 64), mean=0.0)
    k = k - k.mean(-2, keepdim=True)
    far = k + 64.0  # exact in float32 but for the last bits
    near, moved = (attention8(q, keys, v, 0.125, "int8") for keys in (k, far))
    assert (near - moved).norm() / near.norm() < 5e-3
    no_mean = formats.quantize8(q, far, v, 0.125, torch.int8)
    assert no_mean.k_scales.max() < 0.1  # not 64 / 127 and more


def test_what_is_sampled_is_spread():
    for tokens in (1, 5, 512, 513, 4608, 32760, 10**7):
        some = formats.sampled(tokens)
        assert len(some) == min(tokens, formats.SAMPLES) and some[0] == 0 and some[-1] < tokens
        assert (some.diff() >= 0).all() and (some.diff() <= 2 * -(-tokens // len(some))).all()
        part = torch.arange(len(some)) * tokens // len(some)
        assert (some >= part).all() and (some <= part + -(-tokens // len(some))).all()


@pytest.mark.parametrize("run", [attention8, by_triton], ids=["op", "kernel"])
def test_a_block_of_values_may_be_far_larger_or_nothing(run):
    """A scale of a block is in the exponent of P: it must come out of the sum of the weights."""
    q, k, v = operands((1, 2, 20, 1024, 16), mean=0.0)
    v = v.clone()
    v[:, :, :128] *= 1000
    v[:, :, 128:256] = 0
    k = k - 3 * (torch.arange(1024, device=k.device) < 128)[:, None] * q.mean(-2, keepdim=True)
    right = truth(q, k, v, 0.25)
    y = run(q, k, v, 0.25, "int8")
    assert ((y - right).norm() / right.norm()).item() < 0.05
    only = v * 0 + 5
    only[:, :, 128:] = 5
    assert torch.allclose(run(q, k, only, 0.25, "int8"), torch.full_like(q, 5.0), atol=1e-3)


@pytest.mark.parametrize("run", [attention8, by_triton], ids=["op", "kernel"])
@pytest.mark.parametrize("which", [0, 1, 2], ids=["queries", "keys", "values"])
def test_nan_stays_where_it_belongs(which, run):
    given = [x.contiguous() for x in operands((2, 2, 5, 40, 8))]
    given[which][1, 0, 3, 2] = torch.nan
    y = run(*given, 0.5, "int8")
    where = torch.zeros(2, 2, 5, 8, dtype=torch.bool, device=DEVICE)
    where[1, 0] = True
    if which == 0:
        where[1, 0] = (torch.arange(5, device=DEVICE) == 3)[:, None]
    if which == 2:
        where[1, 0] = torch.arange(8, device=DEVICE) == 2
    assert torch.equal(y.isnan(), where)


@pytest.mark.parametrize("run", [attention8, by_triton], ids=["op", "kernel"])
def test_zeros_and_large_logits(run):
    q, k, v = operands((1, 2, 6, 77, 16))
    same = run(q * 0, k, v, 1.0, "int8")
    assert error(same, v.double().mean(-2, keepdim=True).expand(-1, -1, 6, -1)) < 0.03
    assert run(q * 1000, k, v, 1.0, "int8").isfinite().all()
    assert torch.equal(run(q, k * 0 + 1, v * 0 + 2, 1.0, "e4m3"), torch.full_like(q, 2.0))


def test_strides_dtypes_and_no_rows():
    q, k, v = operands((2, 3, 6, 40, 16), torch.float16)
    wide = torch.cat([q, q], -1)[..., ::2]
    assert attention8(q, k, v, 0.25, "int8").dtype == torch.float16
    torch.testing.assert_close(attention8(wide, k, v, 0.25, "int8"), attention8(wide.clone(), k, v, 0.25, "int8"))
    assert attention8(q[:, :, :0], k, v, 0.25, "int8").shape == (2, 3, 0, 16)


@pytest.mark.parametrize("wrong", ["keys", "none", "kind"])
def test_wrong_input(wrong):
    q, k, v = operands((1, 2, 4, 10, 8))
    kind = "int4" if wrong == "kind" else "int8"
    if wrong == "keys":
        v = v[..., :4]
    elif wrong == "none":
        k, v = k[:, :, :0], v[:, :, :0]
    with pytest.raises(ValueError, match="int8" if wrong == "kind" else "keys and values"):
        attention8(q, k, v, 0.5, kind)


def test_which_kernel():
    cuda, cpu = torch.device("cuda", 0), torch.device("cpu")

    def there(capability, *asked):
        with settings.target(settings.Target(capability, 132, lambda *_: None)):
            return kernel_name(*asked)

    assert there((9, 0), cuda, 128) == there((9, 0), cuda, 40) == layer8.GLUON
    assert there((9, 0), cuda, 32) == there((8, 9), cuda, 128) == there((9, 0), cuda, 256) == layer8.TRITON
    assert there((8, 6), cuda, 64) == there((9, 0), cuda, 512) == there((9, 0), cpu, 64) == layer8.REFERENCE


def test_traced_and_without_gradient():
    torch.library.opcheck(
        torch.ops.ptq4dm.attention8.default, (*operands((1, 2, 4, 10, 8)), 0.5, "int8"),
        test_utils=("test_schema", "test_faketensor"),
    )  # fmt: skip
    q, k, v = operands((1, 2, 4, 10, 8))
    with pytest.raises(RuntimeError, match="no autograd formula"):
        attention8(q.requires_grad_(), k, v, 0.5, "int8").sum().backward()
