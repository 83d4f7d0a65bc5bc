"""The op of binary-coded layers: the formula, what torch wants of an op, and sizes that do not belong together."""

import pytest
import torch

from ptq4dm.kernels.formats import bcq
from ptq4dm.kernels.lut.layer import bcq_linear
from ptq4dm.kernels.lut.reference import reference, weight_of


def operands(n, k, groups, bits):
    torch.manual_seed(n + k)
    codes = torch.randint(0, 2**bits, (n, k), dtype=torch.int8)
    alphas, offsets = torch.rand(n, groups, bits), torch.randn(n, groups)
    return codes, alphas, offsets, (bcq.pack(codes, bits), bcq.tiled(alphas), bcq.tiled(offsets))


def test_formula_by_hand():
    codes, alphas, offsets, packed = operands(70, 128, 2, 3)
    x = torch.randn(4, 128)
    y = torch.zeros(4, 70, dtype=torch.float64)
    for i in range(3):
        signs = ((codes >> i & 1) * 2 - 1).double()
        for g, part in enumerate((slice(0, 64), slice(64, 128))):
            y += x[:, part].double() @ signs[:, part].T * alphas[:, g, i].double()
    for g, part in enumerate((slice(0, 64), slice(64, 128))):
        y += x[:, part].double().sum(1, keepdim=True) * offsets[:, g].double()
    bias = torch.randn(70)
    right = y + bias
    torch.testing.assert_close(reference(x.double(), *packed, bias, 70), right, rtol=1e-6, atol=1e-5)
    assert (bcq_linear(x, *packed, bias, 70) - right).norm() < 1e-3 * right.norm()
    assert weight_of(*packed, 70, 128).shape == (70, 128)


def test_what_torch_wants_of_an_op():
    _, _, _, packed = operands(70, 64, 1, 2)
    torch.library.opcheck(torch.ops.ptq4dm.bcq_linear.default, (torch.randn(2, 3, 64), *packed, None, 70))
    torch.library.opcheck(torch.ops.ptq4dm.bcq_linear.default, (torch.randn(2, 64), *packed, torch.randn(70), 70))
    assert bcq_linear(torch.randn(0, 3, 64), *packed, None, 70).shape == (0, 3, 70)


@pytest.mark.parametrize(
    "change, text",
    [
        ({"outputs": 60}, "60 outputs of 64 inputs are packed"),
        ({"outputs": 200}, "packed as"),
        ({"words": lambda w: w[:, :1]}, "packed as"),
        ({"alphas": lambda a: torch.cat([a, a, a], 1)}, "3 groups"),
        ({"offsets": lambda o: o[..., :5]}, "offsets of 70 outputs"),
        ({"bias": torch.zeros(69)}, "bias of 70 outputs"),
    ],
)
def test_sizes_that_do_not_belong_together(change, text):
    _, _, _, (words, alphas, offsets) = operands(70, 64, 1, 2)
    given = {"words": words, "alphas": alphas, "offsets": offsets, "bias": None, "outputs": 70}
    for name, how in change.items():
        given[name] = how(given[name]) if callable(how) else how
    with pytest.raises(ValueError, match=text):
        bcq_linear(torch.randn(2, 64), *given.values())
