"""Ops of PyTorch: one node to torch.compile, captured in CUDA graphs, and cheap to call.

`torch.library.custom_op` spends 10 us of a call on its layers in Python, more than many kernels run. Here are two
thin ones: `call`, and the one for autograd, which hands over to the kernel unless a gradient is wanted.

It hands over by `redispatch` below `torch._C._after_autograd_keyset`, which no document promises. Seen so in PyTorch
2.11 and 2.13; tests/kernels/test_pinned.py holds it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor

from .recording import current
from .replay import TENSORS, Replay, on_gpu

PLAIN = {*TENSORS, type(None), bool, int, float, str, list, tuple, torch.dtype}
LIBRARY = torch.library.Library("ptq4dm", "FRAGMENT")


class _NoGradient(torch.autograd.Function):
    """An op's result for inputs that require grad: good for inference, and an error in a backward pass."""

    @staticmethod
    def forward(ctx, op, keyset, *args):
        ctx.op = op
        with torch._C._AutoDispatchBelowAutograd():
            return op.redispatch(keyset, *args)

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
    no formula. `.replay` is what repeats calls on a GPU.
    """
    name = function.__name__
    replay = Replay(function)

    def on_its_device(*args):
        x = args[0]
        if x.is_cuda and x.get_device() != torch._C._cuda_getDevice():
            with torch.cuda.device(x.device):  # of a model spread over GPUs: kernels are launched on the current one
                return replay(*args)
        return replay(*args)

    schema = torch.library.infer_schema(function, mutates_args=())
    LIBRARY.define(name + schema, tags=torch.Tag.pt2_compliant_tag)
    LIBRARY.impl(name, on_its_device, "CompositeExplicitAutograd")
    overload = getattr(torch.ops.ptq4dm, name).default
    below = torch._C._after_autograd_keyset

    def autograd(keyset, *args):
        if torch.is_grad_enabled() and any(isinstance(arg, Tensor) and arg.requires_grad for arg in args):
            return _NoGradient.apply(overload, keyset & below, *args)
        return overload.redispatch(keyset & below, *args)

    LIBRARY.impl(name, autograd, "Autograd", with_keyset=True)

    @functools.wraps(function)
    def call(*args, **kwargs):
        if torch.compiler.is_compiling() or kwargs or observed(args):
            return overload(*args, **kwargs)
        return on_its_device(*args)

    call.register_fake = functools.partial(torch.library.register_fake, overload, lib=LIBRARY)
    call.replay = replay
    return call


def observed(args: tuple) -> bool:
    """Whether somebody looks at what PyTorch dispatches, or may: then a call goes that way, as any op's."""
    if (
        torch._C._len_torch_dispatch_stack()
        or torch._C._len_torch_function_stack()
        or torch._C._functorch.maybe_current_level() is not None
        or torch._C._get_tracing_state() is not None
        or torch._C._autograd._profiler_enabled()
    ):
        return current() is None  # an op within one that is recorded is part of it
    if not on_gpu(args[0]) or not all(map(PLAIN.__contains__, map(type, args))):
        return True
    return torch.is_grad_enabled() and any(type(arg) in TENSORS and arg.requires_grad for arg in args)
