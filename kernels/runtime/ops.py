"""Ops of PyTorch: one node to torch.compile, captured in CUDA graphs, and cheap to call.

`torch.library.custom_op` spends 10 us of a call on its layers in Python, more than many kernels run; and PyTorch's
dispatcher, which asks each layer for a function in Python, half as much. So where nobody looks at what is dispatched
(`observed`), `call` leaves it out. For torch.compile, and whoever looks, there are two ops: ptq4dm::<name>, whose
autograd refuses gradients, and ptq4dm::_<name>, which it hands over to unless one is wanted. The latter has no
autograd at all: it is what a compiled graph calls.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor

from .recording import current
from .replay import Replay, form_of

LIBRARY = torch.library.Library("ptq4dm", "FRAGMENT")


class _NoGradient(torch.autograd.Function):
    """An op's result for inputs that require grad: good for inference, and an error in a backward pass."""

    @staticmethod
    def forward(ctx, op, without, *args):
        ctx.op = op
        with torch._C._AutoDispatchBelowAutograd():
            return without(*args)

    @staticmethod
    def backward(ctx, *gradients):
        raise RuntimeError(
            f"{ctx.op} has no autograd formula: quantized layers have no gradient. Call them under torch.no_grad(), "
            "or train the layers of the original model."
        )


def op(function: Callable) -> Callable:
    """Decorator: `function`, of a tensor and more, as the op ptq4dm::<its name> on all devices.

    It must return new tensors. torch.library reads its schema from the annotations. `.register_fake` takes a function
    of the same arguments that returns empty tensors, as with custom_op. In a backward pass RuntimeError, for there is
    no formula.

    On a GPU calls are repeated from recordings (replay.py; `.replay` says which). So what a function chooses may
    depend on shapes, strides, types and addresses modulo 16 of its tensors, on its other arguments, and on settings
    that `settings.forget` drops; on nothing that changes otherwise, and on no tensor's values.
    """
    name = function.__name__
    replay = Replay(function)

    schema = torch.library.infer_schema(function, mutates_args=())
    for spelled in (name, f"_{name}"):
        LIBRARY.define(spelled + schema, tags=torch.Tag.pt2_compliant_tag)
        LIBRARY.impl(spelled, replay, "CompositeExplicitAutograd")
    overload, without = (getattr(torch.ops.ptq4dm, spelled).default for spelled in (name, f"_{name}"))

    def autograd(*args):
        if torch.is_grad_enabled() and any(isinstance(arg, Tensor) and arg.requires_grad for arg in args):
            return _NoGradient.apply(overload, without, *args)
        return without(*args)

    LIBRARY.impl(name, autograd, "Autograd")
    LIBRARY.impl(f"_{name}", torch.library.fallthrough_kernel, "Autograd")

    @functools.wraps(function)
    def call(*args, **kwargs):
        if torch.compiler.is_compiling() or kwargs:
            return overload(*args, **kwargs)
        form = form_of(args)
        if form is None or observed(args):
            return overload(*args)
        return replay.repeated(form, args)

    def register_fake(fake: Callable) -> None:
        for one in (overload, without):
            torch.library.register_fake(one, fake, lib=LIBRARY)

    call.register_fake = register_fake
    call.replay = replay
    return call


def observed(args: tuple) -> bool:
    """Whether somebody looks at what PyTorch dispatches, or wants a gradient: then a call goes that way, as any
    op's."""
    if (
        torch._C._len_torch_dispatch_stack()
        or torch._C._len_torch_function_stack()
        or torch._C._functorch.maybe_current_level() is not None
        or torch._C._get_tracing_state() is not None
        or torch._C._autograd._profiler_enabled()
    ):
        return current() is None  # an op within one that is recorded is part of it
    return torch.is_grad_enabled() and any(isinstance(arg, Tensor) and arg.requires_grad for arg in args)
