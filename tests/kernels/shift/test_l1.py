"""L1 normalization in Triton against its formula: codes and what is kept, both results, any split into groups."""

import pytest
import torch

from l1_cases import CASES, EPS, RATIO, check_flat_and_undefined, compare, made
from ptq4dm.kernels.cpu import library
from ptq4dm.kernels.shift import l1, l1_groups, l1_rows


def kernels_of(case):
    return l1_rows if CASES[case][1] == CASES[case][3] == 1 else l1_groups


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize(("dtype", "affine"), [(torch.float32, True), (torch.bfloat16, False)])
def test_kernels_are_the_formula(case, dtype, affine, monkeypatch):
    for kernels in (l1_groups, l1_rows):  # tiles that a case needs several of
        monkeypatch.setattr(kernels, "VALUES", 512)
    compare(kernels_of(case), case, dtype, affine)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_gpu_computes_the_formula(case, dtype, affine):
    compare(kernels_of(case), case, dtype, affine, "cuda")


@pytest.mark.parametrize(("kernels", "number"), [(l1_groups, 2), (l1_rows, 1)])
def test_flat_and_undefined_groups(kernels, number):
    check_flat_and_undefined(kernels, number)


def test_ops_without_kernels_are_the_formula(monkeypatch):
    monkeypatch.setattr(library, "_found", library.Found(None, "none"))
    x, gamma, beta, dy = made("images", torch.float32, True)
    y, codes, stats = l1.shift_l1_norm(x, gamma, beta, 4, EPS, RATIO)
    assert torch.equal(y, l1.normalized(x, gamma, beta, 4, EPS, RATIO)[0])
    noise = l1.noise_of(torch.tensor(7), dy.numel()).view(dy.shape)
    found = l1.shift_l1_gradient(dy, codes, stats, gamma, torch.tensor(7))
    assert all(map(torch.equal, found, l1.gradient(dy, codes, stats, gamma, noise)))


def test_sums_that_may_pass_an_int32_are_refused():
    with pytest.raises(ValueError, match="sums over 70000 x 2 codes of 8 bits may pass an int32"):
        l1.shift_l1_norm(torch.zeros(1, 1, 4).expand(1, 70000, 4), None, None, 2, EPS, RATIO)
