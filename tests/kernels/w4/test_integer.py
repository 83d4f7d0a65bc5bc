"""Triton's kernels for progressive and grouped W4A8 against their formulas: in its interpreter, or on a GPU."""

import pytest
import torch

import ptq4dm  # noqa: F401
from ptq4dm.kernels.formats.int4 import halved, pack_int4
from ptq4dm.kernels.runtime import settings
from ptq4dm.kernels.w4 import grouped, integer, progressive, row_mix
from ptq4dm.kernels.w4.tokens import token_codes

tokens_triton = pytest.importorskip("ptq4dm.kernels.w4.tokens_triton", reason="needs Triton", exc_type=ImportError)
from ptq4dm.kernels.w4 import progressive_triton  # noqa: E402

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
HOPPER = not CUDA or torch.cuda.get_device_capability() >= (9, 0)
POINTERS = dict(TMA=False, BM=32, BN=64, BK=64, BAND=2, num_warps=4, num_stages=2)
WIDE = POINTERS | dict(BM=16, BK=128)
TMA = dict(TMA=True, BM=64, BN=64, BK=128, BAND=2, num_warps=4, num_stages=2)
CONFIGS = [POINTERS, WIDE] + [TMA, TMA | dict(BK=64)] * HOPPER
CONFIGS += [one | dict(PACKED=False) for one in CONFIGS[::2]] * CUDA  # the interpreter runs no other
UNPACK = dict(UNPACK=True, TMA=False, BM=32, BN=64, BK=64, BAND=2, num_warps=4, num_stages=2)
SIZES = [(1, 7, 64), (3, 40, 192), (33, 72, 320), (66, 24, 192)]  # M, N, K
DTYPES = [torch.float32, torch.float16] + [torch.bfloat16] * CUDA
pytestmark = [pytest.mark.usefixtures("one_thread")] + [pytest.mark.gpu] * CUDA


def whole(low, high, *size, seed=0):
    """Whole numbers in [low, high], int8."""
    return torch.randint(low, high + 1, size, generator=torch.Generator().manual_seed(seed), dtype=torch.int8)


def normal(*size, seed=0):
    return torch.randn(*size, generator=torch.Generator().manual_seed(seed))


def packed(codes):
    return pack_int4(torch.nn.functional.pad(codes, (0, -codes.shape[1] % 64)), 64)


def there(*tensors):
    return [None if one is None else one.to(DEVICE) for one in tensors]


def tokens(m, k):
    """Whole numbers in float32 whose scale is 1: they are their own codes, and sums of them are exact."""
    x = whole(-127, 127, m, k).float()
    x[:, 0] = 127
    return x


def steps_of(n, k, groups, zeros):
    """(codes, wsteps, wzeros): every (q - z) s1 that an int8 holds, the ends -127 and 127 among them."""
    codes, wzeros = whole(-8, 7, n, k).view(n, groups, -1), whole(-8, 7, n, groups, seed=1)
    codes[:, 0, 0], wzeros[0] = 7, -8
    wzeros = wzeros if zeros else torch.zeros_like(wzeros)
    widest = (codes.int() - wzeros[:, :, None]).abs().amax(-1)
    wsteps = (127 // widest.clamp(min=1)).clamp(1, 16).to(torch.int8)
    return codes.view(n, k), wsteps, wzeros if zeros else None


def groups_of(k):
    return [1] + [k // size for size in (32, 64, 128) if k % size == 0 and k > size]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("m", "k"), [(1, 64), (5, 200), (9, 3), (3, 2500), (2, 17000)])
def test_tokens_have_the_codes_of_the_formula(m, k, dtype):
    x = (normal(m, k) * torch.tensor([1e-3, 1.0, 30.0]).repeat(m)[:m, None]).to(dtype)
    x[-1] = 0
    wide = tokens_triton.packed_inputs(k)
    codes, scale, sums = (torch.full(size, 77, dtype=kind) for size, kind in (
        ((m, wide), torch.int8), ((m,), torch.float32), ((m,), torch.int32),
    ))  # fmt: skip
    x, codes, scale, sums = there(x, codes, scale, sums)
    tokens_triton.prepare(x, (codes, scale, sums), None, None, None, (None, None), (5, 0))
    wanted, s = token_codes(x.cpu())
    assert torch.equal(codes.cpu()[:, :k], wanted)
    assert torch.equal(scale.cpu(), s)
    assert not codes[:, k:].any()
    assert torch.equal(sums.cpu(), wanted.sum(1, dtype=torch.int32))


def test_tokens_without_codes_have_scales_that_say_so():
    x = normal(3, 128)
    x[0, 5], x[1, 6] = float("nan"), float("inf")
    x, codes, scale = there(x, torch.empty(3, 128, dtype=torch.int8), torch.empty(3))
    tokens_triton.prepare(x, (codes, scale, None), None, None, None, (None, None), (5, 0))
    assert scale[0].isnan()
    assert scale[1].isinf()
    assert torch.equal(codes.cpu(), token_codes(x.cpu())[0])


@pytest.mark.parametrize("zeros", [False, True])
@pytest.mark.parametrize(("n", "k"), [(7, 64), (40, 192), (5, 200), (3, 384)])
def test_codes_are_those_of_the_formula(n, k, zeros):
    for groups in groups_of(k):
        codes, wsteps, wzeros = steps_of(n, k, groups, zeros)
        wanted = progressive.reference_codes(packed(codes), wsteps, wzeros, k)
        for wide in {k, tokens_triton.packed_inputs(k)}:
            found = torch.full((n, wide), 77, dtype=torch.int8, device=DEVICE)
            progressive_triton.codes(*there(packed(codes), wsteps, wzeros), groups, k, found)
            assert torch.equal(found[:, :k].cpu(), wanted)
            assert not found[:, k:].any()


@pytest.mark.parametrize("config", [*CONFIGS, UNPACK], ids=str)
@pytest.mark.parametrize(("m", "n", "k"), SIZES)
def test_progressive_sums_are_exact(m, n, k, config):
    x = tokens(m, k)
    for groups in groups_of(k):
        codes, wsteps, wzeros = steps_of(n, k, groups, groups % 2 == 0)
        operands = (packed(codes), wsteps, wzeros, torch.ones(n), None)
        y = integer.progressive_through(*there(x, *operands), config)
        assert y.dtype == torch.float32
        assert torch.equal(y.cpu(), progressive.reference(x, *operands)), groups


@pytest.mark.parametrize("config", [*CONFIGS, UNPACK], ids=str)
@pytest.mark.parametrize(("m", "n", "k"), [*SIZES, (5, 24, 200)])
def test_sums_of_one_scale_an_output_are_exact(m, n, k, config):
    x, codes = tokens(m, k), whole(-8, 7, n, k)
    for wzeros in (None, whole(-8, 7, n, 1, seed=1)):
        operands = (packed(codes), torch.ones(n, 1), wzeros, None)
        y = integer.grouped_through(*there(x, *operands), config)
        assert torch.equal(y.cpu(), grouped.reference(x, *operands))


@pytest.mark.parametrize("config", [one for one in CONFIGS if one["BK"] == 128 or not one["TMA"]], ids=str)
@pytest.mark.parametrize(("m", "n", "k"), SIZES)
def test_sums_of_groups_are_exact(m, n, k, config):
    """Scales that are powers of two: their products with whole numbers are exact as well."""
    x, codes = tokens(m, k), whole(-8, 7, n, k)
    for groups in groups_of(k)[1:]:
        scales = 2.0 ** whole(-3, 3, n, groups, seed=2)
        for wzeros in (None, whole(-8, 7, n, groups, seed=1)):
            operands = (packed(codes), scales, wzeros, None)
            y = integer.grouped_through(*there(x, *operands), config)
            assert torch.equal(y.cpu(), grouped.reference(x, *operands)), groups


def mixed(n, wide, k, groups, zeros, seed=0):
    """(narrow outputs [n], codes of all), operands of a product of n rows of 4 bits and `wide` of 8.

    Scales are powers of two.
    """
    order = torch.randperm(n + wide, generator=torch.Generator().manual_seed(seed))
    own, narrow = order[:wide].sort().values, order[wide:].sort().values
    scales, codes = 2.0 ** whole(-3, 3, n + wide, groups, seed=seed + 2), whole(-8, 7, n + wide, k, seed=seed)
    scales[own], codes[own] = 2.0 ** whole(-1, 1, wide, groups, seed=seed + 3), whole(-127, 127, wide, k, seed=seed)
    wzeros = whole(-8, 7, n, groups, seed=seed + 1) if zeros else None
    return (narrow, codes), (packed(halved(codes, own)), scales, wzeros, own.int())


@pytest.mark.parametrize("config", [one for one in CONFIGS if one["BK"] == 128 or not one["TMA"]], ids=str)
@pytest.mark.parametrize(
    ("m", "n", "k", "wide"), [(1, 7, 64, 1), (1, 7, 64, 70), (3, 40, 192, 70), (33, 72, 320, 1), (66, 24, 192, 9)]
)
def test_sums_of_rows_of_two_widths_are_exact(m, n, k, wide, config):
    x = tokens(m, k)
    for groups in groups_of(k)[1:]:
        for zeros in (False, True):
            operands = (*mixed(n, wide, k, groups, zeros)[1], None)
            y = integer.row_mix_through(*there(x, *operands), config)
            assert torch.equal(y.cpu(), row_mix.reference(x, *operands)), groups


def test_rows_of_two_widths_are_those_of_products_of_either():
    """Narrow rows are those of grouped weights to the bit, wide ones the sums of 8-bit codes; each in its place."""
    m, n, wide, k = 33, 40, 9, 256
    x, bias = normal(m, k), normal(n + wide)
    (own, codes), (qweight, scales, zeros, other) = mixed(n, wide, k, 2, True)
    y = integer.row_mix_through(*there(x, qweight, scales, zeros, other, None), POINTERS).cpu()
    four = integer.grouped_through(*there(x, packed(codes[own]), scales[own], zeros, None), POINTERS).cpu()
    assert torch.equal(y[:, own], four)  # a compiler may add a bias within a multiplication, or after it
    y = integer.row_mix_through(*there(x, qweight, scales, zeros, other, bias), POINTERS).cpu()
    assert (y[:, own] - four - bias[own]).abs().max() < 1e-5 * four.abs().max()
    (inputs, scale), other = token_codes(x), other.long()
    sums = torch.einsum("mgk,ngk->mng", inputs.long().view(m, 2, 128), codes[other].long().view(wide, 2, 128))
    eight = (sums.double() * scales[other].double()).sum(2) * scale.double()[:, None] + bias[other].double()
    assert (y[:, other] - eight).abs().max() < 1e-5 * eight.abs().max()


@pytest.mark.parametrize("parts", [1, 2, 5, 9])
@pytest.mark.parametrize("size", [32, 64])
def test_high_halves_may_be_summed_in_parts(parts, size):
    """More parts than groups, too."""
    m, k = 40, 320
    x, operands = tokens(m, k), (*mixed(24, 70, k, k // size, True)[1], None)
    y = integer.row_mix_through(*there(x, *operands), POINTERS | dict(PARTS=parts))
    assert torch.equal(y.cpu(), row_mix.reference(x, *operands))


@pytest.mark.parametrize(("m", "parts"), [(256, 1), (1024, 3), (1100, 1), (4096, 1)])
def test_high_halves_are_split_where_they_would_run_in_a_second_wave(m, parts):
    """Of 3072 outputs a tenth, in tiles of 128 x 64, of which a GPU of 132 multiprocessors runs 396 at once."""
    config = dict(BM=128, BN=64)
    with settings.target(settings.Target((9, 0), 132, pytest.fail)):
        x = torch.empty(m, 0, device="meta")
        sums = integer.room_of_two_widths(x, 3072, 320, config)[2]
        assert sums.shape[:2] == (parts, 320) and sums.shape[2] >= m
        assert integer.room_of_two_widths(x, 3072, 320, config | dict(PARTS=2))[2].shape[0] == 2


def test_all_rows_may_be_wide():
    x, wide = tokens(5, 128), torch.arange(9)
    operands = (packed(halved(whole(-127, 127, 9, 128), wide)), torch.ones(9, 2), None, wide.int(), None)
    y = integer.row_mix_through(*there(x, *operands), POINTERS)
    assert torch.equal(y.cpu(), row_mix.reference(x, *operands))


def test_the_largest_sums_of_eight_bits_are_exact():
    """Those of a half, 16 * 128 * 127 * 8, are below 2^22, too."""
    m, k, config = 16, 256, TMA if HOPPER else POINTERS
    assert 128 * 127 * 15 < 2**22
    x, codes, wide = torch.full((m, k), 127.0), torch.full((16, k), 7, dtype=torch.int8), torch.arange(8)
    codes[:8] = -127
    operands = packed(halved(codes, wide)), torch.ones(16, 2), None, wide.int(), None
    y = integer.row_mix_through(*there(x, *operands), config).cpu()
    assert torch.equal(y[:, :8], torch.full((m, 8), -127.0 * 127 * k))
    assert torch.equal(y[:, 8:], torch.full((m, 8), 7.0 * 127 * k))


@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_the_largest_sums_are_exact(config):
    """|P| = 128 * 127 * 15 of a group is below 2^22; and 127 times -128 in all of K, which only `steps` reaches."""
    m, n, k = 16, 64, 256
    x = torch.full((m, k), 127.0)
    for code, zero in ((7, -8), (-8, 7)):
        codes, zeros = torch.full((n, k), code, dtype=torch.int8), torch.full((n, 2), zero, dtype=torch.int8)
        y = integer.grouped_through(*there(x, packed(codes), torch.ones(n, 2), zeros, None), config)
        assert 128 * 127 * 15 < 2**22
        assert torch.equal(y.cpu(), torch.full((m, n), (code - zero) * 127.0 * k))
    codes = torch.full((n, k), -8, dtype=torch.int8)
    for zero, step, w8 in ((0, 16, -128), (7, 8, -120), (-8, 16, 0)):
        zeros, steps = (torch.full((n, 2), value, dtype=torch.int8) for value in (zero, step))
        y = integer.progressive_through(*there(x, packed(codes), steps, zeros, torch.ones(n), None), config)
        assert torch.equal(y.cpu(), torch.full((m, n), w8 * 127.0 * k))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("config", [POINTERS] + [TMA] * HOPPER, ids=str)
def test_products_of_floats_are_near_the_formulas(config, dtype):
    m, n, k, groups = 33, 72, 256, 2
    x, bias, scales = normal(m, k).to(dtype), normal(n).to(dtype), normal(n, groups, seed=2).abs().to(dtype)
    codes, wsteps, wzeros = steps_of(n, k, groups, True)
    first = (packed(codes), wsteps, wzeros, scales[:, 0].float().contiguous(), bias)
    second = (packed(codes), scales, wzeros, bias)
    third = (packed(codes), scales[:, :1].contiguous(), wzeros[:, :1].contiguous(), bias)
    for through, reference, operands in (
        (integer.progressive_through, progressive.reference, first),
        (integer.grouped_through, grouped.reference, second),
        (integer.grouped_through, grouped.reference, third),
    ):
        y = through(*there(x, *operands), config)
        assert y.dtype == dtype
        wanted = reference(x, *operands)
        slack = 1e-6 if dtype == torch.float32 else torch.finfo(dtype).eps
        assert ((y.cpu().float() - wanted).abs() <= slack * (wanted.abs() + wanted.abs().amax())).all()


@pytest.mark.skipif(not CUDA, reason="tiles as they are shipped need a GPU")
@pytest.mark.parametrize("m", [1, 20, 60, 300, 1100, 4700])
def test_shipped_settings_are_exact(m):
    """Through the ops, and once more with the settings that unpack weights first."""
    n, k = 1160, 1152
    x, codes = tokens(m, k), whole(-8, 7, n, k)
    for groups in (1, 9, 18, 36):
        steps = steps_of(n, k, groups, True)
        operands = (packed(steps[0]), *steps[1:], torch.ones(n), None)
        wanted = progressive.reference(x, *operands)
        for dtype in (torch.float32, torch.bfloat16):
            y = progressive.progressive_linear(*there(x.to(dtype), *operands))
            assert torch.equal(y.cpu(), wanted.to(dtype)), groups
        scales, wzeros = 2.0 ** whole(-3, 3, n, groups, seed=2), whole(-8, 7, n, groups, seed=1)
        operands = (packed(codes), scales, wzeros, None)
        wanted = grouped.reference(x, *operands)
        for dtype in (torch.float32, torch.bfloat16):
            y = grouped.grouped_linear(*there(x.to(dtype), *operands))
            assert torch.equal(y.cpu(), wanted.to(dtype)), groups


@pytest.mark.skipif(not CUDA, reason="tiles as they are shipped need a GPU")
@pytest.mark.parametrize("m", [1, 300, 4700])
def test_rows_of_two_widths_are_exact_as_shipped(m):
    n, k = 1160, 1152
    x = tokens(m, k)
    for groups in (9, 18, 36):
        operands = (*mixed(n, 130, k, groups, True)[1], None)
        wanted = row_mix.reference(x, *operands)
        operands = there(x.to(torch.bfloat16), *operands)
        for _ in range(8):  # tiles wait for others, in another order every time
            assert torch.equal(row_mix.row_mix_grouped(*operands).cpu(), wanted.to(torch.bfloat16)), groups


def test_what_a_search_tries():
    """Tiles no longer than the rows, and for many rows the way through int8 weights in memory."""
    from ptq4dm.kernels.tuning.candidates_integer import settings_of

    for mode in ("progressive", "grouped"):
        for m, tma in ((1, True), (33, True), (4096, True), (4096, False)):
            found = settings_of(mode, m, tma)
            assert found and len({str(sorted(one.items())) for one in found}) == len(found)
            gluon = [one for one in settings_of(mode, m, tma, tma) if one.get("GLUON")]
            assert bool(gluon) == (mode == "progressive" and m == 4096 and tma)
            assert all(one["UNPACK"] for one in gluon) and not any(one.get("GLUON") for one in found)
            assert all(one["BM"] < 2 * max(m, 16) for one in found)
            assert any(one.get("UNPACK") for one in found) == (mode == "progressive" and m == 4096)
            assert all(one["TMA"] == tma for one in found if not one.get("GLUON"))


@pytest.mark.skipif(not CUDA, reason="settings are searched on a GPU")
@pytest.mark.parametrize("mode", ["progressive", "grouped"])
def test_all_settings_of_the_search_are_exact(mode):
    """Those that do not fit this GPU raise; the others agree with the first to the bit."""
    from triton.runtime.errors import OutOfResources

    from ptq4dm.kernels.tuning.launches_integer import IntegerLaunch, call_of

    launch, results = IntegerLaunch(1024, 1152, 1152, mode), []
    call = call_of(launch, 0, biased=False)
    for setting in launch.settings():
        try:
            results.append((call(config=setting), setting))
        except OutOfResources:
            continue
    assert len(results) > len(launch.settings()) // 2
    assert not [setting for one, setting in results if not torch.equal(one, results[0][0])]
