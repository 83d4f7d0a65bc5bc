"""4-bit weights under codes of 8 and 4 bits on a CPU: codes to the bit, products against float64, whole layers."""

import copy
import math

import pytest
import torch

import denoisers
from ptq4dm.calibration.record import replay
from ptq4dm.kernels.cpu import library, w4_codes
from ptq4dm.kernels.formats.int4 import dequantize_groups, pack_int4
from ptq4dm.kernels.w4 import layer, reference
from ptq4dm.svdquant.layers.svdq import SVDQLinear

compiled = pytest.mark.usefixtures("compiled")
SHAPES = [(1, 5, 64), (3, 33, 128), (17, 71, 192), (9, 130, 2112)]
FORMS = [("int8", 0.0), ("int8", 0.171875), ("int4", 0.0), ("int4", 0.171875)]


def operands(m, n, k, rank, dtype=torch.float32):
    """x, qweight, wscales, smooth, down, up, bias, of random numbers; x has an outlier, and ties among codes."""
    generator = torch.Generator().manual_seed(m + n + k + rank)
    x = torch.randn(m, k, generator=generator)
    x[0, 0] = 30.0
    x[-1, : k // 2] = torch.arange(k // 2) % 15 - 7.0
    codes = torch.randint(-8, 8, (n, k), generator=generator, dtype=torch.int8)
    wscales = (torch.rand(n, k // 64, generator=generator) + 0.1).to(torch.float16 if n % 2 else torch.bfloat16)
    smooth = (torch.rand(k, generator=generator) + 0.5).half()
    down, up = (torch.randn(*size, generator=generator).half() for size in ((rank, k), (n, rank)))
    branch = (down, up) if rank else (None, None)
    bias = torch.randn(n, generator=generator)
    return x.to(dtype), pack_int4(codes, 64), wscales, smooth, *branch, bias


def exact(codes, scales, qweight, wscales, bias):
    """The product in float64, and the sum of what its terms are without their signs."""
    codes, scales = codes.double(), scales.double()
    values = codes * scales[:, None] if scales.ndim == 1 else codes * scales.T.repeat_interleave(64, 1)
    weight = dequantize_groups(layer_codes(qweight), wscales).double()
    return values @ weight.T + bias.double(), values.abs() @ weight.abs().T + bias.abs().double()


def layer_codes(qweight):
    halves = qweight.unflatten(1, (-1, 32))
    return torch.cat([halves & 15, halves >> 4], 2).flatten(1).to(torch.int8) - 8


@pytest.mark.parametrize("activation, shift", FORMS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_codes_and_scales_are_the_references_to_the_bit(dtype, activation, shift, instructions):
    for m, n, k in SHAPES:
        x, _, _, smooth, *_ = operands(m, n, k, 0, dtype)
        for divisors in (smooth, None):
            right = reference.codes(x, None, divisors, None, activation, shift, None)
            found = w4_codes.input_codes(x, divisors, shift, activation)
            assert all(torch.equal(one, other) for one, other in zip(found, right, strict=False)), (m, k)
    x, small = torch.zeros(3, 128), torch.full((1, 128), 1e-39)  # all zeros, and no normal number: their scale is 1
    codes, scales = w4_codes.input_codes(torch.cat([x, small]), None, 0.0, activation)
    assert not codes.any() and (scales == 1).all()
    x[0, 3], x[1, 70], x[2, 5] = math.nan, math.inf, 2.0
    codes, scales = w4_codes.input_codes(x, None, shift, activation)
    assert not codes[0, :64].any() and codes[2, 5] == codes[2].max() > 0
    assert scales.reshape(-1, 3).isfinite().all(0).tolist() == [False, False, True]


@pytest.mark.parametrize("activation, shift", FORMS)
def test_products_are_those_of_float64(activation, shift, instructions):
    for m, n, k in SHAPES:
        x, qweight, wscales, smooth, _, _, bias = operands(m, n, k, 0)
        made = w4_codes.input_codes(x, smooth, shift, activation)
        right, terms = exact(*made, qweight, wscales, bias)
        found = w4_codes.product(*made, qweight, wscales, bias)
        bound = (k // 64 + 2) * 2**-24 * terms
        assert ((found - right).abs() <= bound).all(), (m, n, k)
        wrong = w4_codes.product(made[0].roll(1, 1), made[1], qweight, wscales, bias)
        assert ((wrong - right).abs() > bound).any()


@compiled
def test_bits_depend_on_neither_threads_nor_rows():
    before = torch.get_num_threads()
    try:
        for activation, shift in FORMS:
            x, qweight, wscales, smooth, _, _, bias = operands(57, 200, 2304, 0)
            found = []
            for threads in (1, 2):
                torch.set_num_threads(threads)
                for parts in ([57], [1, 6, 50]):
                    made = [w4_codes.input_codes(part, smooth, shift, activation) for part in x.split(parts)]
                    found.append(torch.cat([w4_codes.product(*one, qweight, wscales, bias) for one in made]))
            assert all(torch.equal(one, found[0]) for one in found)
    finally:
        torch.set_num_threads(before)


@compiled
@pytest.mark.parametrize("rank", [0, 8])
@pytest.mark.parametrize("activation, shift", FORMS)
def test_layers_are_the_references(activation, shift, rank):
    """Whole layers, within rounding of float32, and of the outputs' type."""
    for dtype, steps in ((torch.float32, 2e-6), (torch.bfloat16, 2**-8), (torch.float16, 2**-11)):
        for m, n, k in SHAPES[:3]:
            x, *rest = operands(m, n, k, rank, dtype)
            sums = reference.svdq_linear(x, *rest, activation, shift).float().abs().max()
            for nonlinearity in ("", "gelu_tanh", "silu", "gelu"):
                given = (x[None], *rest, activation, shift, nonlinearity)
                found, right = layer.svdq_linear(*given), reference.svdq_linear(*given)
                assert found.dtype == dtype and found.shape == (1, m, n)
                assert (found.float() - right.float()).abs().max() <= steps * sums


@compiled
def test_gelu_by_tanh():
    y = torch.cat([torch.linspace(-12, 12, 4099), torch.tensor([math.inf, 0.0, -1e30])])
    right = reference.nonlinear(y[:-1].double(), "gelu_tanh")
    found = w4_codes.gelu_tanh_(y.clone())
    assert ((found[:-1] - right).abs()[:-2] / right[:-2].abs().clamp(min=1)).max() < 3e-7
    assert found[-3] == math.inf and found[-2] == 0 and found[-1].abs() < 1e-6
    assert w4_codes.gelu_tanh_(torch.tensor([math.nan, 1.0])).isnan().tolist() == [True, False]


@compiled
@torch.no_grad()
def test_a_quantized_model_end_to_end(monkeypatch, one_thread):
    """Each layer gives what the reference gives of the same input; the whole differs by less than quantizing does."""
    model, store, _ = denoisers.quantized("dit")
    model, calls = copy.deepcopy(model), store.calls
    seen = {}
    for name, one in model.named_modules():
        if isinstance(one, SVDQLinear) and one.plan.activation != "none":
            one.register_forward_hook(lambda m, x, y, name=name: seen.update({name: (m, x[0].clone(), y.clone())}))
    served = replay(model, calls)
    kernels = {one.kernel_name() for one, *_ in seen.values()}
    assert (
        len(seen) > 8
        and kernels == {"cpu-w4a4"}
        and {one.plan.shift > 0 for one, *_ in seen.values()} == {True, False}
    )
    monkeypatch.setattr(library, "available", lambda: False)
    layers = dict(seen)
    for one, x, y in layers.values():
        assert one.kernel_name() == "reference" and set(one.kernels().values()) == {"reference"}
        right = one(x)
        assert not torch.equal(y, torch.zeros_like(y)) and (y - right).abs().max() <= 1e-5 * right.abs().max()
    right = replay(model, calls)
    model.dequantize()
    assert 0 < (served - right).norm() < 0.3 * (replay(model, calls) - right).norm()


@compiled
def test_sizes_that_do_not_belong_together():
    codes, qweight = torch.zeros(2, 128, dtype=torch.int8), torch.zeros(3, 64, dtype=torch.uint8)
    for given, says in [
        ((codes, torch.ones(2), qweight, torch.ones(3, 3)), "in 3 groups are not multiplied"),
        ((codes, torch.ones(1, 2), qweight, torch.ones(3, 1)), "in 1 groups are not multiplied"),
        ((codes[:, :96], torch.ones(2), qweight, torch.ones(3, 1)), "96 columns"),
        ((codes, torch.ones(3), qweight, torch.ones(3, 2)), "not those of 2 rows of 128 inputs"),
        ((codes, torch.ones(2), qweight[:, :32], torch.ones(3, 2)), "not those of 2 rows"),
    ]:
        with pytest.raises(ValueError, match=says):
            w4_codes.product(*given, None)
    with pytest.raises(ValueError, match="100 columns do not divide"):
        w4_codes.input_codes(torch.zeros(2, 100), None, 0.0, "int4")
    assert w4_codes.input_codes(torch.zeros(0, 64), None, 0.0, "int4")[1].shape == (1, 0)
    assert w4_codes.product(codes[:0], torch.ones(0), qweight, torch.ones(3, 2), None).shape == (0, 3)
