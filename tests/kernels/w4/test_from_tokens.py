"""Codes of tokens made once for several layers: the bits that each layer would have made by itself."""

import pytest
import torch

import ptq4dm  # noqa: F401
from helpers import normal
from packed_layers import packed, progressive_weight, whole
from ptq4dm.kernels.formats.nonlinearities import NONLINEARITIES
from ptq4dm.kernels.w4 import from_codes, from_tokens, integer
from ptq4dm.kernels.w4.progressive import progressive_linear
from ptq4dm.kernels.w8a8 import from_codes as w8a8_codes
from ptq4dm.kernels.w8a8 import layer as w8a8

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
pytestmark = [pytest.mark.usefixtures("one_thread")] + [pytest.mark.gpu] * CUDA


def weight(n, k, groups):
    codes, steps, zeros = progressive_weight(n, k, groups)
    scales, bias = normal(n, seed=1).abs() * 0.01, normal(n, seed=2)
    return tuple(one.to(DEVICE) for one in (packed(codes), steps, zeros, scales, bias))


@pytest.mark.parametrize("kernels", [False, True], ids=["reference", "kernels"])
@pytest.mark.parametrize("m, n, k, groups", [(1, 64, 128, 1), (70, 130, 192, 3), (33, 96, 96, 3), (5, 17, 256, 2)])
def test_progressive_layers(m, n, k, groups, kernels, monkeypatch):
    """32 inputs a group, too, which fill up no run of 64."""
    if kernels:
        pytest.importorskip("triton")
        monkeypatch.setattr(integer, "known_to_serve", lambda device: True)
    elif CUDA:
        monkeypatch.setattr(integer, "known_to_serve", lambda device: False)
    x = (normal(m, k, seed=3) * 3).to(DEVICE, torch.float16)
    operands = weight(n, k, groups)
    wanted = progressive_linear(x, *operands)
    codes, scale = from_tokens.w4a8_tokens(x)
    assert codes.shape == (m, -(-k // 64) * 64) and (codes[:, k:] == 0).all() and scale.shape == (m,)
    found = from_tokens.progressive_product(codes, scale, *operands, k, torch.float16)
    assert torch.equal(found, wanted)
    with pytest.raises(ValueError, match="are not of a layer with"):
        from_tokens.progressive_product(codes[:, :-32], scale, *operands, k, torch.float16)


@pytest.mark.parametrize("function", ["gelu", "gelu_tanh", "silu"])
@pytest.mark.parametrize("unpacks", [False, True], ids=["widened", "unpacked"])
def test_the_function_after_a_progressive_product_is_of_its_sums(unpacks, function, monkeypatch):
    """In every way that kernels have, of float32, after the bias."""
    pytest.importorskip("triton")
    m, n, k, groups = 70, 136, 192, 3
    operands = weight(n, k, groups)
    codes, scale = from_tokens.w4a8_tokens((normal(m, k, seed=3) * 3).to(DEVICE, torch.float16))
    reference = from_tokens.progressive.reference_product(codes, scale, *operands)
    config = dict(TMA=False, BM=32, BN=64, BK=64, BAND=2, num_warps=4, num_stages=2, UNPACK=unpacks)
    monkeypatch.setattr(integer, "known_to_serve", lambda device: True)
    monkeypatch.setattr(integer, "best_config", lambda *sizes: config)
    found = from_tokens.progressive_product(codes, scale, *operands, k, torch.float16, function)
    wanted = NONLINEARITIES[function](reference)
    assert (found - wanted).abs().max() < 2e-3 * wanted.abs().max()
    assert not torch.allclose(found.float(), reference, atol=1e-2)
    with pytest.raises(ValueError, match="the nonlinearity after a product is one of"):
        from_tokens.progressive_product(codes, scale, *operands, k, torch.float16, "relu")


@pytest.mark.parametrize("name", ["reference"] + ["kernel"] * CUDA)
@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn], ids=str)
@pytest.mark.parametrize("m, n, k", [(1, 16, 32), (70, 130, 192), (3, 5, 40)])
def test_layers_of_8_bits(m, n, k, dtype, name, monkeypatch):
    if name == "reference":
        monkeypatch.setattr(w8a8, "kernel_name", lambda *_: w8a8.REFERENCE)
    x = (normal(m, k, seed=3) * 3).to(DEVICE, torch.bfloat16)
    qweight = whole(-127, 127, n, k).to(DEVICE)
    qweight = qweight if dtype == torch.int8 else (qweight / 8).to(dtype)
    scale, bias = normal(n, seed=1).abs().to(DEVICE) * 0.01, normal(n, seed=2).to(DEVICE)
    wanted = w8a8.w8a8_linear(x, qweight, scale, bias, None, None, 8)
    codes, rows = w8a8_codes.w8a8_tokens(x, 8, dtype)
    one = [1, 1]
    found = w8a8_codes.w8a8_conv2d_codes(
        codes, [m, 1, 1], qweight, scale, bias, rows, None, one, [0, 0], one, None, None, x.dtype
    )
    assert torch.equal(found.reshape(m, n), wanted)


def test_codes_under_a_norm_are_those_of_the_normed_tokens():
    """What a norm hands over, beside the codes of its output in float32: on a tie one step apart."""
    x, scale, shift = normal(2, 30, 192, seed=4) * 2 + 0.5, normal(1, 192, seed=5), normal(1, 192, seed=6)
    codes, scales, branch = from_codes.svdq_codes(x, None, None, None, "int8", 0.0, scale, shift, 1e-6, "layer")
    exact = torch.nn.functional.layer_norm(x, (192,), eps=1e-6) * scale + shift
    wanted, rows = from_tokens.w4a8_tokens(exact.flatten(0, 1))
    assert branch.shape == (60, 0)
    assert (codes.int() - wanted.int()).abs().max() <= 1 and (codes != wanted).float().mean() < 1e-3
    assert torch.allclose(scales, rows, rtol=1e-5)
