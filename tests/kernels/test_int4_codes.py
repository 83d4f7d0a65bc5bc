"""4-bit weights in front of the 8-bit kernels: the op and its Triton kernel against the formula in numpy."""

import numpy as np
import pytest
import torch

from packed_layers import SHAPES, layer
from ptq4dm.kernels.formats.int4 import pack_int4
from ptq4dm.kernels.w4 import int4_codes as module
from ptq4dm.kernels.w4.int4_codes import int4_codes

kernel = pytest.importorskip("ptq4dm.kernels.w4.int4_codes_triton", reason="needs Triton", exc_type=ImportError)

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
pytestmark = [pytest.mark.gpu] * CUDA


def formula(codes, wscales, wzeros):
    """By numpy in float32: (codes, scales)."""
    n, groups = wscales.shape
    steps = codes.numpy().astype(np.float32).reshape(n, groups, -1)
    steps = steps - (0 if wzeros is None else wzeros.numpy().astype(np.float32)[:, :, None])
    scales = wscales.float().numpy()
    if groups == 1:
        return steps.reshape(n, -1), scales[:, 0]
    largest = np.where((steps != 0).any(-1), scales, np.float32(0)).max(1)
    channel = largest / np.float32(15 if wzeros is None else 8)
    channel[channel == 0] = 1
    ratio = scales / channel[:, None]
    return np.rint(steps * ratio[:, :, None]).reshape(n, -1), channel


def triton_codes(qweight, wscales, wzeros, inputs):
    return kernel.int4_codes(qweight, wscales, wzeros, inputs, module.peak(wzeros))


def to_device(*tensors):
    return [None if t is None else t.to(DEVICE) for t in tensors]


@pytest.mark.parametrize("run", [module.reference, triton_codes], ids=["reference", "triton"])
@pytest.mark.parametrize("zeros", [False, True], ids=["symmetric", "zeros"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_codes_and_scales(run, shape, zeros):
    codes, qweight, wscales, wzeros = layer(*shape, zeros)
    right, channel = formula(codes, wscales, wzeros)
    got, scale = run(*to_device(qweight, wscales, wzeros), shape[1])
    assert (got.dtype, scale.dtype, got.is_contiguous()) == (torch.int8, torch.float32, True)
    assert np.array_equal(got.cpu().numpy(), right) and np.array_equal(scale.cpu().numpy(), channel)
    assert right.any() and np.abs(right).max() <= 120


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_types_of_scales(dtype):
    _, qweight, wscales, wzeros = layer(9, 192, 64, True, dtype)
    operands = to_device(qweight, wscales, wzeros)
    for got, right in zip(triton_codes(*operands, 192), module.reference(*operands, 192), strict=True):
        assert torch.equal(got, right)


def test_halves_go_to_the_even_neighbour():
    """Ratios of a half: the second group has 7.5 steps of the row for each of its own."""
    codes = torch.tensor([[7] * 64 + [1, 3, 5, -1] * 16], dtype=torch.int8)
    wscales = torch.tensor([[15.0, 7.5]])
    for run in (module.reference, triton_codes):
        got, scale = run(*to_device(pack_int4(codes, 64), wscales, None), 128)
        assert got[0, 64:68].tolist() == [8, 22, 38, -8] and got[0, 0] == 105
        assert scale.item() == 1.0


@pytest.mark.parametrize("zeros", [False, True], ids=["symmetric", "zeros"])
def test_the_largest_group_is_exact_and_the_others_within_half_a_step(zeros):
    codes, qweight, wscales, wzeros = layer(64, 512, 32, zeros, seed=1)
    got, scale = (t.cpu() for t in int4_codes(*to_device(qweight, wscales, wzeros), 512))
    steps = codes.view(64, 16, 32).double() - (0 if wzeros is None else wzeros.double()[:, :, None])
    weight = steps * wscales.double()[:, :, None]
    error = (got.view(64, 16, 32) * scale.double()[:, None, None] - weight).abs().amax(-1)
    assert (error <= 0.5001 * scale.double()[:, None]).all()
    used = (steps != 0).any(-1)
    largest = torch.where(used, wscales.double(), 0).argmax(1)
    rows = torch.arange(64)[used.any(1)]
    exact = error[rows, largest[rows]]
    assert (exact <= 1e-6 * weight[rows].abs().amax((1, 2))).all() and error.max() > 0


def test_scales_that_are_no_numbers_are_not_lost():
    _, qweight, wscales, _ = layer(6, 192, 64, False, seed=2)
    wscales[0, 0], wscales[3, 2] = float("nan"), float("inf")
    for run in (module.reference, triton_codes):
        got, scale = (t.cpu() for t in run(*to_device(qweight, wscales, None), 192))
        assert scale.isnan().tolist() == [True, False, False, True, False, False]
        assert not got[[0, 3]].any() and got[[2, 4, 5]].any()


def test_the_op_checks_and_has_a_fake():
    _, qweight, wscales, wzeros = to_device(*layer(5, 192, 64, True))
    torch.library.opcheck(torch.ops.ptq4dm.int4_codes.default, (qweight, wscales, wzeros, 192))
    torch.library.opcheck(torch.ops.ptq4dm.int4_codes.default, (qweight, wscales[:, :1].float(), None, 190))
    for given, says in [
        ((qweight, wscales, wzeros, 128), "packed as"),
        ((qweight, wscales[:4], None, 192), "groups"),
        ((qweight, wscales, wzeros[:, :1], 192), "zero points"),
        ((qweight, wscales[:, :2].contiguous(), None, 192), "32, 64 or 128"),
        ((qweight, wscales[:, :0], None, 192), "32, 64 or 128"),
    ]:
        with pytest.raises(ValueError, match=says):
            int4_codes(*given)
    codes, scale = int4_codes(qweight[:0], wscales[:0], None, 192)
    assert codes.shape == (0, 192) and scale.shape == (0,)
