"""4-bit keys and values: the formula in numpy, its bound, rows it must give back as they were, bytes."""

import numpy as np
import pytest
import torch

from ptq4dm.kernels.formats.kv4 import dequantize_kv4, grid_dtype, pack_kv4, quantize_kv4, unpack_kv4

WIDTHS = [1, 3, 8, 40, 64, 72, 128]
HALVES = [torch.float16, torch.bfloat16]


def values(width, dtype=torch.float32, seed=0):
    """[2, 5, 7, width]: tokens of very different size, one far from zero."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(2, 5, 7, width, generator=generator) * torch.logspace(-3, 2, 7)[:, None]
    x[:, :, 3] += 50
    return x.to(dtype)


@pytest.mark.parametrize("width", WIDTHS)
def test_codes_are_those_of_the_formula(width):
    x = values(width, torch.float16)
    kv = quantize_kv4(x)
    rows = x.float().numpy()
    low = rows.min(-1)
    scale = ((rows.max(-1) - low) / np.float32(15)).astype(np.float16)
    steps = np.where(scale == 0, np.float32(1), scale.astype(np.float32))
    right = np.rint((rows - low[..., None]) / steps[..., None]).clip(0, 15)
    assert np.array_equal(unpack_kv4(kv.codes, width).numpy(), right)
    assert np.array_equal(kv.scales.numpy(), scale) and np.array_equal(kv.lows.float().numpy(), low)
    assert (right == 15).any() == (width > 1)


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("width", WIDTHS)
def test_no_value_moves_by_more_than_half_a_step(width, dtype):
    """And what the scale's own rounding can cut off at the top: 15 steps of 2^-9 of a step."""
    x = values(width, dtype)
    kv = quantize_kv4(x)
    error = (dequantize_kv4(kv, width) - x.float()).abs()
    assert (error <= (0.5 + 15 / 512) * kv.scales.float().unsqueeze(-1) + 1e-6).all()
    assert torch.equal(dequantize_kv4(kv, width).amin(-1), x.float().amin(-1))  # the least value stays


@pytest.mark.parametrize("dtype", HALVES)
def test_rows_of_one_value_come_back_as_they_were(dtype):
    x = torch.tensor([0.0, -3.0, 1e-6, 12345.0]).to(dtype)[:, None].expand(4, 40)
    kv = quantize_kv4(x)
    assert torch.equal(dequantize_kv4(kv, 40), x.float()) and not kv.codes.any() and not kv.scales.any()


def test_wider_values_get_float16_scales():
    assert grid_dtype(torch.float32) == grid_dtype(torch.float64) == torch.float16
    assert quantize_kv4(values(8)).scales.dtype == quantize_kv4(values(8)).lows.dtype == torch.float16
    assert quantize_kv4(values(8), torch.bfloat16).scales.dtype == torch.bfloat16


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf, 1e6])
def test_what_has_no_code_makes_its_row_nan_and_no_other(bad):
    x = values(8)
    x[1, 2, 3, 4] = bad
    kv = quantize_kv4(x)
    back = dequantize_kv4(kv, 8)
    assert back[1, 2, 3].isnan().all() and int(back.isnan().sum()) == 8 and not kv.codes[1, 2, 3].any()


@pytest.mark.parametrize("width", WIDTHS)
def test_packing_is_undone(width):
    codes = torch.randint(0, 16, (3, width), generator=torch.Generator().manual_seed(1), dtype=torch.uint8)
    packed = pack_kv4(codes)
    assert packed.shape == (3, -(-width // 2)) and torch.equal(unpack_kv4(packed, width), codes)


@pytest.mark.parametrize("width", [8, 40, 64, 72, 128])
def test_bytes(width):
    """At most (4 + 32/d)/16 of those of 16 bits, as the format's text says."""
    x = values(width, torch.float16)
    stored = sum(part.numel() * part.element_size() for part in quantize_kv4(x))
    assert stored <= (4 + 32 / width) / 16 * x.numel() * 2


def test_refusals():
    with pytest.raises(ValueError, match="at least one channel"):
        quantize_kv4(torch.zeros(3, 0))
    with pytest.raises(ValueError, match="16-bit floats"):
        quantize_kv4(torch.zeros(3, 8), torch.float32)
    with pytest.raises(ValueError, match="has 4 bytes; got 5"):
        unpack_kv4(torch.zeros(2, 5, dtype=torch.uint8), 8)
