"""A call of a model that is watched: its dataflow."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from ..calibration.calls import Calls
from ..calibration.record import ready
from ..hooks import hooked
from ..pipelines.loading import not_while_loading
from .dataflow import Dataflow


class _Watching(TorchDispatchMode):
    supports_higher_order_operators = True

    def __init__(self, flow: Dataflow) -> None:
        super().__init__()
        self.flow = flow

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        output = func(*args, **(kwargs or {}))
        self.flow.operation(func, args, kwargs or {}, output)
        return output


@torch.no_grad()
def dataflow_of(model: nn.Module, calls: Calls) -> Dataflow:
    """The dataflow of one call of a model, which is in evaluation mode."""
    flow = Dataflow()
    for module in model.modules():
        flow.constants([*module.parameters(recurse=False), *module.buffers(recurse=False)])
        flow.constants(pytree.tree_leaves(vars(module)))

    def enter(module: str) -> Callable:
        return lambda _, args, kwargs: flow.enter(module, (args, kwargs))

    def leave(_: nn.Module, args: tuple, kwargs: dict, output: Any) -> None:
        flow.leave((args, kwargs), output)

    def begin(_: nn.Module, args: tuple, kwargs: dict) -> None:
        flow.constants(pytree.tree_leaves((args, kwargs)))

    names = [module for module, _ in model.named_modules() if module]
    before, after = {name: enter(name) for name in names}, dict.fromkeys(names, leave)
    call = ready(calls, model)
    with not_while_loading(), hooked(model, {"": begin, **before}, after), _Watching(flow):
        answer = model(*call.args, **call.kwargs)
    flow.finish(answer)
    return flow
