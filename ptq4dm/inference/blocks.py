"""The repeated blocks of a model compiled by torch.compile: one of each kind takes the time, the rest share its code.

Which they are diffusers says of most models (`_repeated_blocks`, as its `compile_repeated_blocks` does); of others it
is the class that occurs most often among those which diffusers will not split, or else in lists of modules.

torch.compile does not look for hooks that are set later, so a recorder would see nothing. A `CompiledBlock` looks,
and runs its block as it is written while somebody waits for the calls of a module in it, or for operations of torch.
"""

from __future__ import annotations

import operator
from collections import Counter
from itertools import chain
from typing import Any

import torch
from torch import nn
from torch._inductor.cpp_builder import get_cpp_compiler

from .watch import HOOKS, watched


class CompiledBlock:
    """What a block's call goes through: compiled code, or the block as it is while it has hooks."""

    def __init__(self, block: nn.Module, **options: Any) -> None:
        self.block = block
        self.compiled = torch.compile(block._call_impl, **options)
        self._look()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        parts = list(chain.from_iterable(map(dict.values, self.children)))
        if len(parts) != len(self.parts) or not all(map(operator.is_, parts, self.parts)):
            self._look()  # an adapter, say, took a layer's place
        if any(self.hooks) or watched():
            return self.block._call_impl(*args, **kwargs)
        return self.compiled(*args, **kwargs)

    def _look(self) -> None:
        modules = list(self.block.modules())
        self.children = [module._modules for module in modules]
        self.parts = list(chain.from_iterable(map(dict.values, self.children)))
        self.hooks = [vars(module)[kind] for module in modules for kind in HOOKS]

    def __reduce__(self) -> tuple:
        """Copies are as they are written: torch.compile's code is of one block."""
        return getattr, (self.block, "_call_impl")


def repeated_blocks(model: nn.Module) -> list[nn.Module]:
    """The blocks that are worth compiling, in the order of the model's modules; [] where none is repeated."""
    modules = [module for module in model.modules() if module is not model]
    for names in ("_repeated_blocks", "_no_split_modules"):
        named = set(getattr(model, names, None) or ())
        if found := [one for one in modules if type(one).__name__ in named]:
            return _outermost(found)
    listed = [child for module in modules if isinstance(module, nn.ModuleList) for child in module]
    listed = [child for child in listed if not isinstance(child, nn.ModuleList) and len(list(child.modules())) > 3]
    kinds = Counter(map(type, listed))
    return _outermost([child for child in listed if kinds[type(child)] > 1])


def why_not_on_cpu(model: nn.Module) -> str:
    """Why compiling a model's blocks is nothing for a CPU; "" where it was measured to help."""
    if "UNet" in type(model).__name__:
        return "that made a UNet's step no faster on a CPU; compiled=True compiles them"
    try:
        get_cpp_compiler()
    except Exception as error:  # of a class that torch has renamed
        return f"torch.compile finds no C++ compiler ({type(error).__name__})"
    return ""


def _outermost(blocks: list[nn.Module]) -> list[nn.Module]:
    inner = {id(part) for block in blocks for part in block.modules() if part is not block}
    return [block for block in blocks if id(block) not in inner]


def compile_blocks(blocks: list[nn.Module], **options: Any) -> None:
    """Compile these, when they are first called."""
    for block in blocks:
        block._compiled_call_impl = CompiledBlock(block, **options)


def uncompile_blocks(blocks: list[nn.Module]) -> None:
    """Take that back."""
    for block in blocks:
        if isinstance(block._compiled_call_impl, CompiledBlock):
            del block._compiled_call_impl
