"""The layouts of Nunchaku's files against packers that put each element at its index (nunchaku_bytes.py)."""

import functools

import pytest
import torch

import helpers
import nunchaku_bytes
import ptq4dm  # noqa: F401
from ptq4dm.errors import UserError
from ptq4dm.kernels.formats.int4 import quantize_e2m1
from ptq4dm.svdquant.nunchaku import layout

N, K, R = 256, 384, 32
E4M3 = torch.float8_e4m3fn
sixteen_bits = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)


def integers(low, high, *shape, dtype=torch.int8):
    return torch.randint(low, high + 1, shape, generator=torch.Generator().manual_seed(0)).to(dtype)


normal = functools.partial(helpers.normal, dtype=torch.bfloat16)


def same_bits(a, b):
    """Equal in dtype, shape and every bit."""
    return a.dtype == b.dtype and torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8))


def test_qweight():
    codes = integers(-8, 7, N, K)
    packed = nunchaku_bytes.pack_qweight(codes)
    assert same_bits(layout.pack_qweight(codes), packed)
    assert same_bits(layout.unpack_qweight(packed), codes)


def test_qweight_of_e2m1_codes():
    codes = quantize_e2m1(3 * normal(N, K))
    packed = nunchaku_bytes.pack_qweight(codes)
    assert same_bits(layout.pack_qweight(codes, signed=False), packed)
    assert same_bits(layout.unpack_qweight(packed, signed=False), codes)


@sixteen_bits
def test_scales(dtype):
    scales = normal(N, K // 64, dtype=dtype)
    packed = nunchaku_bytes.place(scales, nunchaku_bytes.scale_index(K // 64), (K // 64, N))
    assert same_bits(layout.pack_scales(scales), packed)
    assert same_bits(layout.unpack_scales(packed), scales)


@sixteen_bits
def test_vectors(dtype):
    vector = normal(K, dtype=dtype)
    packed = nunchaku_bytes.vector(vector)
    assert same_bits(layout.pack_vector(vector), packed)
    assert same_bits(layout.unpack_vector(packed), vector)


@sixteen_bits
def test_low_rank(dtype):
    a, b = normal(R, K, dtype=dtype), normal(N, R, dtype=dtype)
    down = nunchaku_bytes.place(a, nunchaku_bytes.down_index(R), (K, R))
    up = nunchaku_bytes.place(b, nunchaku_bytes.up_index(R), (N, R))
    assert same_bits(layout.pack_down(a), down) and same_bits(layout.unpack_down(down), a)
    assert same_bits(layout.pack_up(b), up) and same_bits(layout.unpack_up(up), b)


def test_nvfp4_scales():
    scales = normal(N, K // 16).abs().to(E4M3)
    packed = nunchaku_bytes.place(scales, nunchaku_bytes.nvfp4_index(K // 16), (K // 16, N))
    assert same_bits(layout.pack_nvfp4_scales(scales), packed)
    assert same_bits(layout.unpack_nvfp4_scales(packed), scales)


@pytest.mark.parametrize("n, k", [(64, 256), (12, 192)])
def test_awq(n, k):
    codes = integers(0, 15, n, k, dtype=torch.uint8)
    words = nunchaku_bytes.pack_awq(codes)
    assert same_bits(layout.pack_awq_qweight(codes), words.view(torch.int32))
    assert layout.pack_awq_qweight(codes).shape == (n // 4, k // 2)
    assert same_bits(layout.unpack_awq_qweight(words), codes)
    assert same_bits(layout.unpack_awq_qweight(words.view(torch.int32)), codes)


def test_views_pack_like_copies():
    codes, a, scales = integers(-8, 7, K, N).T, normal(K, R).T, normal(K // 64, N).T
    assert same_bits(layout.pack_qweight(codes), layout.pack_qweight(codes.contiguous()))
    assert same_bits(layout.pack_down(a), layout.pack_down(a.contiguous()))
    assert same_bits(layout.pack_scales(scales), layout.pack_scales(scales.contiguous()))
    unsigned = codes.bitwise_and(15)
    assert same_bits(layout.pack_awq_qweight(unsigned), layout.pack_awq_qweight(unsigned.contiguous()))


@pytest.mark.parametrize("splits", [3, 6])
def test_adanorm_rows(splits):
    n = 24
    codes, zeros, bias = integers(0, 15, n, 8), normal(2, n), normal(n)
    for tensor, dim in [(codes, 0), (zeros, 1), (zeros, -1), (bias, 0)]:
        mixed = layout.interleave_adanorm_rows(tensor, splits, dim)
        assert mixed.shape == tensor.shape
        assert same_bits(layout.deinterleave_adanorm_rows(mixed, splits, dim), tensor)
        for chunk in range(splits):
            for j in range(n // splits):
                row = tensor.select(dim, chunk * (n // splits) + j)
                assert torch.equal(mixed.select(dim, j * splits + chunk), row)


def test_bytes_of_a_layer():
    """A FLUX-sized Linear at rank 32: 4.6 bits a weight in INT4, 4.9 in NVFP4."""
    n = k = 3072
    vector = layout.pack_vector(normal(n))
    common = layout.pack_qweight(integers(-8, 7, n, k)).nbytes  # bytes that both formats have
    common += layout.pack_down(normal(32, k)).nbytes + layout.pack_up(normal(n, 32)).nbytes
    common += 3 * vector.nbytes  # bias, smooth_factor and Nunchaku's own smooth_factor_orig
    assert common == 4_718_592 + 2 * 196_608 + 3 * 6_144
    wscales = layout.pack_scales(normal(n, k // 64))
    fine_scales = layout.pack_nvfp4_scales(normal(n, k // 16).abs().to(E4M3))
    assert (wscales.nbytes, fine_scales.nbytes) == (294_912, 589_824)
    assert round((common + wscales.nbytes) / 1e6, 2) == 5.43
    assert round((common + fine_scales.nbytes + vector.nbytes) / 1e6, 2) == 5.73  # NVFP4 has wcscales too
    # the AdaLN layer of the same model
    awq = layout.pack_awq_qweight(integers(0, 15, 6 * n, k, dtype=torch.uint8))
    assert awq.shape == (4608, 1536) and awq.dtype == torch.int32


@pytest.mark.parametrize(
    "message, call",
    [
        ("weight codes: .* got \\[100, 128\\]", lambda: layout.pack_qweight(integers(-8, 7, 100, 128))),
        ("qweight: .* got \\[128, 100\\]", lambda: layout.unpack_qweight(integers(-8, 7, 128, 100))),
        ("qweight: .* got \\[128\\]", lambda: layout.unpack_qweight(integers(-8, 7, 128))),
        ("weight codes: the dtype is int8 or uint8; got bfloat16", lambda: layout.pack_qweight(normal(128, 128))),
        ("\\[-8, 7\\] here; got codes from", lambda: layout.pack_qweight(integers(-9, 9, 128, 128))),
        ("\\[0, 15\\] here; got codes from", lambda: layout.pack_qweight(integers(-8, 7, 128, 128), signed=False)),
        ("scales: .* got \\[100, 2\\]", lambda: layout.pack_scales(normal(100, 2))),
        ("wscales: .* \\[any, a multiple of 128\\]; got", lambda: layout.unpack_scales(normal(128, 2))),
        ("vector: .* got \\[100\\]", lambda: layout.pack_vector(normal(100))),
        ("vector: .* got \\[128, 1\\]", lambda: layout.unpack_vector(normal(128, 1))),
        ("the low-rank A: .* got \\[8, 128\\]", lambda: layout.pack_down(normal(8, 128))),
        ("proj_down: .* got \\[128, 8\\]", lambda: layout.unpack_down(normal(128, 8))),
        ("the low-rank B: .* got \\[128, 8\\]", lambda: layout.pack_up(normal(128, 8))),
        ("proj_up: .* got \\[120, 16\\]", lambda: layout.unpack_up(normal(120, 16))),
        ("NVFP4 scales: .* got \\[128, 6\\]", lambda: layout.pack_nvfp4_scales(normal(128, 6).to(E4M3))),
        ("NVFP4 wscales: the dtype is float8_e4m3fn", lambda: layout.unpack_nvfp4_scales(normal(8, 128))),
        ("AWQ codes: .* got \\[3, 64\\]", lambda: layout.pack_awq_qweight(integers(0, 15, 3, 64))),
        ("\\[0, 15\\] here; got codes from", lambda: layout.pack_awq_qweight(integers(-8, 7, 4, 64))),
        ("AWQ qweight: .* got \\[1, 16\\]", lambda: layout.unpack_awq_qweight(integers(0, 9, 1, 16).int())),
        ("AWQ qweight: the dtype is int32 or int16", lambda: layout.unpack_awq_qweight(integers(0, 9, 1, 64))),
        ("7 rows do not divide into 3 chunks", lambda: layout.interleave_adanorm_rows(normal(7), 3)),
        ("7 rows do not divide into 3 chunks", lambda: layout.deinterleave_adanorm_rows(normal(2, 7), 3, 1)),
    ],
)
def test_wrong_input_is_one_sentence(message, call):
    with pytest.raises(UserError, match=message) as caught:
        call()
    assert str(caught.value).count(". ") == 0
