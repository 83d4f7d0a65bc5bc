"""Which layers of a trained model lose most by codes of few bits: they are given eight."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from ..base import replace_module
from ..view import find_layers
from .convert import on_integers
from .layers import trainable
from .widths import Widths

REST = 1 / 3  # of the summed error, which the layers that keep their bits may have
MOST = 0.1  # of the layers may have eight


@torch.no_grad()
def most_sensitive(model: nn.Module, call: Callable[[], Tensor], widths: Widths) -> list[str]:
    """Names of inner layers, the worst first, until those that are left have a third of all squared error, or a tenth
    of the layers is taken.

    Each is tried by itself: call() gives the model's output on a batch, with that one layer on codes. In the embedded
    DiT one layer of 75 has half of the error: its input has channels that are far out. (Our assumption: the paper
    keeps the first and the last layer in more bits.)
    """
    exact, errors = call(), {}
    for view in find_layers(model):
        if view.role == "inner" and trainable(view.module):
            try:
                replace_module(model, view.name, on_integers(view.module, widths))
                errors[view.name] = (call() - exact).double().square().sum().item()
            finally:
                replace_module(model, view.name, view.module)
    rest, chosen = sum(errors.values()), list[str]()
    aim = REST * rest
    for name in sorted(errors, key=lambda name: -errors[name]):
        if rest <= aim or len(chosen) >= MOST * len(errors):
            break
        chosen.append(name)
        rest -= errors[name]
    return chosen
