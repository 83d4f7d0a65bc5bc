"""The rotation in the kernel that quantizes: codes, scales and branch as the reference has them."""

import pytest
import torch

import ptq4dm  # noqa: F401
from helpers import normal
from ptq4dm.kernels.formats.rotation import factors, groups_of, matrix
from ptq4dm.kernels.w4 import from_codes, reference
from ptq4dm.kernels.w4 import layer as w4

pytest.importorskip("triton")
CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
MODERN = not CUDA or torch.cuda.get_device_capability() >= (8, 9)
NAMES = [w4.INT8, w4.INT4] + [w4.FP8] * MODERN
pytestmark = [pytest.mark.usefixtures("one_thread")] + [pytest.mark.gpu] * CUDA
ROTATIONS = [(group, kind) for kind in ("regular", "sylvester") for group in groups_of(kind)]


@pytest.mark.parametrize("group, kind", ROTATIONS)
def test_a_matrix_is_the_product_of_its_factors(group, kind):
    torch.testing.assert_close(torch.kron(*factors(group, kind)), matrix(group, kind))


def arguments(how, k, shift=0.0):
    """Arguments of 2 samples of 9 rows; fp16 (the interpreter multiplies no bf16)."""
    dtype = torch.float16
    x, other = (normal(18, k, seed=seed, dtype=dtype) for seed in (1, 2))
    x[:, 5] *= 30
    smooth, down = normal(k, seed=3).abs() + 0.5, normal(12, k, seed=4, scale=k**-0.5)
    norm = (normal(2, k, seed=5, scale=0.5), normal(2, k, seed=6, scale=0.5), 1e-6, "adaptive")
    if how == "joined":
        x, other = x[:, :64].contiguous(), x[:, 64:].contiguous()
    more = other if how in ("joined", "gated") else None
    return x, more, smooth, down, shift, norm if how == "normed" else None, "silu" if how == "gated" else ""


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("how, k", [("plain", 256), ("plain", 512), ("joined", 256), ("normed", 768), ("gated", 256)])
@pytest.mark.parametrize("group, kind", [(64, "regular"), (256, "regular"), (128, "sylvester")])
def test_codes_are_those_of_the_reference(name, how, k, group, kind):
    check(name, how, k, group, kind)


@pytest.mark.parametrize("group, kind", [(16, "regular"), (16, "sylvester"), (32, "sylvester"), (64, "sylvester")])
@pytest.mark.parametrize("k", [64, 192, 320])
def test_runs_may_reach_beyond_the_inputs(k, group, kind):
    check(w4.INT8, "plain", k, group, kind)
    if k % 64 == 0:
        check(w4.INT4, "plain", k, group, kind)


def check(name, how, k, group, kind):
    mode = w4.MODES[name]
    given = arguments(how, k)
    moved = [one.to(DEVICE) if isinstance(one, torch.Tensor) else one for one in given]
    if moved[5] is not None:
        moved[5] = tuple(one.to(DEVICE) if isinstance(one, torch.Tensor) else one for one in moved[5])
    codes, scales, branch = from_codes.codes_through(name, *moved, group, kind)
    x, more, smooth, down, shift, norm, gate = given
    due = reference.codes(x, more, smooth, down, mode, shift, norm, gate, group, kind)
    plain = reference.codes(x, more, smooth, down, mode, shift, norm, gate)
    torch.testing.assert_close(scales.cpu(), due[1], rtol=1e-4, atol=1e-7)
    if mode == "fp8" and not CUDA:  # the interpreter's e4m3 are not rounded to nearest
        assert (codes.float() - due[0].float()).norm() < 0.09 * due[0].float().norm()
        return
    off = (codes.cpu().float() - due[0].float()).abs()
    step = 1 if mode != "fp8" else 0.13 * due[0].float().abs() + 2**-6
    assert (off <= step).all() and (off > 0).float().mean() < 0.01  # at ties alone
    assert (plain[0].float() != due[0].float()).float().mean() > 0.3
    torch.testing.assert_close(branch.cpu()[:, :12].float(), due[2], rtol=2e-2, atol=2e-2)


def test_what_is_not_finite_has_no_codes():
    x = normal(4, 256, dtype=torch.float16).to(DEVICE)
    x[1, 7], x[2, 200] = float("nan"), float("inf")
    _, scales, _ = from_codes.codes_through(w4.INT8, x, None, None, None, 0.0, None, "", 64, "regular")
    assert scales.isnan().tolist() == [False, True, True, False]


def test_wrong_rotations():
    with pytest.raises(ValueError, match="a regular rotation has groups of 16, 64 or 256, not 32"):
        from_codes.svdq_codes(
            normal(2, 64), None, None, None, "int8", 0.0, None, None, 0.0, "adaptive", "", 32, "regular"
        )
