"""A clock that runs while layers compute, by what they weigh: times in tests are the same on every machine."""

from torch import nn

from ptq4dm.layers.int4 import Int4Conv2d, Int4Linear
from ptq4dm.layers.w8a8 import W8A8Conv2d, W8A8Linear

FLOAT, INT8, INT4, OUTSIDE = 4e-9, 2e-9, 3e-9, 1e-6
"""Seconds for each weight of a layer in a call, and for each group norm."""


class FakeClock:
    """Seconds. `install` makes layers advance it."""

    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now

    def install(self, monkeypatch, int4=INT4):
        kinds = {nn.Linear: FLOAT, nn.Conv2d: FLOAT, W8A8Linear: INT8, W8A8Conv2d: INT8}
        for kind, price in {**kinds, Int4Linear: int4, Int4Conv2d: int4}.items():
            self._patch(monkeypatch, kind, lambda layer, price=price: price * layer.weight.numel())
        self._patch(monkeypatch, nn.GroupNorm, lambda layer: OUTSIDE)
        return self

    def _patch(self, monkeypatch, kind, price):
        forward = kind.forward

        def timed(layer, *args, **kwargs):
            self.now += price(layer)
            return forward(layer, *args, **kwargs)

        monkeypatch.setattr(kind, "forward", timed)
