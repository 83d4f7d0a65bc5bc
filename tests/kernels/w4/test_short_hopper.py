"""The product of few rows for Hopper: what reaches it, with which launch; on a Hopper GPU against float64."""

import pytest
import torch

from helpers import distance
from ptq4dm.kernels.formats import int4
from ptq4dm.kernels.runtime import settings

short = pytest.importorskip("ptq4dm.kernels.w4.products.product_short", reason="needs Triton", exc_type=ImportError)
hopper = pytest.importorskip(
    "ptq4dm.kernels.w4.products.product_short_hopper", reason="needs Gluon", exc_type=ImportError
)

layouts = pytest.importorskip("ptq4dm.kernels.w4.products.short_layouts", exc_type=ImportError).layouts
ON_HOPPER = torch.cuda.is_available() and torch.cuda.get_device_capability()[0] == 9
GLUON = dict(GLUON=True, num_warps=8, STAGES=4, PER_SM=1, maxnreg=None)


def launches(m, n, k, setting, capability=(9, 0), zeros=False, rank=0, nonlinearity="", view=0):
    """(kernel, what it is launched with) of one call on tensors without data."""
    seen = []

    def empty(*size, dtype=torch.bfloat16):
        return torch.empty(*size, dtype=dtype, device="meta")

    gpu = settings.Target(capability, 132, lambda kernel, given: seen.append((kernel, given)))
    groups = k // 64
    branch, up = (empty(m, 16), empty(n, rank)) if rank else (None, None)
    wzeros = empty(n, groups, dtype=torch.int8) if zeros else None
    x = empty(m, k + view)[:, :k]
    with settings.target(gpu):
        short.short_product(
            x, None, empty(n, k // 2, dtype=torch.uint8), empty(n, groups), branch, up, empty(n), empty(m, n),
            setting, nonlinearity, wzeros,
        )  # fmt: skip
    return seen[-1]


@pytest.mark.parametrize(
    "sizes, more, served",
    [
        ((1, 70, 256), {}, True),
        ((16, 18432, 3072), {}, True),
        ((17, 18432, 3072), {}, False),
        ((1, 70, 320), {}, False),  # an odd number of groups
        ((8, 70, 6144), {}, True),
        ((16, 70, 6144), {}, False),  # more inputs than registers hold
        ((1, 70, 256), {"zeros": True}, False),
        ((1, 70, 256), {"rank": 12}, False),
        ((1, 70, 256), {"nonlinearity": "silu"}, False),
    ],
)
def test_what_it_does_not_serve_is_multiplied_by_the_other_kernel(sizes, more, served):
    kernel, given = launches(*sizes, GLUON, **more)
    assert (kernel is hopper._short_kernel) == served
    if not served:
        assert kernel is short._short_kernel and given["BM"] == (8 if sizes[0] <= 8 else 16)


def test_settings_with_gluon_are_for_hopper():
    with pytest.raises(ValueError, match="are for Hopper"):
        launches(1, 70, 256, GLUON, capability=(8, 0))
    kernel, _ = launches(1, 70, 256, dict(BM=8, BN=16, AHEAD=1, num_warps=4), capability=(9, 0))
    assert kernel is short._short_kernel


@pytest.mark.parametrize("m", [1, 8, 9, 16])
@pytest.mark.parametrize("k", [128, 256, 640, 1152, 3072])
@pytest.mark.parametrize("warps, programs", [(4, 3), (8, 1), (16, 2)])
def test_launches_hold_all_inputs_and_fit(m, k, warps, programs):
    _, given = launches(m, 6912, k, GLUON | dict(num_warps=warps, PER_SM=programs, STAGES=8))
    per, stages, warps = given["PER"], given["STAGES"], given["WARPS"]
    assert per * warps * 64 >= k and (per - 1) * warps * 64 < k and per * given["COLUMNS"] <= hopper.HELD
    held = stages * per * 16 * warps * (32 + 2) + warps * given["COLUMNS"] * 128 * 4
    assert 1 <= stages <= 8 and programs * held <= 227 << 10
    rows = 8 * given["COLUMNS"]
    assert m <= rows < m + 8


@pytest.mark.parametrize("warps", [4, 8, 16])
@pytest.mark.parametrize("columns", [1, 2])
def test_each_element_has_a_thread_and_each_thread_one(warps, columns):
    """Layouts cover their tensors: bases of registers, lanes and warps span every place once."""
    made = layouts(warps, columns, 8)
    sums = 4 * columns
    for name, size in (("ONE", 1), ("TWO", 2), ("FOUR", 4), ("READ", 4), ("GATHER", sums), ("MEET", sums)):
        layout = made[name]
        bases = [*layout.reg_bases, *layout.lane_bases, *layout.warp_bases]
        places = {tuple(0 for _ in layout.shape)}
        for basis in bases:
            places |= {tuple(a ^ b for a, b in zip(place, basis, strict=True)) for place in places}
        assert len(places) == 2 ** len(bases) == 32 * warps * size
        assert all(0 <= p < s for place in places for p, s in zip(place, layout.shape, strict=True))


@pytest.mark.parametrize("warps", [4, 8, 16])
@pytest.mark.parametrize("columns", [1, 2])
def test_sums_are_read_where_they_were_stored_and_leave_side_by_side(warps, columns):
    """Shared memory has [columns, odd rows, warps, t / 2, (t % 2, outputs)]; rows are counted in this order."""
    made = layouts(warps, columns, 8)
    gather, meet = made["GATHER"], made["MEET"]
    for part in ("reg_bases", "lane_bases", "warp_bases"):
        for (line, place), there in zip(getattr(gather, part), getattr(meet, part), strict=True):
            half, rest = line % 2, line // 2
            warp, quad = rest % warps, rest // warps
            assert [warp, 4 * quad + 2 * half + place // 16, place % 16] == there
    assert meet.lane_bases[:3] == [[0, 0, 1], [0, 0, 2], [0, 0, 4]]


@pytest.mark.gpu
@pytest.mark.skipif(not ON_HOPPER, reason="the Gluon product is for Hopper")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(
    "m, n, k, warps, stages, programs",
    [
        (1, 70, 256, 4, 1, 2), (3, 130, 1152, 8, 2, 1), (13, 1000, 640, 4, 3, 1), (16, 4100, 3072, 16, 2, 1),
        (9, 4097, 1024, 8, 4, 2), (5, 40000, 128, 4, 2, 1), (8, 6912, 1152, 4, 2, 3), (2, 24, 6144, 16, 1, 1),
    ],
)  # fmt: skip
def test_on_hopper(m, n, k, warps, stages, programs, bias, dtype):
    """Outputs that fill no block, groups that fill no round, fewer blocks than programs and many more."""
    generator = torch.Generator().manual_seed(m + n + k)
    weight = torch.randn(n, k, generator=generator) / k**0.5
    codes, scales = int4.quantize_groups(weight, 64, dtype)
    x = (2 * torch.randn(m, k + 8, generator=generator)).cuda().to(dtype)[:, :k]  # rows that are not side by side
    added = torch.randn(n, generator=generator).to(dtype).cuda() if bias else None
    right = x.double() @ int4.dequantize_groups(codes, scales).double().cuda().T
    right = right if added is None else right + added.double()
    operands = (x, None, int4.pack_int4(codes, 64).cuda(), scales.cuda(), None, None, added)
    setting = dict(GLUON=True, num_warps=warps, STAGES=stages, PER_SM=programs)
    outs = [torch.full((m, n), float("nan"), dtype=dtype, device="cuda") for _ in range(2)]
    for out in outs:
        short.short_product(*operands, out, setting)
    assert distance(outs[0], right) < (6e-4 if dtype == torch.float16 else 4e-3)
    assert torch.equal(*outs)
