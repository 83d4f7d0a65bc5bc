"""Levels of a codebook in Triton's kernels against the formulas: in its interpreter, or on a GPU."""

import pytest
import torch

import ptq4dm  # noqa: F401
from packed_layers import packed, whole
from ptq4dm.kernels.w4 import grouped, int4_codes, int4_floats, integer
from ptq4dm.kernels.w4.tokens import token_codes

int4_codes_triton = pytest.importorskip(
    "ptq4dm.kernels.w4.int4_codes_triton", reason="needs Triton", exc_type=ImportError
)

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
POINTERS = dict(TMA=False, BM=32, BN=64, BK=64, BAND=2, num_warps=4, num_stages=2)
CONFIGS = [POINTERS, POINTERS | dict(BM=16, BK=128), POINTERS | dict(UNPACK=True)]
if CUDA:  # the interpreter runs no PTX, and its tiles come by pointers here
    CONFIGS += [POINTERS | dict(PACKED=False)]
    if torch.cuda.get_device_capability() >= (9, 0):
        CONFIGS += [dict(TMA=True, BM=64, BN=64, BK=128, BAND=2, num_warps=4, num_stages=2)]
SIZES = [(1, 7, 64), (3, 40, 192), (33, 96, 320), (5, 24, 200)]  # M, N, K
pytestmark = [pytest.mark.usefixtures("one_thread")] + [pytest.mark.gpu] * CUDA


def there(*tensors):
    return [None if one is None else one.to(DEVICE) for one in tensors]


def groups_of(k):
    return [1] + [k // size for size in (32, 64, 128) if k % size == 0 and k > size]


def book(n, by_row):
    """Levels int8 [1, 16] or [n, 16], rising, that reach both ends."""
    levels = whole(-127, 127, n if by_row else 1, 16, seed=3)
    levels[:, :2] = torch.tensor([-127, 127])
    return levels.sort(1).values


@pytest.mark.parametrize("by_row", [False, True])
@pytest.mark.parametrize("config", CONFIGS, ids=str)
@pytest.mark.parametrize(("m", "n", "k"), SIZES)
def test_sums_of_levels_are_exact(m, n, k, config, by_row):
    """Of one scale an output, and of groups where the settings are for them; scales that are powers of two."""
    x, codes, levels = whole(-7, 7, m, k).float(), whole(-8, 7, n, k), book(n, by_row)
    x[:, 0] = 127  # their own codes, as `tokens`, and so few bits that sums of groups are exact in float32
    for groups in groups_of(k)[: 1 if "UNPACK" in config else None]:
        scales = 2.0 ** whole(-1, 1, n, groups, seed=2)
        operands = (packed(codes), scales, None, None)
        y = integer.grouped_through(*there(x, *operands), config, levels=there(levels)[0])
        assert torch.equal(y.cpu(), grouped.reference(x, *operands, levels)), groups
        exact = levels.expand(n, -1).gather(1, codes.long() + 8).double().view(n, groups, -1) * scales[:, :, None]
        q, s = token_codes(x)
        assert torch.equal(y.cpu().double(), (q.double() * s[:, None]) @ exact.view(n, k).T)


@pytest.mark.parametrize("by_row", [False, True])
@pytest.mark.parametrize(("n", "k"), [(7, 64), (40, 192), (3, 384)])
def test_unpacked_levels_are_those_of_the_formula(n, k, by_row):
    """As int8 under one scale a row, and as floats."""
    codes, levels = whole(-8, 7, n, k), book(n, by_row)
    for groups in groups_of(k):
        scales = torch.rand(n, groups, generator=torch.Generator().manual_seed(1)) + 0.1
        weight = packed(codes), scales, None
        found = int4_codes_triton.int4_codes(*there(*weight), k, 1.0, there(levels)[0])
        for one, wanted in zip(found, int4_codes.reference(*weight, k, levels), strict=True):
            assert torch.equal(one.cpu(), wanted)
        floats = int4_codes_triton.int4_floats(*there(*weight), k, torch.float32, there(levels)[0])
        assert torch.equal(floats.cpu(), int4_floats.reference(*weight, k, levels))
        exact = levels.expand(n, -1).gather(1, codes.long() + 8).view(n, groups, -1) * scales[:, :, None]
        assert torch.equal(floats.cpu(), exact.view(n, k))
        off = (found[0].cpu() * found[1].cpu()[:, None] - exact.view(n, k)).abs().amax(1)
        assert (off <= (0.5001 if groups > 1 else 0) * scales.amax(1)).all()  # half a step of the largest scale


def test_levels_that_do_not_belong_to_a_weight_are_refused():
    codes, scales = whole(-8, 7, 4, 64), torch.ones(4, 1)
    for levels in (book(1, False)[:, :8], book(3, True), book(4, True).float()):
        with pytest.raises(ValueError, match="levels are int8"):
            grouped.grouped_linear(torch.randn(2, 64), packed(codes), scales, None, None, levels)
    with pytest.raises(ValueError, match="no zero points"):
        grouped.grouped_linear(torch.randn(2, 64), packed(codes), scales, whole(0, 0, 4, 1), None, book(4, True))
