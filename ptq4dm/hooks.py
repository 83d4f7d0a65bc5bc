"""Hooks on modules for as long as a `with` block, and the input of a call whichever way it was given."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import nn

Hooks = Mapping[str, Callable]


@contextmanager
def hooked(model: nn.Module, before: Hooks | None = None, after: Hooks | None = None) -> Iterator[None]:
    """Call hooks around the calls of modules, by name ("" is the model itself); at the end all are taken off.

    before: name -> hook(module, args, kwargs). after: name -> hook(module, args, kwargs, output).
    """
    handles = [
        model.get_submodule(name).register_forward_pre_hook(hook, with_kwargs=True)
        for name, hook in (before or {}).items()
    ]
    handles += [
        model.get_submodule(name).register_forward_hook(hook, with_kwargs=True)
        for name, hook in (after or {}).items()
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def input_of(args: tuple, kwargs: Mapping[str, Any]) -> Any:
    """The first argument of a call, by position or by name."""
    return args[0] if args else next(iter(kwargs.values()))
