"""Linear and Conv2d on integers: no float product in them, unbiased gradients, little noise, few bytes kept."""

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from ptq4dm.kernels.formats import shift
from ptq4dm.kernels.shift import products, transposed
from ptq4dm.layers.shift import product
from ptq4dm.layers.shift import served as served_product
from ptq4dm.layers.shift.layers import ShiftConv2d, ShiftLinear, trainable
from ptq4dm.layers.shift.widths import Widths

PRODUCTS = ("mm", "addmm", "bmm", "baddbmm", "convolution", "convolution_backward", "mv", "dot", "linear")


EXACTLY = products.kernel_name(torch.device("cpu"), (1, 1)) == products.EXACT


def is_code(values):
    """Whether float32 values are 8-bit codes, of parts whose sums float32 has exactly."""
    return values.dtype == torch.float32 and bool(((values == values.round()) & (values.abs() <= 128)).all())


class NoFloatProducts(TorchDispatchMode):
    """Raises where a product of floats is asked for; counts those of integers."""

    def __init__(self):
        super().__init__()
        self.integer = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function._schema.name.removeprefix("aten::")
        floats = [a for a in args if isinstance(a, torch.Tensor) and a.is_floating_point()]
        if name == "mm" and EXACTLY and all(is_code(a) for a in floats):
            self.integer.append(name)
        elif name in PRODUCTS and floats:
            raise AssertionError(f"{name} of {floats[0].dtype}")
        if name in ("_int_mm", "onednn::qconv2d_pointwise", "onednn::qconv2d_pointwise.default"):
            operands = [a.dtype for a in args if isinstance(a, torch.Tensor) and not a.is_floating_point()]
            assert operands[0] in (torch.int8, torch.uint8)
            self.integer.append(name)
        return function(*args, **(kwargs or {}))


def uneven(*size, seed=0):
    """Samples whose magnitudes differ by powers of two, as those of other times do."""
    g = torch.Generator().manual_seed(seed)
    return torch.randn(size, generator=g) * torch.logspace(-1.5, 0, size[0]).reshape(-1, *[1] * (len(size) - 1))


def pair(kind, widths):
    """(float layer, the same on integers, input, gradient by the output)."""
    torch.manual_seed(0)
    if kind == "linear":
        layer, x = nn.Linear(24, 20), uneven(6, 9, 24)
        return layer, ShiftLinear(layer, widths), x, uneven(6, 9, 20, seed=1)
    stride = 2 if kind == "conv, stride 2" else 1
    layer, x = nn.Conv2d(8, 12, 3, stride, 1), uneven(4, 8, 6, 6)
    side = 6 // stride
    return layer, ShiftConv2d(layer, widths), x, uneven(4, 12, side, side, seed=1)


def passes(layer, x, gradient):
    """(output, gradient by the input, by the weight, by the bias)."""
    x = x.clone().requires_grad_()
    layer.zero_grad()
    y = layer(x)
    y.backward(gradient)
    return y.detach(), x.grad, layer.weight.grad.clone(), layer.bias.grad.clone()


KINDS = ("linear", "conv", "conv, stride 2")


def distance(one, other):
    return ((one - other).norm() / other.norm()).item()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("served", [False, True])
def test_all_three_products_are_of_integers(kind, served, monkeypatch):
    layer, integer, x, gradient = pair(kind, Widths(6, 6, 6, served=served))
    for module in (product, served_product, transposed):  # what an op calls no mode can see: call what is behind it
        monkeypatch.setattr(module, "shift_conv2d", products.shift_conv2d.__wrapped__)
    monkeypatch.setattr(product, "shift_weight_gradient", products.shift_weight_gradient.__wrapped__)
    with NoFloatProducts() as seen:
        passes(integer, x, gradient)
    assert len(seen.integer) == 3
    with pytest.raises(AssertionError, match="of torch.float32"), NoFloatProducts():
        passes(layer, x, gradient)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("bits", "most"), [(8, 0.04), (6, 0.09), (4, 0.35)])
def test_passes_are_near_those_of_floats(kind, bits, most):
    layer, integer, x, gradient = pair(kind, Widths(bits, bits, bits))
    for found, exact in zip(passes(integer, x, gradient), passes(layer, x, gradient), strict=True):
        assert found.shape == exact.shape and found.dtype == exact.dtype
        assert 0 < distance(found, exact) < most


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("served", [False, True])
def test_gradients_are_unbiased(kind, served):
    """The mean of 1,000 draws is the gradient of floats at the codes of the forward pass."""
    layer, integer, x, gradient = pair(kind, Widths(4, 4, 4, served=served))
    exact = exact_at_codes(integer, x, gradient)
    draws = 1000
    torch.manual_seed(1)
    found = [passes(integer, x, gradient)[1:] for _ in range(draws)]
    for i, one in enumerate(exact):
        each = torch.stack([grads[i] for grads in found]).double() - one
        off, error = each.mean(0), each.std(0) / draws**0.5
        if error.max() < 1e-6 * one.abs().max():  # the gradient by the bias of served grids is a sum of floats
            assert off.norm() < 1e-5 * one.norm()
            continue
        z = (off / error)[error > 1e-3 * error.max()]
        assert z.abs().max() < 5  # of hundreds of entries, many of which one code decides together
        along = (each * one).flatten(1).sum(1)  # shrunk or grown as a whole?
        assert along.mean().abs() < 3 * along.std() / draws**0.5


def exact_at_codes(integer, x, gradient):
    """The gradients of floats at the rounded input and weight."""
    images = x.ndim == 4
    rows = len(x) if images else x.shape[0] * x.shape[1]  # a token is a row of a Linear layer
    last = x.permute(0, 2, 3, 1) if images else x
    weight = integer.weight.detach().permute(0, 2, 3, 1) if images else integer.weight.detach()[:, None]
    if integer.widths.served:
        flat = last.reshape(rows, -1)
        step = flat.abs().amax(1, keepdim=True) / 7
        last = (torch.round(flat / step) * step).reshape(last.shape)
        flat = weight.reshape(len(weight), -1)
        step = flat.abs().amax(1, keepdim=True) / 7
        weight = (torch.round(flat / step) * step).reshape(weight.shape)
    else:
        last, weight = (
            shift.decode(shift.encode(t.reshape(count, -1, t.shape[-1]), 4, 4)).reshape(t.shape)
            for t, count in ((last, rows), (weight, len(weight)))
        )
    plain = integer.plain()
    plain.weight = nn.Parameter((weight.permute(0, 3, 1, 2) if images else weight[:, 0]).clone())
    plain.bias = nn.Parameter(integer.bias.detach().clone())
    return passes(plain, last.permute(0, 3, 1, 2) if images else last, gradient)[1:]


@pytest.mark.parametrize("kind", ["linear", "conv"])
def test_noise_of_the_weights_gradient(kind):
    """At 4 bits the variance is at most 1.3 times that of exact scales of samples, half of that of one scale."""
    _, _, x, gradient = pair(kind, Widths())
    channels = torch.randn(gradient.shape[-1 if kind == "linear" else 1], generator=torch.Generator().manual_seed(5))
    gradient = gradient * torch.exp2(2 * channels).reshape((-1,) if kind == "linear" else (-1, 1, 1))
    variances = {}
    for name, rounded in {
        "groups": lambda dy, noise: shift.encode(dy, 4, 5, noise),
        "tensor": lambda dy, noise: shift.encode(dy, 4, 1, noise),
    }.items():
        values = lambda dy, noise, rounded=rounded: shift.decode(rounded(dy, noise))  # noqa: E731
        variances[name] = variance(values, x, gradient)
    exact = lambda dy: dy.abs().amax((1, 2), keepdim=True) / 7  # noqa: E731
    variances["exact"] = variance(lambda dy, noise: torch.floor(dy / exact(dy) + noise) * exact(dy), x, gradient)
    assert variances["groups"] <= 1.3 * variances["exact"]
    assert variances["groups"] <= 0.5 * variances["tensor"]


def variance(rounded, x, gradient, draws=200):
    """The variance of sum_m x[m] dy[m, n] over draws, summed over all entries."""
    g = torch.Generator().manual_seed(2)
    x, dy = (t.permute(0, 2, 3, 1) if t.ndim == 4 else t for t in (x, gradient))
    x, dy = (t.reshape(len(t), -1, t.shape[-1]) for t in (x, dy))
    found = []
    for _ in range(draws):
        found.append(torch.einsum("bpc,bpn->nc", x, rounded(dy, torch.rand(dy.shape, generator=g))))
    return torch.stack(found).var(0).sum().item()


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_kept_for_the_backward_pass_is_a_byte_a_value(kind):
    layer, integer, x, gradient = pair(kind, Widths())
    kept = {name: saved(one, x) for name, one in (("float", layer), ("integer", integer))}
    assert all(t.dtype == torch.int8 for t in kept["integer"] if t.numel() > 1)
    kept = {name: sum(t.numel() * t.element_size() for t in tensors) for name, tensors in kept.items()}
    few = 4 * (len(x) + sum(layer.weight.shape[:2]) + 16)  # exponents and scales
    assert kept["integer"] <= x.numel() + layer.weight.numel() + few
    assert kept["integer"] < 0.4 * kept["float"]


def saved(layer, x):
    """The tensors that a layer's call keeps for the backward pass."""
    tensors = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: tensors.append(t) or t, lambda t: t):
        layer(x.clone().requires_grad_())
    return tensors


def test_parameters_are_the_layers_own():
    for layer, integer, _, _ in (pair(kind, Widths()) for kind in KINDS):
        assert integer.weight is layer.weight and integer.bias is layer.bias
        assert integer.state_dict().keys() == layer.state_dict().keys()
        plain = integer.plain()
        assert type(plain) is type(layer) and plain.weight is layer.weight and str(plain) == str(layer)


def test_rounding_follows_torchs_seed_and_nothing_else():
    _, integer, x, gradient = pair("conv", Widths(4, 4, 4))
    torch.manual_seed(3)
    one = passes(integer, x, gradient)
    other = passes(integer, x, gradient)
    torch.manual_seed(3)
    again = passes(integer, x, gradient)
    assert all(torch.equal(a, b) for a, b in zip(one, again, strict=True))
    assert torch.equal(one[0], other[0]) and not torch.equal(one[2], other[2])


def test_large_sums_are_taken_in_parts(monkeypatch):
    _, integer, x, gradient = pair("conv", Widths(4, 4, 4))
    torch.manual_seed(3)
    whole = passes(integer, x, gradient)
    monkeypatch.setattr(product, "rows_at_once", lambda pixels: 1)
    torch.manual_seed(3)
    for one, other in zip(whole, passes(integer, x, gradient), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-9)


def test_shapes_and_dtypes_of_a_linear_layer():
    layer = nn.Linear(8, 6, bias=False)
    integer = ShiftLinear(layer, Widths())
    for size in ((8,), (3, 8), (2, 3, 8), (2, 3, 4, 8)):
        assert integer(torch.randn(size)).shape == layer(torch.randn(size)).shape
    with torch.autocast("cpu", torch.bfloat16):
        assert integer(torch.randn(3, 8)).dtype == torch.bfloat16


def test_which_layers_have_a_form_on_integers():
    assert trainable(nn.Linear(4, 4)) and trainable(nn.Conv2d(4, 4, 3, padding="same"))
    assert not trainable(nn.Conv2d(4, 4, 3, groups=2)) and not trainable(nn.Conv2d(4, 4, 3, padding_mode="circular"))
    assert not trainable(nn.Conv2d(4, 4, 1, padding=1)) and not trainable(nn.Conv1d(4, 4, 1))


@pytest.mark.parametrize("kind", KINDS)
def test_fine_inputs_have_two_codes(kind):
    """The output is as near as with sixteen bits; the gradient by the input is what it was."""
    for bits, most in ((4, 0.01), (8, 0.001)):
        layer, integer, x, gradient = pair(kind, Widths(8, bits, 8, served=True, fine=True))
        rough = pair(kind, Widths(8, bits, 8, served=True))[1]
        torch.manual_seed(1)
        found = passes(integer, x, gradient)
        torch.manual_seed(1)
        other = passes(rough, x, gradient)
        layer.weight.data = exact_weight(layer)
        exact = layer(x).detach()
        assert distance(found[0], exact) < most and distance(found[0], exact) < 0.1 * distance(other[0], exact)
        assert torch.equal(found[1], other[1]) and not torch.equal(found[2], other[2])


def exact_weight(layer):
    """What 8-bit codes of a weight with one scale an output are worth."""
    weight = layer.weight.detach()
    step = weight.flatten(1).abs().amax(1).reshape(-1, *[1] * (weight.ndim - 1)) / 127
    return torch.round(weight / step) * step
