"""What a fitted schedule was made with, and in what a use of it differs: a table serves other uses, but untried."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

from ..caching.made_for import same_times
from ..checks import check, shown
from ..errors import UserError
from .maths.flow_grids import even_levels

SIZES = ("height", "width", "num_frames")  # the shape of a sample tells what comes of them
UNTRIED = "what it gives here was not looked at"


def arguments_of(pipe: Any, pipeline_kwargs: Mapping[str, Any] | None) -> dict[str, Any]:
    """Numbers, and lists of them, among a pipeline's arguments that are not its defaults, as JSON has them.

    They say how it samples, guidance before all. Sizes are left out.
    """
    defaults = {name: one.default for name, one in inspect.signature(pipe.__call__).parameters.items()}
    numbers = (int, float)
    found = {}
    for name, value in (pipeline_kwargs or {}).items():
        listed = isinstance(value, list | tuple) and all(isinstance(one, numbers) for one in value)
        if name not in SIZES and (listed or isinstance(value, numbers)) and value != defaults.get(name):
            found[name] = [*value] if listed else value
    return found


def other_arguments(origin: Mapping[str, Any] | None, now: Mapping[str, Any]) -> str | None:
    """What to say where a pipeline is called with other arguments (`arguments_of`) than the schedule was fitted with.

    origin: of the schedule. Those that have none were fitted to nobody knows what; one that names no arguments was
    fitted without any.
    """
    if origin is None:
        return None
    before = origin.get("pipeline_kwargs") or {}
    names = [name for name in sorted({**before, **now}) if before.get(name) != now.get(name)]
    if not names:
        return None
    return f"the schedule was fitted {_with(before, names)}, and is used {_with(now, names)}; {UNTRIED}."


def _with(values: Mapping[str, Any], names: Sequence[str]) -> str:
    had = [f"{name} {shown(values[name])}" for name in names if name in values]
    lacked = [name for name in names if name not in values]
    parts = [("with ", had), ("without ", lacked)]
    return " and ".join(word + ", ".join(some) for word, some in parts if some)


def given_of(sigmas: Any, timesteps: Any, mu: float | None) -> dict[str, Any]:
    """What a pipeline gave to set_timesteps beside the number of steps, as a table holds it.

    Raises UserError where these are no lists of numbers, or mu is no number.
    """
    found: dict[str, Any] = {} if mu is None else {"mu": float(check(mu, float, "mu"))}
    for name, some in (("sigmas", sigmas), ("timesteps", timesteps)):
        try:
            found |= {} if some is None else {name: [float(one) for one in some]}
        except (TypeError, ValueError, RuntimeError) as error:
            raise UserError(f"{name} must be a list of numbers.") from error
    return found


def other_times(table: Mapping[str, Any], given: Mapping[str, Any]) -> str | None:
    """What to say where set_timesteps is given (`given_of`) another shift, or other times, than when a table was
    fitted: it reads none of them.

    Even levels, and the table's own, are what a table stands for.
    """
    before = table.get("given") or {}
    if {"mu"} <= before.keys() & given.keys() and not same_times([before["mu"]], [given["mu"]]):
        return (
            f"the schedule was fitted with mu {before['mu']:.4g}, the shift at one size, and mu here is "
            f"{given['mu']:.4g}: its times stay those of that size; {UNTRIED}."
        )
    for name in ("sigmas", "timesteps"):
        own = list(table.get(name) or ())[: len(table["timesteps"])]
        known = [before.get(name, even_levels("linear", len(own)) if name == "sigmas" else own), own]
        if name in given and not any(same_times(one, given[name]) for one in known):
            return f"the schedule has times of its own, and the {name} that were given are not read; {UNTRIED}."
    return None


def other_shape(origin: Mapping[str, Any] | None, shape: Sequence[int]) -> str | None:
    """What to say where one sample has another shape than those of the fit."""
    before = (origin or {}).get("shape")
    if not isinstance(before, list | tuple) or list(before) == list(shape):
        return None
    was, now = ("x".join(map(str, one)) for one in (before, shape))
    return f"the schedule was fitted to samples of shape {was}, and these have {now}; {UNTRIED}."
