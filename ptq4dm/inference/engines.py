"""The slot of engines: libraries of others that a model can run through, as extras that need not be installed."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..checks import shown
from ..errors import UserError
from ..layers.fusing.cpu import dtype_between
from ..layers.fusing.fuse import is_fused
from ..registry import Registry
from .blocks import plain_forward
from .graphs import Graphed

ENGINES: Registry = Registry("engine", late=True)


@dataclass(frozen=True)
class Engine:
    """library: the package that has to be installed, and the name of the extra that does it.

    through: (model, precision or None, folder or None, kept) -> what takes the place of the model's forward. Raises
        UserError for a model that it cannot serve.
    saved: a folder of conversions -> (how many it holds, how many of them are damaged).
    """

    library: str
    through: Callable[[nn.Module, str | None, Path | None, int], Graphed]
    saved: Callable[[Path], tuple[int, int]]


def check(engine: Any, precision: Any, cache: Any, others: Mapping[str, Any]) -> None:
    """Raises UserError for an engine that nobody knows or has, and for options that do not go together.

    others: what `optimize` takes for PyTorch's own forward, and which values it was given.
    """
    if precision is not None:
        dtype_between(precision)
    if engine is None:
        if cache is not None:
            raise UserError("cache is an engine's; give engine='openvino' with it.")
        return
    library = ENGINES.find(engine).library
    if cache is not None and not isinstance(cache, (str, os.PathLike)):
        raise UserError(f"cache is a folder, or None; got {shown(cache)}.")
    if given := [name for name, value in others.items() if value is not None and value is not False]:
        them = (
            "is for PyTorch's own forward; leave it"
            if len(given) == 1
            else "are for PyTorch's own forward; leave them"
        )
        raise UserError(f"optimize: {' and '.join(given)} {them} out with an engine.")
    if importlib.util.find_spec(library) is None:
        raise UserError(f"engine '{engine}' is not installed: pip install 'ptq4dm[{library}]'.")


def check_model(called: str, model: nn.Module) -> None:
    """Raises UserError for a model that no engine can take as it is."""
    devices = {str(one.device) for one in (*model.parameters(), *model.buffers())} - {"cpu"}
    if devices:
        raise UserError(f"{called} is on {min(devices)}, and engines are for a CPU; move it there.")
    layers = [one for one in model.modules() if type(one) in (nn.Linear, nn.Conv2d)]
    halves = {one.weight.dtype for one in layers} & {torch.bfloat16, torch.float16}
    if halves:
        raise UserError(
            f"{called} has weights of {min(map(str, halves))}; load it in float32: engines compute in bfloat16 by "
            "themselves."
        )
    if any(is_fused(one) for one in model.modules()):
        raise UserError(f"{called} is fused, which engines do by themselves; call ptq4dm.unfuse first.")
    if any(one._compiled_call_impl is not None for one in model.modules()):
        raise UserError(f"{called} has compiled blocks; load it anew, or take that back first.")
    if vars(model).get("forward", plain_forward(model)) != plain_forward(model) and not isinstance(
        vars(model)["forward"], Graphed
    ):
        raise UserError(f"the forward of {called} is another's already (a hook of accelerate); load it without.")


def saved_in(folder: Path) -> dict[str, tuple[int, int]]:
    """Engine -> (conversions, damaged ones) in a model's folder, for those that have saved any there."""
    places = {name: folder / name for name in sorted(ENGINES)}
    return {name: ENGINES.find(name).saved(place) for name, place in places.items() if place.is_dir()}


def through(engine: str, model: nn.Module, precision: str | None, cache: Any, kept: int) -> Graphed:
    """What runs the model through the engine. Raises UserError, naming a layer, for one that it cannot serve."""
    return ENGINES.find(engine).through(model, precision, None if cache is None else Path(cache), kept)
