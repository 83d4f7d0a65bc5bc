"""A model's repeated blocks compiled by torch.compile: one of each kind takes the time, the rest share its code.

Which they are diffusers says of most models (`_repeated_blocks`, as its `compile_repeated_blocks` does); of others it
is the class that occurs most often among those which diffusers will not split, or else in lists of modules. A UNet of
which diffusers names none is compiled as a whole: its convolutions gain most by one layout of memory for all of it.

torch.compile does not look for hooks that are set later, so a recorder would see nothing. A `Compiled` module looks,
and runs as it is written while somebody waits for the calls of a module in it, or for operations of torch, and in
calls that keep or reuse a deep part which begins inside of it (caching/cached_steps.py).
"""

from __future__ import annotations

import operator
import types
from collections import Counter
from collections.abc import Callable
from itertools import chain
from typing import Any

import torch
import torch._dynamo.config as dynamo
from torch import nn
from torch._inductor.cpp_builder import get_cpp_compiler

from ..caching.deep_part import under_way
from ..layers.fusing.cpu import runs_fused_on_cpu
from .watch import HOOKS, watched

RECOMPILED = 8  # times that a block is compiled, such as for other shapes


class Compiled:
    """What a module's calls go through: compiled code, or `call` as it is while the module has hooks.

    again: (function, arguments) that make what a copy of the module has in its place: it is as it was written, for
    torch.compile's code is of one module.
    """

    def __init__(self, module: nn.Module, call: Callable, again: tuple, **options: Any) -> None:
        self.module, self.call, self.again = module, call, again
        self.compiled = torch.compile(call, **options)
        self._look()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        parts = list(chain.from_iterable(map(dict.values, self.children)))
        if len(parts) != len(self.parts) or not all(map(operator.is_, parts, self.parts)):
            self._look()  # an adapter, say, took a layer's place
        if (part := under_way(*self.inside)) is not None:
            part.uncompiled = True
        written = part is not None or any(self.hooks) or watched()
        return (self.call if written else self.compiled)(*args, **kwargs)

    def __reduce__(self) -> tuple:
        return self.again

    def _look(self) -> None:
        modules = list(self.module.modules())
        self.inside = modules[1:]
        self.children = [module._modules for module in modules]
        self.parts = list(chain.from_iterable(map(dict.values, self.children)))
        self.hooks = [vars(module)[kind] for module in modules for kind in HOOKS]


def plain_forward(model: nn.Module) -> types.MethodType:
    """What a network computes by where nobody has put anything in its place."""
    return types.MethodType(type(model).forward, model)


def compiled_whole(model: nn.Module, **options: Any) -> Compiled:
    """A network's forward, compiled when it is first called."""
    return Compiled(model, plain_forward(model), (plain_forward, (model,)), **options)


def as_a_whole(model: nn.Module) -> bool:
    """Whether a network is one to compile as a whole."""
    return "UNet" in type(model).__name__ and not getattr(model, "_repeated_blocks", None)


def repeated_blocks(model: nn.Module) -> list[nn.Module]:
    """The blocks that are worth compiling, in the order of the model's modules; [] where none is repeated."""
    modules = [module for module in model.modules() if module is not model]
    for names in ("_repeated_blocks", "_no_split_modules"):
        named = set(getattr(model, names, None) or ())
        if found := [one for one in modules if type(one).__name__ in named]:
            return _outermost(found)
    lists = [module for module in modules if isinstance(module, nn.ModuleList)]
    listed = [child for one in lists for child in one.children() if not isinstance(child, nn.ModuleList)]
    listed = [child for child in listed if len(list(child.modules())) > 3]
    kinds = Counter(map(type, listed))
    return _outermost([child for child in listed if kinds[type(child)] > 1])


def why_not_on_cpu(model: nn.Module) -> str:
    """Why compiling a model's blocks is nothing for a CPU; "" where it was measured to help."""
    if runs_fused_on_cpu(model):
        return "they, or parts of them, are fused, by kernels that torch.compile cannot see into"
    if "UNet" in type(model).__name__:
        return "that made a UNet's step hardly faster on a CPU; compiled=True compiles it"
    try:
        get_cpp_compiler()
    except Exception as error:  # of a class that torch has renamed
        return f"torch.compile finds no C++ compiler ({type(error).__name__})"
    return ""


def _outermost(blocks: list[nn.Module]) -> list[nn.Module]:
    inner = {id(part) for block in blocks for part in block.modules() if part is not block}
    return [block for block in blocks if id(block) not in inner]


def compile_blocks(blocks: list[nn.Module], **options: Any) -> None:
    """Compile these, when they are first called.

    Blocks of one class are one function to torch.compile, which gives up on a function that it has compiled 8 times.
    Each block may differ in its layers' plans, so each may be compiled as often; the setting is PyTorch's, for all.
    """
    for name in ("recompile_limit", "accumulated_recompile_limit"):
        setattr(dynamo, name, max(getattr(dynamo, name), RECOMPILED * len(blocks)))
    for block in blocks:
        block._compiled_call_impl = Compiled(block, block._call_impl, (getattr, (block, "_call_impl")), **options)


def uncompile_blocks(blocks: list[nn.Module]) -> None:
    """Take that back."""
    for block in blocks:
        if isinstance(block._compiled_call_impl, Compiled):
            del block._compiled_call_impl
