"""The activation kernel's joined and normed inputs against float64 formulas: in Triton's interpreter, or on a GPU.

The interpreter's limits are those of test_products.py: fp16 only, and up to 4% of e4m3 codes may be wrong.
"""

import pytest
import torch
import torch.nn.functional as F

import ptq4dm  # noqa: F401
from helpers import crossed

svdq_activation = pytest.importorskip("ptq4dm.kernels.w4.activation", reason="needs Triton", exc_type=ImportError)
from ptq4dm.kernels.runtime import settings as tuning  # noqa: E402
from ptq4dm.kernels.w4 import layer as svdq_linear  # noqa: E402

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
DTYPES = [torch.float16, torch.bfloat16] if CUDA else [torch.float16]
WRONG = 0.0 if CUDA else 0.04
MODERN = not CUDA or torch.cuda.get_device_capability() >= (8, 9)
CODES = {"int8": torch.int8, "int4": torch.int8} | ({"fp8": torch.float8_e4m3fn} if MODERN else {})
SMALL = dict(BM=16, BK=128, STAGES=2, ROWS=4, STEP=128, num_warps=4)
WIDE = dict(BM=64, BK=64, STAGES=3, ROWS=1, STEP=256, num_warps=4, maxnreg=None, UNPACK_BYTES=8192)
SIZES = [  # M, columns of x, columns of `more`, samples of the norm
    (1, 64, 0, 1), (3, 192, 128, 1), (66, 64, 128, 2), (20, 320, 0, 4), (3, 64, 64, 3), (35, 448, 64, 0),
    (5, 64, 0, 5), (33, 192, 0, 1),
]  # fmt: skip
pytestmark = [pytest.mark.usefixtures("one_thread")] + [pytest.mark.gpu] * CUDA


class Case:
    def __init__(self, m, k, k2, samples, rank=12, dtype=torch.float16, shift=0.0, mean=0.0):
        generator = torch.Generator().manual_seed(m + k + k2 + samples)

        def normal(*size):
            return torch.randn(*size, generator=generator)

        wide = k + k2
        joined = (mean + 2 * normal(m, wide)).to(DEVICE, dtype)
        self.x = joined[:, :k] if k2 else joined  # of rows that are further apart than they are long
        self.more = torch.cat([joined, joined], 1)[:, k : k + k2] if k2 else None
        self.smooth = (0.5 + torch.rand(wide, generator=generator)).to(DEVICE, dtype)
        self.down = (normal(rank, wide) / wide**0.5).to(DEVICE, dtype) if rank else None
        self.shift, self.norm, self.gate = shift, None, ""
        if samples:
            chunks = (0.5 * normal(samples, 3 * wide)).to(DEVICE, dtype)
            self.norm = (chunks[:, :wide], chunks[:, 2 * wide :], 1e-6)

    def value(self):
        """v in float64."""
        if self.gate:
            function = {"gelu": F.gelu, "silu": F.silu}[self.gate]
            return (self.x * function(self.more.float()).to(self.x.dtype)).double().cpu()
        v = self.x if self.more is None else torch.cat([self.x, self.more], 1)
        v = v.double().cpu()
        if self.norm is None or not v.numel():
            return v
        scale, shift = (
            torch.zeros(1, 1) if t is None else t.double().cpu().repeat_interleave(len(v) // len(t), 0)
            for t in self.norm[:2]
        )
        form = self.norm[3] if len(self.norm) > 3 else "adaptive"
        v = v if form == "rms" else v - v.mean(1, keepdim=True)
        gain = 1 + scale if form == "adaptive" else scale
        return v / (v.square().mean(1, keepdim=True) + self.norm[2]).sqrt() * gain + shift

    def quantized(self, mode, setting):
        """What the kernel leaves; all of it poisoned first."""
        rank = 0 if self.down is None else len(self.down)
        more = None if self.gate else self.more
        out = svdq_activation.empty_activation(self.x, mode, rank, CODES[mode], more)
        for tensor in out:
            tensor.view(torch.uint8).fill_(0x7F)
        svdq_activation.quantize_activation(
            self.x, self.smooth, self.down, mode, self.shift, out, setting, self.more, self.norm, self.gate
        )
        return out

    def check(self, mode, setting, rtol=2e-5):
        codes, scales, branch = self.quantized(mode, setting)
        v = self.value()
        if self.down is not None:
            rank = len(self.down)
            exact = v @ self.down.double().cpu().T
            assert (branch[:, :rank].double().cpu() - exact).norm() < 4e-3 * exact.norm()
            assert (branch[:, rank:] == 0).all()
        v = (v + self.shift) / self.smooth.double().cpu()
        if mode == "int4":
            v = v.unflatten(1, (-1, 64))
        top = v.amax(-1).clamp(min=0) if mode == "int4" and self.shift else v.abs().amax(-1)
        limit = {"fp8": 448, "int8": 127, "int4": 15 if self.shift else 7}[mode]
        wanted = top / limit
        assert torch.allclose(scales.double().cpu(), wanted.T if mode == "int4" else wanted, rtol=rtol)
        ideal = v / wanted[..., None]
        if mode == "int4" and self.shift:
            ideal = ideal.clamp(min=0)
        ideal = ideal.flatten(1) if mode == "int4" else ideal
        expected = ideal.float().to(CODES[mode]).float() if mode == "fp8" else ideal.round().float()
        found = codes.float().cpu()
        step = (expected.abs() / 8).clamp(min=2**-9) if mode == "fp8" else torch.ones(())
        wrong = WRONG if mode == "fp8" else 0
        assert ((found - expected).abs() > step).float().mean() <= wrong
        assert (found != expected).float().mean() <= 2e-3 + wrong


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@crossed("sizes, setting, mode", SIZES, [SMALL, WIDE], list(CODES))
def test_inputs(sizes, setting, mode, dtype):
    Case(*sizes, dtype=dtype).check(mode, setting)


@crossed("sizes, form, shifted, mode", SIZES[1:5], ["layer", "rms"], [True, False], list(CODES))
def test_norms_with_weights(sizes, form, shifted, mode):
    """Weights, or weights of one sample; RMSNorm keeps a mean; a norm without a bias has no shift."""
    case = Case(*sizes, mean=0.5)
    scale, shift, eps = case.norm
    case.norm = scale + 1, shift if shifted else None, eps, form
    case.check(mode, SMALL)
    case.check(mode, WIDE)


def gated(m, k, gate, rank=12, **options):
    """Two halves of rows that are twice as long, as a projection leaves them."""
    case = Case(m, k, k, 0, rank, **options)
    case.gate, case.smooth = gate, case.smooth[:k]
    case.down = case.down[:, :k].contiguous() if rank else None
    return case


@pytest.mark.parametrize("mode", list(CODES))
@pytest.mark.parametrize("gate", ["gelu", "silu"])
@pytest.mark.parametrize("m, k, rank", [(1, 64, 12), (66, 64, 0), (19, 320, 16)])
def test_gated_inputs(m, k, rank, gate, mode):
    gated(m, k, gate, rank).check(mode, SMALL)
    gated(m, k, gate, rank).check(mode, WIDE)


@pytest.mark.parametrize("mode", list(CODES))
@pytest.mark.parametrize("rank, shift", [(0, 0.0), (16, 0.171875)])
def test_without_a_branch_and_with_a_shift(mode, rank, shift):
    Case(21, 128, 192, 3, rank, shift=shift).check(mode, SMALL)


@pytest.mark.parametrize("mode", list(CODES))
def test_a_mean_far_from_zero_cancels(mode):
    """fp16 has two bits left for what differs from the mean; float32 sums of x and x^2 would keep too few."""
    Case(20, 320, 0, 2, mean=1900.0).check(mode, SMALL, rtol=2e-4)  # the mean itself has 24 bits


def test_strides_and_samples_in_any_order_of_memory():
    case = Case(12, 64, 128, 2)
    found = case.quantized("int8", SMALL)
    case.x, case.more = case.x.contiguous(), case.more.contiguous()
    case.norm = (case.norm[0].contiguous(), case.norm[1].contiguous(), case.norm[2])
    assert all(torch.equal(a, b) for a, b in zip(found, case.quantized("int8", SMALL), strict=True))


@pytest.mark.parametrize("mode", list(CODES))
@pytest.mark.parametrize("samples", [0, 2])
def test_what_is_not_finite_stays_in_its_row(mode, samples):
    clean, case = Case(10, 64, 128, samples), Case(10, 64, 128, samples)
    case.x = case.x.clone()
    case.x[1, 7], case.more[8, 100] = float("nan"), float("inf")
    scales, branch = case.quantized(mode, SMALL)[1:]
    assert not torch.isfinite(branch[[1, 8], :12]).any()
    assert torch.isnan(scales.reshape(-1, 10)[:, [1, 8]]).any(0).all()
    others = [row for row in range(10) if row not in (1, 8)]
    codes, expected = case.quantized(mode, SMALL)[0], clean.quantized(mode, SMALL)
    assert torch.equal(codes[others].view(torch.int8), expected[0][others].view(torch.int8))
    assert torch.equal(branch[others], expected[2][others])


@pytest.mark.parametrize("norm", [False, True])
def test_no_rows(norm):
    case = Case(0, 64, 64, 2 if norm else 0)
    assert [len(t) for t in case.quantized("int8", SMALL)] == [0, 0, 0]


def test_constant_rows_are_shift_alone():
    case = Case(4, 192, 0, 1)
    case.x = torch.full_like(case.x, 3.0)
    codes, scales, branch = case.quantized("int8", SMALL)
    found = codes.double().cpu() * scales.double().cpu()[:, None] * case.smooth.double().cpu()
    shift = case.norm[1].double().cpu()
    assert (found - shift).abs().max() < 0.02 * shift.abs().max()
    assert torch.allclose(
        branch[:, :12].double().cpu(), (shift @ case.down.double().cpu().T).expand(4, -1), atol=1e-3
    )


def test_what_does_not_fit_is_said():
    def refused(match, **changed):
        case = Case(6, 64, 64, 2)
        vars(case).update(changed)
        with pytest.raises(ValueError, match=match):
            case.quantized("int8", SMALL)

    fine = Case(6, 64, 64, 2)
    scale, shift, eps = fine.norm
    refused("give both the same dtype", more=fine.more.double())
    refused("give both the same dtype", more=fine.more[:5])
    refused("multiples of 64", more=fine.more[:, :32])
    refused("columns of more are not contiguous", more=fine.more.T.contiguous().T)
    refused(r"give both \[B, 128\]", norm=(scale[:, :64], shift[:, :64], eps))
    refused("B divides 6", norm=(scale.repeat(2, 1), shift.repeat(2, 1), eps))
    refused("a gate is one of gelu", gate="relu")
    refused("and its gate", gate="silu", more=fine.more[:5])
    refused("not both", gate="silu", more=fine.x)
    refused("one of adaptive, layer, rms", norm=(scale, shift, eps, "group"))
    refused("scale and shift are not contiguous", norm=(scale.T.contiguous().T, shift, eps))


@pytest.mark.skipif(not CUDA, reason="needs a CUDA device")
@pytest.mark.parametrize("mode", list(CODES))
def test_sizes_of_flux_with_settings_that_ship(mode):
    """Settings of the launch that unpacks weights too serve this one as they are."""
    for m, n, k, k2, samples in ((4608, 3072, 3072, 12288, 0), (4608, 9216, 3072, 0, 1), (8194, 9216, 3072, 0, 2)):
        setting = tuning.best_config(f"{mode}.prepare", torch.device(DEVICE), m, n, k + k2)
        case = Case(m, k, k2, samples, 32, torch.bfloat16)
        case.check(mode, setting)
        again = case.quantized(mode, setting)
        for a, b in zip(case.quantized(mode, setting), again, strict=True):
            assert torch.equal(a.view(torch.uint8), b.view(torch.uint8))


def test_every_setting_of_the_launch_that_unpacks_serves():
    entries = [
        entry
        for path in tuning.FOLDER.glob("sm_*.json")
        for mode in svdq_linear.MODES.values()
        for entry in tuning._read(path.stem).get(f"{mode}.prepare", [])
    ]
    assert len(entries) > 10
    assert all(set(svdq_activation.SETTINGS) <= set(entry[3]) for entry in entries)
