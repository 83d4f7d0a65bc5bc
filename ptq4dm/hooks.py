"""Hooks on modules for as long as a `with` block, and the input of a call whichever way it was given."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import nn

from .interrupts import uninterrupted

Hooks = Mapping[str, Callable]
AWAITED = "_ptq4dm_awaits"  # the attribute of a network that waits for calls (awaited/wait.py)


def check_settled(*networks: nn.Module) -> None:
    """Raises UserError where a network waits for its first calls: what looks at it now would look at another one."""
    for network in networks:
        if (waiting := vars(getattr(network, "_orig_mod", network)).get(AWAITED)) is not None:
            waiting.refuse()


@contextmanager
def hooked(model: nn.Module, before: Hooks | None = None, after: Hooks | None = None) -> Iterator[None]:
    """Call hooks around the calls of modules, by name ("" is the model itself); at the end all are taken off.

    Calls that other threads make meanwhile are none of the hooks' business, nor are those within `unwatched`.

    before: name -> hook(module, args, kwargs). after: name -> hook(module, args, kwargs, output).
    """
    handles: list[Any] = []
    try:
        with uninterrupted():
            for name, hook in (before or {}).items():
                module, own = model.get_submodule(name), of_this_thread(hook)
                handles.append(module.register_forward_pre_hook(own, with_kwargs=True))
            for name, hook in (after or {}).items():
                module, own = model.get_submodule(name), of_this_thread(hook)
                handles.append(module.register_forward_hook(own, with_kwargs=True))
        yield
    finally:
        with uninterrupted():
            for handle in handles:
                handle.remove()


@contextmanager
def computing(model: nn.Module, forwards: Mapping[str, Callable]) -> Iterator[None]:
    """Modules, by name ("" is the model), compute by other functions; afterwards as before, also by a `forward` of
    accelerate."""
    modules = {name: model.get_submodule(name) for name in forwards}
    own = {name: vars(module).get("forward") for name, module in modules.items()}
    try:
        with uninterrupted():
            for name, module in modules.items():
                module.forward = forwards[name]
        yield
    finally:
        with uninterrupted():
            for name, module in modules.items():
                vars(module).pop("forward", None)
                if own[name] is not None:
                    module.forward = own[name]


@contextmanager
def watched(owner: Any, name: str, before: Callable) -> Iterator[None]:
    """before(args, kwargs) is called ahead of each call of a method that this thread makes; afterwards all is as
    it was."""
    own, method = vars(owner).get(name), getattr(owner, name)
    look = of_this_thread(before)

    def call(*args: Any, **kwargs: Any) -> Any:
        look(args, kwargs)
        return method(*args, **kwargs)

    try:
        with uninterrupted():
            setattr(owner, name, call)
        yield
    finally:
        with uninterrupted():
            vars(owner).pop(name, None)
            if own is not None:
                setattr(owner, name, own)


_ASIDE: set[int] = set()  # threads whose watchers look away


def of_this_thread(call: Callable, otherwise: Callable = lambda *_, **__: None) -> Callable:
    """A function that is `call` in the thread that made it, and `otherwise` in all others and within `unwatched`."""
    owner = threading.get_ident()

    def called(*args: Any, **kwargs: Any) -> Any:
        mine = threading.get_ident() == owner and not is_unwatched()
        return (call if mine else otherwise)(*args, **kwargs)

    return called


def is_unwatched() -> bool:
    """Whether this thread is within `unwatched`."""
    return threading.get_ident() in _ASIDE


@contextmanager
def unwatched() -> Iterator[None]:
    """Nothing that `of_this_thread` made in this thread is called in the block.

    It is for runs of a pipeline that are no generation, such as a look at how it guides: whoever counts, records or
    replaces the calls of a generation would take them for its first steps.
    """
    before, mine = is_unwatched(), threading.get_ident()
    try:
        with uninterrupted():
            _ASIDE.add(mine)
        yield
    finally:
        if not before:
            with uninterrupted():
                _ASIDE.discard(mine)


def input_of(args: tuple, kwargs: Mapping[str, Any]) -> Any:
    """The first argument of a call, by position or by name."""
    return args[0] if args else next(iter(kwargs.values()))


def unhooked(*modules: nn.Module) -> bool:
    """Whether no recorder, offloading or cache of torch, accelerate or diffusers waits for the modules' calls."""
    for module in modules:
        state = module.__dict__  # hasattr of a module without it takes ten times as long
        if (
            state["_forward_hooks"]
            or state["_forward_pre_hooks"]
            or "_hf_hook" in state
            or ("_diffusers_hook" in state and has_diffusers_hook(module))
        ):
            return False
    return True


def has_diffusers_hook(module: nn.Module) -> bool:
    """Whether a hook of diffusers waits for a module's calls: what held some stays when they are taken off."""
    registry = module.__dict__.get("_diffusers_hook")
    return registry is not None and bool(getattr(registry, "hooks", True))
