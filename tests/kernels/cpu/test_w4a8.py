"""The kernel that is compiled for this CPU: its sums against whole numbers, its outputs against float64."""

import gc

import pytest
import torch
import torch.nn.functional as F

from ptq4dm.kernels.cpu import library, w4a8
from ptq4dm.kernels.cpu.w4a8 import cpu_w4a8_linear
from ptq4dm.kernels.formats.int4 import pack_int4
from ptq4dm.kernels.runtime.prepared import CACHE

compiled = pytest.mark.usefixtures("compiled")
SHAPES = [(1, 5, 27), (3, 33, 64), (17, 70, 192), (7, 130, 256), (13, 64, 4224), (50, 17, 2112), (1, 3, 4096)]
GROUPS = [None, 32, 64, 128]


def weight(n, k, group, zeros, progressive=False, dtype=torch.float32, extreme=False):
    """(operand w [N, K] in float64, qweight, wscales, wzeros, wsteps)."""
    generator = torch.Generator().manual_seed(n + k)
    groups = 1 if group is None else k // group

    def whole(low, high, *shape):
        drawn = torch.randint(low, high + 1, shape, generator=generator, dtype=torch.int8)
        return torch.where(drawn > (low + high) // 2, high, low).to(torch.int8) if extreme else drawn

    codes, wzeros = whole(-8, 7, n, k), whole(-8, 7, n, groups) if zeros else None
    wsteps = whole(1, 16, n, groups) if progressive else None
    wscales = (torch.rand(n, *(() if progressive else (groups,)), generator=generator) + 0.1).to(dtype)
    steps = codes.double().unflatten(1, (groups, -1))
    steps = steps if wzeros is None else steps - wzeros[:, :, None]
    factors = wsteps * wscales.double()[:, None] if progressive else wscales.double()
    operand = (steps * factors[:, :, None]).flatten(1)
    return operand, pack_int4(F.pad(codes, (0, -k % 64)), 64), wscales, wzeros, wsteps


def rounded(x, scale, zero):
    """What the 8-bit codes of x stand for, float64; scale None: dynamic."""
    if scale is None:
        step = x.abs().amax(1, keepdim=True) / 127
        return (x * (1.0 / step.double()).float()).round().double() * step.double()
    return ((x * (1 / scale)).round() + zero).clamp(-128, 127).sub(zero).double() * scale


def run(x, operands, bias=None, scale=None, zero=0, linear=cpu_w4a8_linear):
    grid = (None, None) if scale is None else (torch.tensor(scale), torch.tensor(zero, dtype=torch.int32))
    return linear(x, *operands, bias, *grid, 8)


@compiled
@pytest.mark.parametrize("progressive", [False, True], ids=["scales", "steps"])
@pytest.mark.parametrize("zeros", [False, True], ids=["symmetric", "zeros"])
@pytest.mark.parametrize("scale, zero", [(None, 0), (0.25, 0), (0.03125, 9), (0.03125, -128)])
def test_outputs_are_those_of_the_formula(scale, zero, zeros, progressive):
    for m, n, k in SHAPES:
        for group in GROUPS:
            if group and k % group:
                continue
            dtype = torch.float32 if group is None else (torch.float16 if k % 256 else torch.bfloat16)
            operand, *operands = weight(n, k, group, zeros, progressive, dtype)
            x, bias = torch.randn(m, k), torch.randn(n)
            right = rounded(x, scale, zero) @ operand.T + bias.double()
            found = run(x, operands, bias, scale, zero)
            bound = rounded(x, scale, zero).abs() @ operand.abs().T + bias.abs().double()
            groups = 1 if group is None else k // group
            assert ((found - right).abs() <= (groups + 2) * 2**-24 * bound).all(), (m, n, k, group)
            assert (run(x, operands, bias, scale, zero, w4a8.reference) - right).abs().max() <= 2e-7 * bound.max()


@compiled
@pytest.mark.parametrize("zeros", [False, True], ids=["symmetric", "zeros"])
@pytest.mark.parametrize("progressive", [False, True], ids=["scales", "steps"])
def test_sums_are_whole_numbers_to_the_last_bit(zeros, progressive, instructions):
    """Inputs whose scale is 1 and weights whose scales are 1: every output is a whole number below 2^24."""
    for m, n, k, group in [(3, 70, 640, 128), (17, 40, 192, 32), (2, 64, 4160, 64), (5, 9, 100, None)]:
        operand, qweight, wscales, wzeros, wsteps = weight(n, k, group, zeros, progressive)
        operand = operand / (wscales.double()[:, None] if progressive else _wide(wscales, k))
        x = torch.randint(-127, 128, (m, k)).float()
        x[:, 0] = 127
        found = run(x, (qweight, torch.ones_like(wscales), wzeros, wsteps))
        right = x.double() @ operand.round().T
        assert right.abs().max() < 2**24 and torch.equal(found.double(), right)


@compiled
@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("code, zero", [(-8, 7), (7, -8), (-8, None), (7, None), (0, None)])
def test_the_largest_and_smallest_codes(code, zero, sign, instructions):
    """Nothing saturates: not in pairs of products, not in 16 bits, not in a group of a whole row."""
    n, m = 20, 4
    for k, group in [(128, 128), (256, 64), (256, 32), (12288, None)]:
        groups = 1 if group is None else k // group
        qweight = pack_int4(torch.full((n, k), code, dtype=torch.int8), 64)
        wzeros = None if zero is None else torch.full((n, groups), zero, dtype=torch.int8)
        step = code - (zero or 0)
        x = torch.full((m, k), 127.0 * sign)
        assert (run(x, (qweight, torch.ones(n, groups), wzeros, None)) == 127 * sign * k * step).all()
        x = torch.full((m, k), 200.0 * sign)  # beyond the grid, whose zero point is at its other end
        level = 127 - -128 if sign > 0 else -128 - 127
        found = run(x, (qweight, torch.ones(n, groups), wzeros, None), None, 0.5, -128 if sign > 0 else 127)
        assert (found.double() == torch.tensor(0.5 * level * k * step, dtype=torch.float64)).all()
        steps = torch.full((n, groups), 8, dtype=torch.int8)
        x = torch.full((m, k), 127.0 * sign)
        found = run(x, (qweight, torch.ones(n), wzeros, steps))
        assert (found.double() == float(torch.tensor(127.0 * 8 * sign * k * step))).all()


@compiled
def test_bits_depend_on_neither_threads_nor_rows_nor_instructions(monkeypatch):
    before, kernels = torch.get_num_threads(), [library.found()]
    monkeypatch.setattr(library, "_found", kernels[0])
    library.use("avx2")
    kernels.append(library.found())
    assert kernels[0].text != kernels[1].text or library.capability() == "avx2"
    try:
        for group, progressive, m, n in [(None, False, 100, 70), (64, False, 57, 200), (128, True, 13, 48)]:
            _, *operands = weight(n, 2304, group, True, progressive)
            x, bias, found = torch.randn(m, 2304), torch.randn(n), []
            for kernel in kernels:
                monkeypatch.setattr(library, "_found", kernel)
                for threads in (1, 2, 5):
                    torch.set_num_threads(threads)
                    found.append(run(x, operands, bias))
                    found.append(torch.cat([run(part, operands, bias) for part in x.split([1, 6, m - 7])]))
            assert all(torch.equal(one, found[0]) for one in found)
    finally:
        torch.set_num_threads(before)


@compiled
def test_rows_without_codes_are_nan_and_no_others():
    _, *operands = weight(40, 256, 64, True)
    x = torch.randn(5, 256)
    right = run(x, operands)
    x[1, 7], x[3, 200] = float("nan"), -float("inf")
    found = run(x, operands)
    assert found[[1, 3]].isnan().all() and torch.equal(found[[0, 2, 4]], right[[0, 2, 4]])
    static = run(x, operands, None, 0.05, 3)
    assert static.isfinite().all() and torch.equal(static, run(x.nan_to_num(0, 0, -1e30), operands, None, 0.05, 3))
    zero = torch.zeros(2, 256)
    assert torch.equal(run(zero, operands, torch.ones(40)), torch.ones(2, 40))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_shapes_dtypes_and_strides(dtype):
    _, qweight, wscales, wzeros, _ = weight(24, 192, 64, True)
    x = torch.randn(2, 192, 3).to(dtype).transpose(1, 2)
    found = cpu_w4a8_linear(x, qweight, wscales, wzeros, None, None, None, None, 8)
    rows = x.float().reshape(-1, 192).contiguous()
    right = cpu_w4a8_linear(rows, qweight, wscales, wzeros, None, None, None, None, 8)
    assert found.dtype == dtype and torch.equal(found, right.view(2, 3, 24).to(dtype))
    spread = torch.empty(24, 192, dtype=torch.uint8)[:, ::2].copy_(qweight), wscales.T.contiguous().T
    assert torch.equal(right, cpu_w4a8_linear(rows, *spread, wzeros, None, None, None, None, 8))
    assert cpu_w4a8_linear(x[:0], qweight, wscales, wzeros, None, None, None, None, 8).shape == (0, 3, 24)


@pytest.mark.parametrize("bits", [4, 6])
def test_narrower_inputs(bits):
    operand, *operands = weight(24, 192, 64, True)
    x, limit = torch.randn(5, 192), 2 ** (bits - 1) - 1
    step = x.abs().amax(1, keepdim=True) / limit
    right = ((x / step).round() * step).double() @ operand.T
    found = cpu_w4a8_linear(x, *operands, None, None, None, bits)
    assert (found - right).norm() < 1e-3 * right.norm()


def test_the_compiler_sees_one_op_and_gradients_are_refused():
    _, *operands = weight(24, 192, 64, True)
    x = torch.randn(3, 192)
    found = torch.compile(lambda x: run(x * 2, operands) + 1, fullgraph=True, backend="aot_eager")(x)
    assert torch.equal(found, run(x * 2, operands) + 1)
    torch.library.opcheck(torch.ops.ptq4dm.cpu_w4a8_linear.default, (x, *operands, None, None, None, 8))
    y = run(x.requires_grad_(), operands)
    with pytest.raises(RuntimeError, match="no autograd formula"):
        y.sum().backward()


@compiled
def test_no_wider_copy_of_a_weight_stays():
    """After a call no tensor has the size of the unpacked weight, and nothing is kept beside the weight."""
    n, k = 301, 1216
    operands = weight(n, k, 64, True)[1:]
    run(torch.randn(4, k), operands)
    gc.collect()
    tensors = [one for one in gc.get_objects() if issubclass(type(one), torch.Tensor)]
    held = [one for one in tensors if one.numel() == n * k]
    assert len(tensors) >= 3 and not held and not any(id(one) in CACHE for one in operands if one is not None)


@pytest.mark.parametrize(
    "change, says",
    [
        ({"qweight": (24, 64)}, "192 inputs are packed as"),
        ({"wscales": (24, 4)}, "groups of 32, 64 or 128"),
        ({"wscales": (23, 3)}, "scales of 24 outputs in 3 groups"),
        ({"wzeros": (24, 1)}, "zero points of 24 outputs"),
        ({"wsteps": (24, 2), "wscales": (24,)}, "192 inputs have 1 group"),
        ({"wsteps": (24, 3)}, "scales of 24 outputs"),
        ({"bias": (3,)}, "bias of 24 outputs"),
    ],
)
def test_sizes_that_do_not_belong_together(change, says):
    shapes = {"qweight": (24, 96), "wscales": (24, 3), "wzeros": None, "wsteps": None, "bias": None} | change
    dtypes = {"qweight": torch.uint8, "wzeros": torch.int8, "wsteps": torch.int8}
    given = {
        name: None if shape is None else torch.ones(shape, dtype=dtypes.get(name)) for name, shape in shapes.items()
    }
    with pytest.raises(ValueError, match="32768 inputs; got 32832"):
        w4a8.check(torch.Size((1, 16416)), torch.Size((1, 1)), 32832, None, None, None)
    with pytest.raises(ValueError, match=says):
        cpu_w4a8_linear(torch.randn(2, 192), *given.values(), None, None, 8)


def _wide(wscales, k):
    return wscales.double().repeat_interleave(k // wscales.shape[1], 1)
