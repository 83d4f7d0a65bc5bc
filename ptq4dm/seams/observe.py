"""The seams of layers' inputs, observed while the model runs: who reads a concatenation, and where it is cut."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.weak import WeakTensorKeyDictionary

from ..calibration.calls import Calls
from ..calibration.record import ready
from ..hooks import hooked, input_of
from ..layers.view import LayerView
from ..pipelines.denoiser import evaluation_mode
from ..pipelines.loading import not_while_loading
from .rules import Joint, after

Seams = tuple[int, ...]


class _Watching(TorchDispatchMode):
    """Follows concatenated tensors through operations, as long as they live."""

    supports_higher_order_operators = True

    def __init__(self) -> None:
        super().__init__()
        self.joints = WeakTensorKeyDictionary()

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        output = func(*args, **(kwargs or {}))
        if not self.joints and "cat" not in str(func):
            return output
        for tensor, joint in after(func, args, kwargs or {}, output, self.known):
            self.joints[tensor] = joint
        return output

    def known(self, tensor: Any) -> Joint | None:
        return self.joints.get(tensor) if isinstance(tensor, Tensor) else None


@torch.no_grad()
def observed_seams(model: nn.Module, views: list[LayerView], calls: Calls) -> dict[str, Seams]:
    """Layer name -> the input channels at which another of the concatenated tensors begins; layers without are left
    out, and those whose calls disagree.

    calls: one of each kind that the model is called with; all are made, one after the other. Grouped convolutions
    have no seam: their groups read different channels.
    """
    found: dict[str, set[Seams]] = {}
    modules = {view.name: view.module for view in views if getattr(view.module, "groups", 1) == 1}
    with evaluation_mode(model):
        for place in range(len(calls)):
            watching = _Watching()
            hooks = {name: _noting(found, watching, name) for name in modules}
            call = ready(calls[place : place + 1], model)
            with not_while_loading(), hooked(model, hooks), watching:
                model(*call.args, **call.kwargs)
    return {name: next(iter(found[name])) for name in modules if len(found.get(name, ())) == 1 and any(found[name])}


def one_of_each_kind(calls: Calls) -> Calls:
    """The first unit of each group of calls."""
    groups = calls.places[:, 0].tolist()
    return calls[torch.tensor(sorted({group: groups.index(group) for group in groups}.values()))]


def _noting(found: dict[str, set[Seams]], watching: _Watching, name: str) -> Callable:
    def note(module: nn.Module, args: tuple, kwargs: dict) -> None:
        x = input_of(args, kwargs)
        joint = watching.known(x)
        axis = x.ndim - (1 if isinstance(module, nn.Linear) else 3)
        found.setdefault(name, set()).add(joint.cuts if joint is not None and joint.axis == axis else ())

    return note
