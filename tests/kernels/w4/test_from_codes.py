"""An SVDQuant layer in two ops: the same as in one; by kernels the same as by the reference, within rounding."""

import pytest
import torch
import torch.nn.functional as F

import ptq4dm  # noqa: F401
from ptq4dm.kernels.cpu import library
from ptq4dm.kernels.formats import int4
from ptq4dm.kernels.formats.nonlinearities import NONLINEARITIES
from ptq4dm.kernels.runtime import settings as tuning
from ptq4dm.kernels.runtime.settings import best_config
from ptq4dm.kernels.w4 import from_codes as svdq_codes
from ptq4dm.kernels.w4 import layer as svdq_linear
from ptq4dm.kernels.w4 import reference as svdq

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
MODERN = not CUDA or torch.cuda.get_device_capability() >= (8, 9)
NAMES = [svdq_linear.INT8, svdq_linear.INT4] + [svdq_linear.FP8] * MODERN
K = 192
pytestmark = [pytest.mark.usefixtures("one_thread")] + [pytest.mark.gpu] * CUDA


class Layer:
    """Random operands for B samples of T tokens; fp16 (the interpreter multiplies no bf16)."""

    def __init__(self, b, t, n, rank, dtype=torch.float16, device=DEVICE):
        generator = torch.Generator().manual_seed(b + t + n + rank)

        def normal(*size):
            return torch.randn(*size, generator=generator).to(device, dtype)

        codes, scales = int4.quantize_groups(torch.randn(n, K, generator=generator) / K**0.5, 64, dtype)
        self.qweight, self.wscales = int4.pack_int4(codes, 64).to(device), scales.to(device)
        self.x, self.smooth, self.bias = 2 * normal(b, t, K) + 1, normal(K).abs() + 0.5, normal(n)
        self.down = normal(rank, K) / K**0.5 if rank else None
        self.up = normal(n, rank) / rank**0.5 if rank else None
        modulation = 0.5 * normal(b, 3 * K)
        self.norm = modulation[:, :K], modulation[:, 2 * K :], 1e-6

    def codes(self, mode, how="plain", x=None):
        """Arguments of svdq_codes: of x; of its columns in two tensors; of x under a norm."""
        x = self.x if x is None else x
        more = x[..., 64:] if how == "joined" else None
        x = x if more is None else x[..., :64]
        return x, more, self.smooth, self.down, mode, 0.0, *(self.norm if how == "normed" else (None, None, 0.0))

    def product(self, mode, nonlinearity="", dtype=torch.float16):
        return self.qweight, self.wscales, self.up, self.bias, mode, nonlinearity, dtype


def rows_of(arguments):
    """The arguments of svdq.codes."""
    x, more, smooth, down, mode, shift, *norm = arguments
    more = None if more is None else more.flatten(0, -2)
    return x.flatten(0, -2), more, smooth, down, mode, shift, None if norm[0] is None else tuple(norm)


@pytest.mark.parametrize("nonlinearity", NONLINEARITIES)
@pytest.mark.parametrize("mode, shift", [("fp8", 0.0), ("int8", 0.0), ("int4", 0.0), ("int4", 0.171875)])
def test_two_halves_of_the_reference_are_the_whole(mode, shift, nonlinearity, monkeypatch):
    monkeypatch.setattr(library, "available", lambda: False)
    layer = Layer(2, 5, 24, 8, torch.float32, "cpu")
    operands = (layer.qweight, layer.wscales, layer.smooth, layer.down, layer.up, layer.bias)
    whole = svdq.svdq_linear(layer.x, *operands, mode, shift, nonlinearity)
    for how in ("plain", "joined"):
        arguments = list(layer.codes(mode, how))
        arguments[5] = shift
        codes = svdq_codes.svdq_codes(*arguments)
        y = svdq_codes.svdq_product(*codes, *layer.product(mode, nonlinearity, torch.float32))
        assert torch.equal(y.view(whole.shape), whole)


def test_the_reference_of_a_norm():
    layer = Layer(2, 5, 24, 8, torch.float32, "cpu")
    scale, shift, eps = layer.norm
    x = F.layer_norm(layer.x, (K,), eps=eps) * (1 + scale[:, None]) + shift[:, None]
    found, expected = (svdq_codes.svdq_codes(*layer.codes("int8", *how)) for how in (["normed"], ["plain", x]))
    assert all(
        torch.allclose(a.float(), b.float(), rtol=1e-5, atol=1e-5) for a, b in zip(found, expected, strict=True)
    )


@pytest.mark.parametrize("how", ["plain", "joined", "normed"])
@pytest.mark.parametrize("rank", [0, 12])
@pytest.mark.parametrize("b, t", [(1, 17), (2, 35)])
@pytest.mark.parametrize("name", NAMES)
def test_kernels(name, b, t, rank, how):
    """Few rows and many; one sample and two."""
    pytest.importorskip("triton")
    layer, mode = Layer(b, t, 40, rank), svdq_linear.MODES[name]
    arguments = rows_of(layer.codes(mode, how))
    x, more, smooth, down, _, shift, norm = arguments
    codes = svdq_codes.codes_through(name, x, more, smooth, down, shift, norm)
    operands = (layer.qweight, layer.wscales, layer.up, layer.bias)
    y = svdq_codes.product_through(name, *codes, *operands, "gelu")
    cpu = [one.cpu() if isinstance(one, torch.Tensor) else one for one in arguments]
    if norm is not None:
        cpu[6] = (norm[0].cpu(), norm[1].cpu(), norm[2])
    half = [None if one is None else one.cpu() for one in operands]
    expected = svdq.product(*svdq.codes(*cpu), *half, mode, "gelu")
    tolerance = {"int4": 1.2e-2, "int8": 1.5e-2, "fp8": 4e-2 if CUDA else 9e-2}[mode]
    assert y.dtype == torch.float16 and (y.cpu() - expected).norm() < tolerance * expected.norm()


@pytest.mark.parametrize("t", [17, 35])
@pytest.mark.parametrize("name", NAMES)
def test_later_calls_look_up_no_settings(name, t, monkeypatch):
    """Until the files of settings may have changed."""
    pytest.importorskip("triton")
    layer, mode = Layer(1, t, 40, 12), svdq_linear.MODES[name]
    x, more, smooth, down, _, shift, norm = rows_of(layer.codes(mode, "normed"))

    def call():
        codes = svdq_codes.codes_through(name, x, more, smooth, down, shift, norm)
        return svdq_codes.product_through(name, *codes, layer.qweight, layer.wscales, layer.up, layer.bias, "")

    first, asked = call(), []
    monkeypatch.setattr(svdq_codes, "best_config", lambda *sizes: asked.append(sizes) or best_config(*sizes))
    assert torch.equal(call(), first) and not asked
    tuning.forget()
    assert torch.equal(call(), first) and len(asked) == 3


@pytest.mark.parametrize("name", NAMES)
def test_no_rows(name):
    pytest.importorskip("triton")
    layer = Layer(1, 3, 40, 12)
    x = layer.x[0, :0]
    codes = svdq_codes.codes_through(name, x, None, layer.smooth, layer.down, 0.0, None)
    assert codes[0].shape == (0, K) and codes[2].shape == (0, 16)
    operands = (layer.qweight, layer.wscales, layer.up, layer.bias)
    assert svdq_codes.product_through(name, *codes, *operands, "").shape == (0, 40)


NORMED = [(1, 4608, 3072), (2, 2304, 3072), (1, 512, 3072), (1, 256, 1152), (16, 256, 1152), (64, 256, 384)]


@pytest.mark.parametrize("samples, t, k", NORMED)
@pytest.mark.parametrize("name", NAMES)
def test_settings_with_a_norm(name, samples, t, k):
    """Blocks of 64 rows for the branch; steps that waste little of K."""
    pytest.importorskip("triton")
    plan = svdq_codes._codes_plan(name, torch.device(DEVICE), samples * t, k, 32, torch.float16, samples)[0]
    assert plan["BM"] == 64 and -(-k // plan["STEP"]) * plan["STEP"] < 1.5 * k
    if (samples, k) == (2, 3072):
        assert plan != svdq_codes._codes_plan(name, torch.device(DEVICE), 2 * t, k, 32, torch.float16, 1)[0]


@pytest.mark.parametrize("path", sorted(tuning.FOLDER.glob("sm_*.json")), ids=lambda path: path.stem)
def test_settings_fit_shared_memory(path):
    """Rows and D in 16 bits, for each stage, in the 99 KiB that a program has on GPUs of compute capability 8.6."""
    table = tuning.settings_in(path)
    entries = [
        one for mode in ("fp8", "int8", "int4") for step in ("prepare", "norm") for one in table[f"{mode}.{step}"]
    ]
    assert all(2 * (one["BM"] + 32) * one["BK"] * one["STAGES"] <= 99 << 10 for *_, one in entries)


CHECKS = ("test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")


@pytest.mark.parametrize("how", ["plain", "joined", "normed"])
@pytest.mark.parametrize("mode", ["fp8", "int8", "int4"])
def test_what_the_ops_tell_the_compiler(mode, how):
    """opcheck's test_schema compares inputs by multiplying, which torch cannot do with e4m3: here, by their bits."""
    layer = Layer(2, 5, 24, 8)
    arguments = layer.codes(mode, how)
    product = (*svdq_codes.svdq_codes(*arguments), *layer.product(mode, "silu"))
    for op, given in ((torch.ops.ptq4dm.svdq_codes, arguments), (torch.ops.ptq4dm.svdq_product, product)):
        before = [bits(one) for one in given]
        torch.library.opcheck(op.default, given, test_utils=CHECKS)
        outputs = op(*given)
        assert [bits(one) for one in given] == before
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        rooms = [set(map(room, tensors)) for tensors in (outputs, given)]
        assert len(rooms[0]) == len(outputs) and not rooms[0] & rooms[1]


def room(one):
    """Where a tensor's memory begins; other arguments have none."""
    return one.untyped_storage().data_ptr() if isinstance(one, torch.Tensor) else None


def bits(one):
    return one.contiguous().view(torch.uint8).flatten().tolist() if isinstance(one, torch.Tensor) else one


def test_wrong_inputs():
    layer = Layer(2, 5, 24, 8)
    x, _, *rest = layer.codes("int8")
    with pytest.raises(ValueError, match="further columns .* differ in rows"):
        svdq_codes.svdq_codes(x[..., :64], x[:1, :, 64:], *rest)
    with pytest.raises(ValueError, match="not of 2 samples and 192 inputs"):
        svdq_codes.svdq_codes(x, None, *rest[:4], layer.norm[0][:1], layer.norm[1][:1], 1e-6)
    codes = svdq_codes.svdq_codes(x, None, *rest)
    with pytest.raises(ValueError, match="not 'relu'"):
        svdq_codes.svdq_product(*codes, *layer.product("int8", "relu"))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("rows", [70, 5])
def test_a_weight_that_is_kept_in_eight_bits_gives_the_same_bits(name, rows, monkeypatch):
    """In one op and in two; up to 32 rows 8-bit inputs are multiplied by the 4 bits as ever."""
    layer = Layer(1, rows, 24, 8)
    mode = svdq_linear.MODES[name]
    monkeypatch.setattr(svdq_linear, "known_name", lambda *_: name)
    eight = svdq_linear.unpacked(layer.qweight, layer.wscales, mode)
    operands = (layer.qweight, layer.wscales, layer.smooth, layer.down, layer.up, layer.bias, 0.0, "gelu_tanh")
    whole = svdq_linear.rows_through(name, layer.x[0], *operands)
    assert torch.equal(svdq_linear.rows_through(name, layer.x[0], *operands, eight), whole)
    codes = svdq_codes.codes_through(name, layer.x[0], None, layer.smooth, layer.down, 0.0, None)
    operands = (layer.qweight, layer.wscales, layer.up, layer.bias, "")
    made = svdq_codes.product_through(name, *codes, *operands)
    assert torch.equal(svdq_codes.product_through(name, *codes, *operands, eight), made)
    used = {}
    monkeypatch.setattr(svdq_linear, "multiply", lambda *args: used.update(weight=args[4]))
    svdq_linear.rows_through(name, layer.x[0], layer.qweight, layer.wscales, None, None, None, None, 0.0, "", eight)
    assert (used["weight"] is eight) == (rows == 70 or name == svdq_linear.INT4)


def test_what_no_kernel_unpacks_cannot_be_kept():
    layer = Layer(1, 2, 24, 0, torch.float32, "cpu")
    with pytest.raises(ValueError, match="unpacks to 8 bits"):
        svdq_linear.unpacked(layer.qweight, layer.wscales, "none")
