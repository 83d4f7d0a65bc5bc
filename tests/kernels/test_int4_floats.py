"""4-bit weights as floats: the op and its Triton kernel against the formula in float64, and what multiplies them."""

import pytest
import torch
import torch.nn.functional as F

from packed_layers import SHAPES, layer
from ptq4dm.kernels import dispatch
from ptq4dm.kernels.runtime import settings
from ptq4dm.kernels.tuning import latency
from ptq4dm.kernels.w4.int4_floats import FLOATS, int4_floats, reference
from ptq4dm.layers import int4_ops
from ptq4dm.layers.plan import FLOAT_INPUTS, Int4Plan
from ptq4dm.layers.registry import quantized_copy

kernel = pytest.importorskip("ptq4dm.kernels.w4.int4_codes_triton", reason="needs Triton", exc_type=ImportError)

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytestmark = [pytest.mark.gpu] * torch.cuda.is_available()


def to_device(*tensors):
    return [None if t is None else t.to(DEVICE) for t in tensors]


def exact(codes, wscales, wzeros):
    """w [N, K] float64."""
    steps = codes.double().view(*wscales.shape, -1)
    steps = steps if wzeros is None else steps - wzeros.double()[:, :, None]
    return (steps * wscales.double()[:, :, None]).flatten(1)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("zeros", [False, True], ids=["symmetric", "zeros"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_weights_are_the_formula_rounded_once(shape, zeros, dtype):
    codes, qweight, wscales, wzeros = layer(*shape, zeros)
    right = exact(codes, wscales, wzeros)
    operands = to_device(qweight, wscales, wzeros)
    got = kernel.int4_floats(*operands, shape[1], dtype).cpu()
    assert got.dtype == dtype and got.is_contiguous() and got.isfinite().all() and (got.any() or shape[0] == 1)
    if DEVICE == "cpu" and dtype == torch.bfloat16:  # Triton's interpreter cuts off where a GPU rounds
        assert ((got.double() - right).abs() <= torch.finfo(dtype).eps * right.abs()).all()
    else:
        assert torch.equal(got, right.float().to(dtype))
    assert torch.equal(int4_floats(*operands, shape[1], dtype).cpu(), right.float().to(dtype))
    assert torch.equal(reference(qweight, wscales, wzeros, shape[1]), right.float())


def test_the_op_checks_and_has_a_fake():
    _, qweight, wscales, wzeros = to_device(*layer(5, 192, 64, True))
    torch.library.opcheck(torch.ops.ptq4dm.int4_floats.default, (qweight, wscales, wzeros, 192, torch.bfloat16))
    with pytest.raises(ValueError, match="packed as"):
        int4_floats(qweight, wscales, wzeros, 128, torch.float16)
    with pytest.raises(ValueError, match="got torch.float64"):
        int4_floats(qweight, wscales, wzeros, 192, torch.float64)
    assert int4_floats(qweight[:0], wscales[:0], None, 192, torch.float16).shape == (0, 192)


LAYERS = [
    ("linear", torch.nn.Linear(256, 70), (3, 5, 256)),
    ("one scale a row", torch.nn.Linear(130, 9, bias=False), (7, 130)),
    ("conv", torch.nn.Conv2d(128, 24, 3, stride=2, padding=1), (2, 128, 7, 5)),
    ("groups", torch.nn.Conv2d(128, 24, 3, groups=2, dilation=2), (2, 128, 9, 7)),
]


@pytest.mark.parametrize("affine", [False, True], ids=["symmetric", "zeros"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize(("name", "module", "shape"), LAYERS, ids=[one[0] for one in LAYERS])
def test_layers_of_float_inputs_are_the_formula(name, module, shape, dtype, affine, monkeypatch):
    """The path of a GPU, here on whatever device there is."""
    group = None if name == "one scale a row" else 64
    plan = Int4Plan(activation_bits=FLOAT_INPUTS, group_size=group, affine=affine)
    made = quantized_copy(module, plan, "layer").to(dtype)
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    bias = None if made.bias is None else made.bias.double()
    weight, x64 = made.dequantized_weight().double(), x.double()
    if name == "conv" or name == "groups":
        right = F.conv2d(x64, weight, bias, module.stride, module.padding, module.dilation, module.groups)
    else:
        right = F.linear(x64, weight, bias)
    linear = isinstance(module, torch.nn.Linear)
    seen = []

    def named(*arguments, codebook=False):
        seen.append(arguments)
        return dispatch.CUBLAS if linear else dispatch.CUDNN

    monkeypatch.setattr(int4_ops, "kernel_name", named)
    with torch.no_grad(), torch.backends.cudnn.flags(allow_tf32=False):
        y = made.to(DEVICE)(x.to(DEVICE)).cpu()
    assert y.dtype == dtype and y.shape == right.shape and len(seen) == 1
    if linear:  # few rows are asked for where they have 16 bits
        assert seen[0][9] == (dtype in int4_ops.HALVES)
    eps = torch.finfo(torch.float32 if dtype == torch.float64 else dtype).eps
    size = (right.abs() + right.square().mean().sqrt()).clamp_min(1e-3)
    assert ((y.double() - right).abs() <= 3 * eps * size * (16 if eps < 1e-6 else 1)).all()


def test_reports_name_what_unpacks_and_multiplies():
    with settings.target(settings.Target((9, 0), 132, lambda *_: None)):
        for group_size in (None, 32, 64, 128):
            for zeros in (False, True):
                query = dict(weight="int4", activation="none", group_size=group_size, zeros=zeros)
                query["device"] = torch.device("cuda")
                for more, name in [
                    ({"inputs": 96}, "unpack + cublas"),
                    ({"linear": False}, "unpack + cudnn"),
                    ({"linear": False, "groups": 4}, "unpack + cudnn"),
                ]:
                    assert dispatch.report(dispatch.Query(**query, **more)) == {"all rows": name}
                rows = dispatch.report(dispatch.Query(**query, inputs=256))
                few = {"rows <= 32": "triton-w4a16", "more": "unpack + cublas"}
                assert rows == (few if group_size in (64, 128) else {"all rows": "unpack + cublas"})
        name = lambda *more: int4_ops.kernel_name(torch.device("cuda"), *more)  # noqa: E731
        for few, right in ((True, "triton-w4a16"), (False, "unpack + cublas")):
            assert name(True, 256, 2, True, False, FLOAT_INPUTS, 1, False, few) == right
            assert name(False, 256, 2, True, False, FLOAT_INPUTS, 1, False, few) == "unpack + cudnn"
            assert name(True, 256, 2, True, False, 8, 1, False, few) == "triton-w4a8-grouped"
    found = int4_ops.kernel_name(torch.device("cpu"), True, 256, 2, True, False, FLOAT_INPUTS, 1)
    assert found == "reference"


def test_what_is_timed_is_the_formula():
    call = latency.float_linear(3, 5, 128, torch.device("cpu"), 64, True, False, 0)
    x, weight, bias = latency._float_layer(3, 5, 128, torch.device("cpu"), 0)
    assert torch.allclose(call(), F.linear(x, int4_floats(*latency._packed(weight, 64, True), 128, x.dtype), bias))
    assert (call() - F.linear(x, weight, bias)).norm() < 0.2 * F.linear(x, weight).norm()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_a_layer_says_which_kernels_it_has(dtype, monkeypatch):
    """As a GPU would have them, of a layer that is here."""
    found = int4_ops.kernel_name
    monkeypatch.setattr(int4_ops, "kernel_name", lambda _, *more: found(torch.device("cuda"), *more))
    plan = Int4Plan(activation_bits=FLOAT_INPUTS, group_size=64, affine=True)
    made = quantized_copy(torch.nn.Linear(256, 8).to(dtype), plan, "layer")
    with settings.target(settings.Target((9, 0), 132, lambda *_: None)):
        many = {"all rows": "unpack + cublas"}
        few = {"rows <= 32": "triton-w4a16", "more": "unpack + cublas"}
        assert made.kernels() == (few if dtype == torch.bfloat16 else many)
        assert made.kernel_name() == "unpack + cublas"
