"""What oneDNN makes of an int8 copy of 4-bit codes is made once, for Linear layers and for convolutions."""

import gc

import pytest
import torch
from torch import nn

from ptq4dm.kernels.cpu import library
from ptq4dm.kernels.runtime import settings
from ptq4dm.kernels.runtime.prepared import CACHE
from ptq4dm.kernels.w8a8 import onednn
from ptq4dm.layers.plan import Int4Plan
from ptq4dm.layers.progressive import ProgressivePlan
from ptq4dm.layers.registry import quantized_copy
from ptq4dm.layers.row_mix import RowMixPlan

PLANS = {"row": Int4Plan(), "progressive": ProgressivePlan(), "rows of two widths": RowMixPlan(wide=[1, 4])}
LAYERS = {
    "linear": (nn.Linear(128, 12), (5, 128)),
    "conv": (nn.Conv2d(128, 12, 3, padding=1), (2, 128, 5, 4)),
    "one pixel": (nn.Conv2d(128, 12, 1), (2, 128, 5, 4)),
}


@pytest.mark.skipif(not torch.cpu._is_vnni_supported(), reason="oneDNN's int8 product needs VNNI")
@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("name", LAYERS)
def test_weights_are_packed_once_and_let_go_with_the_layer(name, plan, monkeypatch):
    monkeypatch.setattr(library, "available", lambda: False)
    settings.forget()
    made, kept = [], onednn.prepared

    def counting(weight, key, build):
        return kept(weight, key, lambda: made.append(key) or build())

    monkeypatch.setattr(onednn, "prepared", counting)
    gc.collect()  # copies of layers that others left are let go now, and not while these are counted
    try:
        module, shape = LAYERS[name]
        layer, x, before = quantized_copy(module, PLANS[plan], "layer"), torch.randn(shape), len(CACHE)
        assert layer.kernel_name() == "onednn-int8 on an int8 copy"
        with torch.no_grad():
            first = layer(x)
            assert all(torch.equal(layer(x), first) for _ in range(3)) and len(made) == 1
            changed = layer.qweight.data.clone().bitwise_xor_(0x11)
            layer.qweight.copy_(changed)
            assert not torch.equal(layer(x), first) and len(made) == 2
        assert len(CACHE) > before
        del layer
        gc.collect()
        assert len(CACHE) == before
    finally:
        settings.forget()
