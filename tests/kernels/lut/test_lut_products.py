"""Binary-coded layers on a GPU against float64: in Triton's interpreter, or on a GPU where there is one.

The interpreter multiplies no bf16, so there inputs of sign planes are fp16.
"""

import pytest
import torch

from ptq4dm.kernels.formats import bcq
from ptq4dm.kernels.lut import layer
from ptq4dm.kernels.lut.reference import reference, weight_of

pytest.importorskip("triton")
import triton.language as tl  # noqa: E402

from ptq4dm.kernels.lut import planes, unpack  # noqa: E402

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
pytestmark = [pytest.mark.gpu] * CUDA
SIXTEEN = [torch.float16, torch.bfloat16] if CUDA else [torch.float16]
# N, K, group, bits, offsets: whole tiles and parts of them, words that are not full, units of one, two and four words
CASES = [
    (64, 32, None, 1, False), (70, 40, None, 3, True), (34, 128, 64, 2, False), (33, 96, 32, 4, True),
    (5, 384, 128, 2, True), (19, 256, 128, 3, False), (3, 27, None, 2, True),
]  # fmt: skip


def operands(n, k, group, bits, offsets, dtype=torch.float16):
    generator = torch.Generator().manual_seed(n + k)
    groups = 1 if group is None else k // group
    codes = torch.randint(0, 2**bits, (n, k), generator=generator, dtype=torch.int8)
    alphas = bcq.tiled(torch.rand(n, groups, bits, generator=generator).to(dtype))
    shift = bcq.tiled(torch.randn(n, groups, generator=generator).to(dtype)) if offsets else None
    packed = bcq.pack(codes, bits), alphas, shift
    return tuple(None if one is None else one.to(DEVICE) for one in packed)


def inputs(m, n, k, dtype):
    generator = torch.Generator().manual_seed(m)
    x, bias = (torch.randn(size, generator=generator) for size in ((m, k), (n,)))
    return x.to(DEVICE, dtype), bias.to(DEVICE, dtype)


def far(found, x, packed, bias, n):
    right = reference(x.double(), *packed, None if bias is None else bias, n)
    return float((found.double() - right).norm() / right.norm())


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("config", [dict(W=4, R=1, num_warps=4), dict(W=2, R=2, num_warps=2)], ids=["W4", "W2R2"])
def test_look_up(case, config):
    n, k, *_ = case
    packed = operands(*case)
    for m in (1, 3):
        x, bias = inputs(m, n, k, torch.float32)
        assert far(layer.looked_up(x, *packed, bias, n, config), x, packed, bias, n) <= 1e-6
        assert far(layer.looked_up(x, *packed, None, n, config), x, packed, None, n) <= 1e-6
    x, bias = inputs(2, n, k, torch.float16)
    found = layer.looked_up(x, *packed, bias, n, config)
    assert found.dtype == torch.float16 and far(found, x, packed, bias, n) <= 1e-3


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("dtype", SIXTEEN, ids=str)
@pytest.mark.parametrize(
    "config", [dict(BM=8, BN=16, num_warps=2), dict(BM=16, BN=64, num_warps=4)], ids=["16", "64"]
)
def test_planes(case, dtype, config):
    n, k, *_ = case
    packed = operands(*case, dtype=dtype)
    for m in (1, 11):
        x, bias = inputs(m, n, k, dtype)
        out = torch.full((m, n), float("nan"), device=DEVICE)  # float32 shows the sums themselves
        planes.planes(x, *packed, bias, out, config)
        assert far(out, x, packed, bias, n) <= 1e-6
        found = layer.by_planes(x, *packed, bias, n, config)
        assert found.dtype == dtype and far(found, x, packed, bias, n) <= (1e-3 if dtype == torch.float16 else 6e-3)


@pytest.mark.parametrize("quads", [True, False])
def test_planes_whatever_lanes_hold(quads, monkeypatch):
    """Which inputs of a product a lane has is Triton's; sums do not depend on it."""
    if CUDA:
        pytest.skip("what is compiled is kept by the source, which is the same")
    monkeypatch.setattr(planes, "QUADS", tl.constexpr(quads))
    packed = operands(70, 256, 64, 3, True)
    x, bias = inputs(5, 70, 256, torch.float16)
    out = torch.full((5, 70), float("nan"))
    planes.planes(x, *packed, bias, out, dict(BM=8, BN=32, num_warps=2))
    assert far(out, x, packed, bias, 70) <= 1e-6


@pytest.mark.parametrize("case", CASES, ids=str)
def test_unpacked_weights(case):
    n, k, *_ = case
    packed = operands(*case)
    right = weight_of(*packed, n, k)
    assert torch.equal(unpack.unpacked(*packed, n, k, torch.float32).cpu(), right.cpu())
    x, bias = inputs(20, n, k, torch.float16)
    if CUDA:
        assert far(layer.by_cublas(x, *packed, bias, n), x, packed, bias, n) <= 2e-3
    else:
        assert torch.equal(unpack.unpacked(*packed, n, k, torch.float16), right.half())


def test_rows_that_lie_apart():
    """Rows of a wider tensor, and a transposed one."""
    packed = operands(19, 96, 32, 2, True)
    wide = inputs(6, 19, 200, torch.float16)[0]
    for x in (wide[:, :96], wide[:, 3:99], wide[:, :96].T.contiguous().T):
        config = dict(W=4, R=1, num_warps=4)
        assert far(layer.looked_up(x.float(), *packed, None, 19, config), x, packed, None, 19) <= 1e-6
        found = layer.by_planes(x, *packed, None, 19, dict(BM=8, BN=16, num_warps=2))
        assert far(found, x, packed, None, 19) <= 1e-3


def test_look_ups_are_not_rounded():
    """Inputs that no 16 bits hold come through to float32."""
    packed = operands(64, 64, None, 2, False)
    x = (1 + torch.arange(64.0, device=DEVICE)[None] * 2**-20).float()
    found = layer.looked_up(x, *packed, None, 64, dict(W=2, R=1, num_warps=2))
    assert far(found, x, packed, None, 64) <= 1e-6
