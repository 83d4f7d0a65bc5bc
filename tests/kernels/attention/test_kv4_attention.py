"""Attention on 4-bit keys and values: op, reference and kernel against torch's attention on unpacked ones in float64.

Without a GPU the kernel runs in Triton's interpreter, which checks every address; with one, these tests are marked
`gpu` and the op takes the kernel by itself. The interpreter multiplies no bf16.
"""

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention
from torch.utils._python_dispatch import TorchDispatchMode

from ptq4dm.kernels.attention import layer, reference
from ptq4dm.kernels.attention.layer import kernel_name, kv4_attention
from ptq4dm.kernels.formats.kv4 import dequantize_kv4, quantize_kv4
from ptq4dm.kernels.runtime import settings

product = pytest.importorskip("ptq4dm.kernels.attention.product", reason="needs Triton", exc_type=ImportError)

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
pytestmark = [pytest.mark.gpu] * CUDA
SHAPES = [  # B, H, M, L, d
    (1, 1, 1, 1, 1), (2, 3, 5, 77, 40), (1, 2, 70, 77, 64), (2, 2, 33, 120, 72), (1, 1, 130, 20, 128),
    (2, 1, 9, 33, 5), (1, 2, 16, 65, 160), (1, 1, 3, 64, 8),
]  # fmt: skip
BOUND = {torch.float32: 1e-5 if CUDA else 2e-6, torch.float16: 2e-3, torch.bfloat16: 1.5e-2}


def operands(shape, dtype=torch.float32, seed=0):
    """q as attention of diffusers has it, a view of [B, M, H, d], and the quantized keys and values."""
    batch, heads, rows, tokens, width = shape
    generator = torch.Generator().manual_seed(seed)
    q = torch.randn(batch, rows, heads, width, generator=generator).to(dtype).transpose(1, 2)
    k, v = (torch.randn(batch, heads, tokens, width, generator=generator) for _ in range(2))
    k[..., 0, :] *= 5  # a first token unlike the others
    k[..., :1] += 3
    return tuple(part.to(DEVICE) for part in (q, *quantize_kv4(k.to(dtype)), *quantize_kv4(v.to(dtype))))


def masks(shape, kind):
    batch, heads, rows, tokens, _ = shape
    if kind is None:
        return None
    kept = torch.arange(tokens) <= torch.arange(batch)[:, None] + tokens // 2  # a padded prompt for each of the batch
    if kind == "bool":
        return kept[:, None, None].to(DEVICE)
    if kind == "bias":  # as diffusers makes it, of every head
        return ((1 - kept.float()) * -10000.0)[:, None, None].expand(batch, heads, 1, tokens).to(DEVICE)
    return torch.randn(1, heads, rows, tokens, generator=torch.Generator().manual_seed(3)).to(DEVICE)


def truth(q, kc, ks, kl, vc, vs, vl, mask, scale):
    k, v = (dequantize_kv4(layer.KV4(*parts), q.shape[-1]).double() for parts in ((kc, ks, kl), (vc, vs, vl)))
    mask = mask if mask is None or mask.dtype == torch.bool else mask.double()
    return scaled_dot_product_attention(q.double(), k, v, attn_mask=mask, scale=scale)


def by_kernel(q, *rest):
    *grids, mask, scale = rest
    if mask is not None and mask.dtype == torch.bool:
        mask = torch.zeros_like(mask, dtype=torch.float32).masked_fill_(~mask, -torch.inf)
    return product.attention(q, layer.KV4(*grids[:3]), layer.KV4(*grids[3:]), mask, scale)


def error(y, right):
    return ((y.double() - right).norm() / right.norm()).item()


@pytest.mark.parametrize("run", [kv4_attention, by_kernel], ids=["op", "kernel"])
@pytest.mark.parametrize("mask", [None, "bool", "bias", "full"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_it_is_attention(shape, mask, run):
    given = operands(shape)
    last = masks(shape, mask), 0.7 * shape[-1] ** -0.5
    y = run(*given, *last)
    assert y.shape == given[0].shape and y.dtype == torch.float32 and y.transpose(1, 2).is_contiguous()
    assert error(y, truth(*given, *last)) < BOUND[torch.float32]


SIXTEEN = [(kv4_attention, torch.float16), (kv4_attention, torch.bfloat16), (by_kernel, torch.float16)]
SIXTEEN += [(by_kernel, torch.bfloat16)] * CUDA


@pytest.mark.parametrize(("run", "dtype"), SIXTEEN, ids=lambda value: getattr(value, "__name__", str(value)))
@pytest.mark.parametrize("shape", SHAPES[1:5], ids=str)
def test_sixteen_bits(shape, dtype, run):
    given = operands(shape, dtype)
    y = run(*given, masks(shape, "bool"), shape[-1] ** -0.5)
    assert y.dtype == dtype and error(y, truth(*given, masks(shape, "bool"), shape[-1] ** -0.5)) < BOUND[dtype]


@pytest.mark.parametrize("run", [kv4_attention, by_kernel], ids=["op", "kernel"])
def test_who_may_look_at_nothing_gets_zeros(run):
    given = operands((2, 2, 7, 70, 8))
    kept = torch.ones(2, 1, 7, 70, dtype=torch.bool, device=DEVICE)
    kept[0, :, 3] = False
    kept[1, :, 5, :66] = False  # nothing in the first tile
    y = run(*given, kept, 0.5)
    assert not y[0, :, 3].any() and error(y, truth(*given, kept, 0.5)) < BOUND[torch.float32]


@pytest.mark.parametrize("run", [kv4_attention, by_kernel], ids=["op", "kernel"])
@pytest.mark.parametrize("which", ["keys", "values"])
def test_nan_stays_in_its_head(which, run):
    q, kc, ks, kl, vc, vs, vl = operands((2, 2, 5, 40, 8))
    (ks if which == "keys" else vs)[1, 0, 7] = torch.nan
    y = run(q, kc, ks, kl, vc, vs, vl, None, 0.5)
    assert y[1, 0].isnan().all() and int(y.isnan().sum()) == y[1, 0].numel()


@pytest.mark.parametrize("run", [kv4_attention, by_kernel], ids=["op", "kernel"])
def test_large_logits_do_not_overflow(run):
    given = operands((1, 2, 6, 77, 16))
    y = run(given[0] * 1000, *given[1:], None, 1.0)  # logits of some 10^4, whose float32 steps are 10^-3
    assert y.isfinite().all() and error(y, truth(given[0] * 1000, *given[1:], None, 1.0)) < 5e-3


def test_strided_operands_and_no_rows():
    q, *grids = operands((2, 3, 6, 40, 8))
    wide = torch.cat([q, q], -1)[..., ::2]
    given = (wide, *(part.transpose(0, 1).contiguous().transpose(0, 1) for part in grids))
    for run in (kv4_attention, by_kernel):
        assert error(run(*given, None, 0.3), truth(*given, None, 0.3)) < BOUND[torch.float32]
        assert run(q[:, :, :0], *grids, None, 0.3).shape == (2, 3, 0, 8)


def test_the_op_for_compilers_and_gradients():
    given = operands((2, 2, 5, 40, 8))
    mask = masks((2, 2, 5, 40, 8), "bool")
    torch.library.opcheck(torch.ops.ptq4dm.kv4_attention.default, (*given, mask, 0.5), test_utils=("test_schema",))
    meta = kv4_attention(*(part.to("meta") for part in given), None, 0.5)
    y = kv4_attention(*given, None, 0.5)
    assert (meta.shape, meta.stride(), meta.dtype) == (y.shape, y.stride(), y.dtype)
    with pytest.raises(RuntimeError, match="no autograd formula"):
        kv4_attention(given[0].requires_grad_(), *given[1:], None, 0.5).sum().backward()


def test_refusals():
    q, kc, ks, kl, *values = operands((2, 3, 5, 40, 8))
    with pytest.raises(ValueError, match="^keys for queries"):
        kv4_attention(q, kc[:, :2], ks, kl, *values, None, 1.0)
    with pytest.raises(ValueError, match="^values for queries"):
        kv4_attention(q, kc, ks, kl, values[0][..., :3], *values[1:], None, 1.0)
    with pytest.raises(ValueError, match="uint8"):
        kv4_attention(q, kc.int(), ks, kl, *values, None, 1.0)
    with pytest.raises(ValueError, match="cannot be"):
        kv4_attention(q, kc, ks, kl, *values, torch.zeros(2, 1, 1, 39, device=DEVICE), 1.0)
    with pytest.raises(ValueError, match="1 token or more"):
        kv4_attention(q, kc[:, :, :0], ks[..., :0], kl[..., :0], *(v[:, :, :0] for v in values), None, 1.0)


def test_names_of_kernels():
    cuda = torch.device("cuda")
    for capability, name in [((7, 5), "reference"), ((8, 0), "triton-kv4"), ((9, 0), "triton-kv4")]:
        with settings.target(settings.Target(capability, 132, lambda *_: None)):
            assert kernel_name(cuda) == kernel_name(cuda, torch.float32) == name
            assert kernel_name(cuda, torch.float64) == kernel_name(torch.device("cpu")) == "reference"


def test_the_reference_unpacks_tile_by_tile():
    """300 tokens: nothing made on the way has that many rows of floats, keys or values."""
    shape = (1, 2, 7, 300, 24)
    given = operands(shape)
    made = []

    class Sizes(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            y = func(*args, **(kwargs or {}))
            if isinstance(y, torch.Tensor) and y.dtype != torch.uint8:
                made.append(y.numel())
            return y

    with Sizes():
        reference.attention(given[0], layer.KV4(*given[1:4]), layer.KV4(*given[4:]), None, 1.0)
    one = 2 * 300 * 24  # of one of them, whole
    assert made and max(made) <= max(2 * reference.TILE * 24, 2 * 7 * reference.TILE) < one


@pytest.mark.gpu
@pytest.mark.skipif(not CUDA, reason="needs a GPU")
def test_the_kernel_takes_no_memory_but_for_its_result():
    """Of a long video prompt in fp16: keys and values of 16 bits would be 64 MB."""
    shape = (4, 16, 64, 4096, 128)
    given = operands(shape, torch.float16)
    kv4_attention(*given, None, 0.1)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    y = kv4_attention(*given, None, 0.1)
    torch.cuda.synchronize()
    assert torch.cuda.max_memory_allocated() - before <= y.numel() * 2 + 4096
    assert error(y, truth(*given, None, 0.1)) < BOUND[torch.float16]


@pytest.mark.parametrize(("kind", "dtype"), [("BF16", torch.bfloat16), ("FP16", torch.float16)])
def test_four_nibbles_by_each_operation(kind, dtype):
    """The PTX, one operation after the other, on every byte in each of its four places."""
    words = [sum(((17 * place + byte) % 256) << 8 * place for place in range(4)) for byte in range(256)]
    for half, shift in (("LOW", 0), ("HIGH", 4)):
        text = getattr(product, f"_{half}_{kind}").value
        for word in words:
            found = [one for pair in by_ptx(text, word, dtype) for one in pair]
            assert found == [word >> 8 * place + shift & 15 for place in range(4)]


def by_ptx(text, word, dtype):
    """$0 and $1, two values each, of PTX with $2."""
    registers = {"$2": word}

    def halves(value):
        return torch.tensor([value & 0xFFFF, value >> 16], dtype=torch.int32).to(torch.int16).view(dtype).double()

    def of(name):
        return registers[name] if name in registers else int(name, 0)

    for line in text.strip("{ }").split(";")[1:-1]:
        name, *rest = line.replace(",", " ").split()
        target, given = rest[0], [of(one) for one in rest[1:]]
        if name == "mov.b32":
            registers[target] = given[0]
        elif name == "shr.b32":
            registers[target] = given[0] >> given[1]
        elif name == "prmt.b32":
            both = given[0] | given[1] << 32
            places = [given[2] >> 4 * i & 15 for i in range(4)]
            registers[target] = sum((both >> 8 * place & 255) << 8 * i for i, place in enumerate(places))
        elif name == "lop3.b32":
            assert given[3] == 0xEA  # a & b | c
            registers[target] = given[0] & given[1] | given[2]
        else:
            assert name == f"fma.rn.{'bf16x2' if dtype == torch.bfloat16 else 'f16x2'}"
            a, b, c = map(halves, given)
            registers[target] = (a * b + c).tolist()
    return registers["$0"], registers["$1"]


TRIED = [(40, 77, 40), (130, 300, 72), (130, 90, 128)]


@pytest.mark.parametrize("dtype", [torch.float16] + [torch.bfloat16] * CUDA, ids=str)
@pytest.mark.parametrize("sizes", TRIED, ids=str)
def test_all_settings_of_the_search_are_right(sizes, dtype):
    from ptq4dm.kernels.tuning.launches_attention import AttentionLaunch, settings_of

    given = operands((1, 1, *sizes), dtype)
    right = truth(*given, None, 0.2)
    tried = settings_of(*sizes)
    assert len({tuple(one.items()) for one in tried}) == len(tried) >= 4
    for setting in tried if CUDA else tried[::4]:  # the interpreter knows neither stages nor PTX
        y = product.attention(given[0], layer.KV4(*given[1:4]), layer.KV4(*given[4:]), None, 0.2, setting)
        assert error(y, right) < BOUND[dtype], setting
    launch = AttentionLaunch(2, 3, *sizes)
    assert launch.key == list(sizes) and len({launch.compiled_as(one) for one in tried}) == len(tried)
