"""The 4-bit formats: every code against its formula, one element at a time."""

import pytest
import torch

import ptq4dm  # noqa: F401
from helpers import normal
from ptq4dm.kernels.formats import int4

SHAPES = [(1, 2, 2), (3, 64, 64), (5, 128, 64), (7, 192, 64), (3, 96, 32), (9, 48, 16), (2, 12, 4), (0, 64, 64)]
shapes = pytest.mark.parametrize("n, k, size", SHAPES)
dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
NAN, INF = float("nan"), float("inf")


def random_codes(*shape):
    return torch.randint(-8, 8, shape, generator=torch.Generator().manual_seed(0)).to(torch.int8)


@shapes
def test_packed_bytes_are_the_formula(n, k, size):
    codes = random_codes(n, k)
    packed = int4.pack_int4(codes, size)
    assert packed.dtype == torch.uint8 and packed.shape == (n, k // 2)
    for row in range(n):
        for group in range(k // size):
            for j in range(size // 2):
                low = int(codes[row, group * size + j]) + 8
                high = int(codes[row, group * size + j + size // 2]) + 8
                assert int(packed[row, group * (size // 2) + j]) == low + 16 * high
    unpacked = int4.unpack_int4(packed, size)
    assert unpacked.dtype == torch.int8 and torch.equal(unpacked, codes)


def test_every_code_of_8_bits_is_two_of_4():
    codes = torch.arange(-128, 128).to(torch.int8)
    high, low = int4.halves(codes)
    for half in (high, low):
        assert half.dtype == torch.int8 and half.min() == -8 and half.max() == 7
    assert torch.equal(16 * high.int() + low.int() + 8, codes.int())
    assert torch.equal(int4.joined(high, low), codes)


@pytest.mark.parametrize("wide", [[], [3], [*range(16)], [*range(0, 38, 2)], [*range(40)]])
def test_high_halves_lie_before_all_rows(wide):
    generator, index = torch.Generator().manual_seed(0), torch.tensor(wide, dtype=torch.int64)
    codes = torch.randint(-8, 8, (40, 6), generator=generator).to(torch.int8)
    codes[index] = torch.randint(-127, 128, (len(wide), 6), generator=generator).to(torch.int8)
    before = codes.clone()
    stored = int4.halved(codes, index)
    filled = int4.high_rows(len(wide))
    assert filled % 16 == 0 and 0 <= filled - len(wide) < 16
    assert stored.dtype == torch.int8 and stored.shape == (filled + 40, 6)
    assert stored.min() >= -8 and stored.max() <= 7 and not stored[len(wide) : filled].any()
    for row in range(40):
        high = 16 * stored[wide.index(row)].int() + 8 if row in wide else 0
        assert torch.equal(high + stored[filled + row].int(), codes[row].int())
    assert torch.equal(int4.whole(stored, index), codes) and torch.equal(codes, before)


def test_packing_reads_views():
    codes = random_codes(6, 64).T
    assert torch.equal(int4.unpack_int4(int4.pack_int4(codes[:, ::3], 2), 2), codes[:, ::3])


@dtypes
@shapes
def test_weight_codes_are_the_formula(n, k, size, dtype):
    weight = normal(n, k)
    codes, scales = int4.quantize_groups(weight, size, dtype)
    assert codes.dtype == torch.int8 and codes.shape == (n, k)
    assert scales.dtype == dtype and scales.shape == (n, k // size)
    for row in range(n):
        for column in range(k):
            start = column // size * size
            scale = (weight[row, start : start + size].abs().max() / 7).to(dtype)  # rounded first
            assert scales[row, column // size] == scale
            quotient = (weight[row, column] / scale.float()).item()
            assert int(codes[row, column]) == max(-7, min(7, round(quotient)))
    error = (int4.dequantize_groups(codes, scales) - weight).abs()
    assert (error <= 0.51 * scales.float().repeat_interleave(size, 1)).all()


def test_codes_belong_to_the_rounded_scale():
    """7.02 / 7 is 1 in bfloat16: 0.501 rounds to 1 of it, and would to 0 of the scale before rounding."""
    weight = torch.tensor([[7.02, 0.501]])
    assert int4.quantize_groups(weight, 2, torch.bfloat16)[0].tolist() == [[7, 1]]
    assert int4.quantize_groups(weight, 2, torch.float32)[0].tolist() == [[7, 0]]


def test_halves_go_to_the_even_neighbour():
    weight = torch.tensor([[7.0, 0.5, 1.5, 2.5, -0.5, -1.5, -2.5, -7.0]])
    assert int4.quantize_groups(weight, 8)[0].tolist() == [[7, 0, 2, 2, 0, -2, -2, -7]]


@dtypes
def test_zero_groups_get_scale_one(dtype):
    weight = torch.cat([torch.zeros(3, 8), normal(3, 8)], 1)
    codes, scales = int4.quantize_groups(weight, 8, dtype)
    assert (scales[:, 0] == 1).all() and (codes[:, :8] == 0).all()
    assert (scales[:, 1] != 1).all() and (codes[:, 8:].abs().amax(1) == 7).all()


def test_given_scales_and_range():
    weight, scales = normal(3, 8), torch.tensor([[0.1, 0.3]]).expand(3, 2)
    codes = int4.quantize_codes(weight, scales, -8, 5)
    wanted = (weight / torch.tensor([0.1] * 4 + [0.3] * 4)).round().clamp(-8, 5)
    assert codes.dtype == torch.int8 and torch.equal(codes.float(), wanted)
    assert codes.min() == -8 and codes.max() == 5


def test_weight_codes_survive_a_second_quantization():
    codes, scales = int4.quantize_groups(normal(5, 128), 64, torch.bfloat16)
    sixteen_bits = int4.dequantize_groups(codes, scales).bfloat16()
    assert torch.equal(int4.quantize_codes(sixteen_bits, scales), codes)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("unsigned", [False, True])
@pytest.mark.parametrize("shape, size", [((5, 64), 64), ((2, 3, 96), 32), ((16,), 4), ((0, 64), 64)], ids=str)
def test_activation_codes_are_the_formula(shape, size, unsigned, dtype):
    x = normal(*shape).to(dtype)
    codes, scales = int4.quantize_activation_groups(x, size, unsigned)
    assert codes.dtype == torch.int8 and codes.shape == x.shape
    assert scales.dtype == torch.float32 and scales.shape == (*shape[:-1], shape[-1] // size)
    flat_codes, flat_scales = codes.reshape(-1, size), scales.reshape(-1)
    for i, group in enumerate(x.float().reshape(-1, size)):
        scale = group.max().clamp_min(0) / 15 if unsigned else group.abs().max() / 7
        scale = scale if scale > 0 else torch.tensor(1.0)
        assert flat_scales[i] == scale
        for j, value in enumerate(group):
            code = round((value * (1 / scale)).item())
            assert (code <= 15) if unsigned else (-7 <= code <= 7)
            assert int(flat_codes[i, j]) == (max(code, 0) if unsigned else code)


def test_activation_groups_of_nothing():
    codes, scales = int4.quantize_activation_groups(torch.zeros(2, 8), 4)
    assert (codes == 0).all() and (scales == 1).all()
    codes, scales = int4.quantize_activation_groups(-torch.rand(2, 8), 4, unsigned=True)
    assert (codes == 0).all() and (scales == 1).all()


@pytest.mark.parametrize("bad", [NAN, INF])
def test_what_has_no_code_shows(bad):
    x = normal(2, 8)
    x[1, 5] = bad
    for codes, scales in [
        int4.quantize_groups(x, 4),
        int4.quantize_groups(x, 4, torch.float16),
        int4.quantize_activation_groups(x, 4),
        int4.quantize_activation_groups(x, 4, unsigned=True),
    ]:
        values = int4.dequantize_groups(codes, scales)
        assert values[1, 4:].isnan().all() and values.isnan().sum() == 4
        assert (codes[1, 4:] == 0).all()


def test_e2m1_table():
    values = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]
    every = torch.arange(16, dtype=torch.uint8)
    assert int4.dequantize_e2m1(every).tolist() == values + [-v for v in values]
    assert int4.dequantize_e2m1(every.reshape(2, 8)).dtype == torch.float32
    for code in range(16):  # sign, two bits of exponent, one of mantissa
        sign, exponent, mantissa = code >> 3, code >> 1 & 3, code & 1
        value = mantissa * 0.5 if exponent == 0 else (1 + mantissa / 2) * 2 ** (exponent - 1)
        assert int4.E2M1[code] == (-1) ** sign * value


def test_e2m1_round_trip_and_ties():
    codes = torch.tensor([*range(8), *range(9, 16)], dtype=torch.uint8)  # all but minus zero
    back = int4.quantize_e2m1(int4.dequantize_e2m1(codes))
    assert back.dtype == torch.uint8 and torch.equal(back, codes)
    ties = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0])
    assert int4.quantize_e2m1(ties).tolist() == [0, 1, 2, 3, 4, 5, 6]
    assert int4.quantize_e2m1(-ties).tolist() == [0, 9, 10, 11, 12, 13, 14]
    above = torch.nextafter(ties, torch.tensor(9.0))
    assert int4.quantize_e2m1(above).tolist() == [1, 2, 3, 4, 5, 6, 7]
    assert int4.quantize_e2m1(torch.tensor([-0.0, NAN, -NAN, INF, -INF, 99, -99])).tolist() == [
        0, 0, 0, 7, 15, 7, 15,
    ]  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_e2m1_codes_are_the_nearest(dtype):
    x = (3 * normal(41, 37)).to(dtype)
    distances = (x.float().unsqueeze(-1) - int4.E2M1).abs()  # argmin takes the first, so the smaller, of equals
    assert torch.equal(int4.quantize_e2m1(x).long(), distances.argmin(-1))


@pytest.mark.parametrize(
    "message, call",
    [
        ("100 columns do not divide into groups of 64.", lambda: int4.quantize_groups(normal(2, 100))),
        ("100 columns do not divide into groups of 64.", lambda: int4.quantize_activation_groups(normal(100), 64)),
        ("100 columns do not divide into groups of 64.", lambda: int4.pack_int4(random_codes(2, 100), 64)),
        ("50 columns do not divide", lambda: int4.unpack_int4(torch.zeros(2, 50, dtype=torch.uint8), 64)),
        ("10 columns do not divide into 4 groups", lambda: int4.quantize_codes(normal(2, 10), torch.ones(2, 4))),
        ("10 columns do not divide into 4 groups", lambda: int4.dequantize_groups(normal(2, 10), torch.ones(2, 4))),
        ("its size is even; got 3.", lambda: int4.pack_int4(random_codes(2, 6), 3)),
        ("its size is even; got 0.", lambda: int4.unpack_int4(torch.zeros(2, 6, dtype=torch.uint8), 0)),
        ("got codes from -9 to 8.", lambda: int4.pack_int4(torch.tensor([[-9, 8]], dtype=torch.int8), 2)),
    ],
)
def test_wrong_input_is_one_sentence(message, call):
    with pytest.raises(ValueError) as caught:
        call()
    assert message in str(caught.value) and str(caught.value).count(". ") == 0
