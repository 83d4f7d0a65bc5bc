"""L1 normalization compiled for this CPU, against its formula; the same bits however it is run."""

import math

import pytest
import torch

from l1_cases import CASES, EPS, RATIO, check_flat_and_undefined, compare, made
from ptq4dm.kernels.cpu import l1


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize(("dtype", "affine"), [(torch.float32, True), (torch.bfloat16, False)])
def test_it_is_the_formula(case, dtype, affine, instructions):
    compare(l1, case, dtype, affine)


@pytest.mark.parametrize("number", [1, 2])
def test_flat_and_undefined_groups(number, compiled):
    check_flat_and_undefined(l1, number)


@pytest.mark.parametrize("case", ["images", "wide tokens"])
def test_bits_do_not_depend_on_threads(case, compiled, monkeypatch):
    x, gamma, beta, dy = made(case, torch.float32, True)
    found, threads = [], torch.get_num_threads()
    try:
        for number in (1, 3):
            torch.set_num_threads(number)
            y, codes, stats = l1.normalize(x, gamma, beta, CASES[case][3], math.sqrt(EPS), RATIO)
            found.append([y, codes, stats, *l1.gradient(dy, codes, stats, gamma, torch.tensor(9))])
    finally:
        torch.set_num_threads(threads)
    assert all(map(torch.equal, *found))
