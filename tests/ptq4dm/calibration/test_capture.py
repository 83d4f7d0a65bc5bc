"""Inputs of layers as rows: what a layer multiplies its flattened weight by."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from ptq4dm.calibration.capture import as_rows, input_peaks, row_count

CONVS = {
    "3x3": {"kernel_size": 3, "padding": 1},
    "1x1": {"kernel_size": 1},
    "1x1-strided": {"kernel_size": 1, "stride": 2},
    "strided": {"kernel_size": 3, "stride": 2, "padding": 1},
    "tall": {"kernel_size": (3, 2), "padding": (0, 1), "stride": (1, 2)},
    "dilated": {"kernel_size": 3, "dilation": 2, "padding": 2},
    "same": {"kernel_size": 3, "padding": "same"},
    "valid": {"kernel_size": 3, "padding": "valid"},
}


@pytest.mark.parametrize("options", CONVS.values(), ids=CONVS)
def test_rows_times_the_flattened_weight_are_the_convolution(options):
    torch.manual_seed(0)
    conv, x = nn.Conv2d(5, 7, **options, bias=False).double(), torch.randn(3, 5, 9, 8, dtype=torch.float64)
    expected = conv(x)
    rows = as_rows(conv, x)
    assert len(rows) == row_count(conv, x) == expected[:, 0].numel()
    found = (rows @ conv.weight.flatten(1).T).view(3, *expected.shape[2:], 7).permute(0, 3, 1, 2)
    torch.testing.assert_close(found, expected)
    picked = torch.randperm(len(rows))[:11]
    assert torch.equal(as_rows(conv, x, picked), rows[picked])
    assert (input_peaks(conv, x) >= rows.abs().amax(0)).all() and input_peaks(conv, x).max() == x.abs().max()


def test_rows_of_a_grouped_convolution_lie_group_by_group():
    torch.manual_seed(0)
    conv, x = nn.Conv2d(6, 4, 3, padding=1, groups=2, bias=False).double(), torch.randn(2, 6, 5, 5).double()
    rows, weight = as_rows(conv, x), conv.weight.flatten(1)
    parts = [rows[:, 27 * g : 27 * g + 27] @ weight[2 * g : 2 * g + 2].T for g in range(2)]
    torch.testing.assert_close(torch.cat(parts, 1).view(2, 5, 5, 4).permute(0, 3, 1, 2), conv(x))


def test_rows_of_a_linear_layer_are_its_tokens():
    layer, x = nn.Linear(4, 3), torch.randn(2, 5, 4)
    assert torch.equal(as_rows(layer, x), x.flatten(0, 1)) and row_count(layer, x) == 10
    assert torch.equal(input_peaks(layer, x), x.abs().amax((0, 1)))
    assert torch.equal(as_rows(layer, x, torch.tensor([3, 0])), x.flatten(0, 1)[[3, 0]])


def test_rows_are_those_of_unfold_in_its_order():
    conv, x = nn.Conv2d(4, 2, 3, padding=1), torch.randn(2, 4, 6, 7)
    assert torch.equal(as_rows(conv, x), F.unfold(x, 3, padding=1).transpose(1, 2).flatten(0, 1))
