"""Record what a module is called with, whole calls as they are made, and make them again.

A calibration tuple is only worth something if it is (x_t, the t the model was called with): so it is taken from the
arguments of the model's own `forward`, never rebuilt from a step counter.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from ..errors import UserError
from ..hooks import computing, hooked, watched
from ..pipelines.denoiser import denoiser_names, model_of, time_names
from ..pipelines.loading import not_while_loading
from .calls import Call, Calls, parameter_place, timestep_of, whole_call
from .store import source_of


@contextmanager
def record(target: Any) -> Iterator[Calls]:
    """Record all calls of a module, or of a pipeline's denoiser, for as long as the `with` block runs.

        with ptq4dm.record(model) as calls:
            my_own_loop(model)
        ptq4dm.quantize(model, ptq4dm.PTQ4DMConfig(), calls)

    Any module will do: a bare model, a ControlNet, a prior, a second transformer, a text encoder. Of an autoencoder
    (`pipe.vae`) it is the calls of `decode` that are recorded, which pipelines make. Each call is a unit; its tensors
    are kept on the CPU. Calls that other threads make are not recorded. A call's `time` is its timestep as it is
    where all lie in [0, 1], else as a share of the next power of ten (1000 for times up to 1000), or between the
    least and the largest where some are negative. A call that is given NaN is a UserError.
    """
    model = model_of(target)
    if model is not target and len(several := denoiser_names(target)) > 1:
        raise UserError(f"{type(target).__name__} has several denoisers, {', '.join(several)}; record one of them.")
    parameter = next(model.parameters(), None)
    calls = Calls(None if parameter is None else parameter_place(model)[1], source_of(model))

    def keep(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        add_call(calls, module, kept(Call(args, kwargs)))

    def keep_latents(args: tuple, kwargs: dict[str, Any]) -> None:
        call = kept(Call(args, {name: value for name, value in kwargs.items() if name != "generator"}))
        _check_numbers((call.args, call.kwargs), f"the autoencoder {type(model).__name__} was given NaN")
        calls.add(*whole_call(call, 0.0, 0.0))
        calls.time = torch.zeros_like(calls.timestep)

    with watched(model, "decode", keep_latents) if decodes(model) else hooked(model, {"": keep}):
        yield calls


def add_call(calls: Calls, module: nn.Module, call: Call) -> None:
    """Add a call of a module as one unit. Raises UserError where it was given NaN, by the argument's name."""
    for name, value in named(module, call).items():
        _check_numbers(value, f"the call of {type(module).__name__} was given NaN in '{name}'")
    calls.add(*whole_call(call, timestep_of(named(module, call)) or 0.0, 0.0))
    calls.time = _shares(calls.timestep)


def _check_numbers(value: Any, what: str) -> None:
    if any(bool(one.isnan().any()) for one in tensors_of(value) if one.is_floating_point()):
        raise UserError(f"{what}, of which nothing can be learnt; give it numbers.")


def decoding(model: nn.Module) -> AbstractContextManager[None]:
    """In the block a call of an autoencoder decodes, so that what was recorded of it can be made again; other modules
    are as they are."""
    return computing(model, {"": cast(Any, model).decode}) if decodes(model) else nullcontext()


def decodes(model: nn.Module) -> bool:
    """Whether a module is an autoencoder: what pipelines call of it is `decode`."""
    return callable(getattr(model, "decode", None)) and callable(getattr(model, "encode", None))


@torch.no_grad()
def answers(model: nn.Module, calls: Calls) -> list[Any]:
    """Make recorded calls again: what the model gives, call by call; to the bit what it gave, if it is unchanged.

    Rows that were recorded from batches are put into one call for each group. Tensors move to the model's device;
    those of the dtype that the recorded model had (but for times) are cast to this model's dtype.
    """
    with not_while_loading():
        calls_made = (ready(part, model) for part in calls.batches(len(calls) or 1))
        return [model(*call.args, **call.kwargs) for call in calls_made]


def replay(model: nn.Module, calls: Calls) -> Tensor:
    """What a denoiser gives on recorded calls: its samples [B, ...], those of all calls along the first axis, in the
    order of the units.

    The first thing in an answer counts, a list of samples is stacked, and channels past those of the input (a learned
    variance) are cut off. `answers` gives everything, also of calls whose samples have several shapes.
    """
    order = {tuple(place): i for i, place in enumerate(calls.places.tolist())}
    found: dict[int, Tensor] = {}
    for part in calls.batches(max(1, len(calls))):
        places = [order[tuple(place)] for place in part.places.tolist()]
        samples = samples_of(answers(model, part)[0], part)
        found |= dict(zip(places, samples.split(1) if len(places) > 1 else [samples], strict=True))
    return torch.cat([found[place] for place in sorted(found)])


def samples_of(answer: Any, call: Calls) -> Tensor:
    """The samples [B, ...] in what a denoiser answered to one call; see `replay`."""
    first = answer
    while not isinstance(first, Tensor):
        first = next(iter(first.values())) if isinstance(first, dict) else first[0]
        if isinstance(first, list):
            first = (
                torch.stack(first)
                if len({one.shape for one in first}) == 1
                else torch.cat([one.flatten() for one in first])[None]
            )
    return _without_variance(first, call)


def ready(calls: Calls, model: nn.Module) -> Call:
    """The one call of some units, on a model's device and in its dtype."""
    call = calls.call()
    if next(model.parameters(), None) is None:
        return call
    dtype = parameter_place(model)[1]
    if calls.dtype in (None, dtype):
        return call_on(model, call)
    leaves, structure = call.flat()
    times = times_of(model, call)
    for i, leaf in enumerate(leaves):
        if isinstance(leaf, Tensor) and leaf.dtype == calls.dtype and i not in times:
            leaves[i] = leaf.to(dtype)
    return call_on(model, Call.nested(leaves, structure))


def call_on(model: nn.Module, call: Call) -> Call:
    """A call with its tensors on a model's device."""
    device = parameter_place(model)[0]
    return call.map(lambda tensor: tensor.to(device))


def named(model: nn.Module, call: Call) -> dict[str, Any]:
    """A call's arguments by their names. Raises UserError where they are not what the model takes."""
    try:
        bound = dict(inspect.signature(model.forward).bind(*call.args, **call.kwargs).arguments)
    except TypeError as error:
        raise UserError(f"{type(model).__name__} cannot be called so: {error}.") from None
    for name, parameter in inspect.signature(model.forward).parameters.items():
        if parameter.kind is parameter.VAR_KEYWORD:
            bound |= bound.pop(name, {})
    return bound


def kept(call: Call) -> Call:
    """A copy of a call on the CPU, that nothing else changes."""
    return call.map(lambda tensor: tensor.detach().to("cpu", copy=True))


def times_of(model: nn.Module, call: Call) -> list[int]:
    """The leaves of a call that are times: their numbers in `Call.flat`."""
    names = list(inspect.signature(model.forward).parameters)
    arguments = [*zip(names, call.args, strict=False), *call.kwargs.items()]
    owners = [name for name, value in arguments for _ in pytree.tree_leaves(value)]
    times = time_names(list(dict.fromkeys(owners)))
    leaves, _ = call.flat()
    return [i for i, name in enumerate(owners) if name in times and leaves[i] is not None]


def tensors_of(answer: Any) -> list[Tensor]:
    """The tensors in what a model gave, in order."""
    values = tuple(answer.values()) if isinstance(answer, dict) else answer
    return [leaf for leaf in pytree.tree_leaves(values) if isinstance(leaf, Tensor)]


def _without_variance(answer: Tensor, part: Calls) -> Tensor:
    """An answer [n, 2C, h, w] to an input [n, C, h, w] without the second half of its channels."""
    call = part.call()
    first = next((leaf for leaf in pytree.tree_leaves((call.args, call.kwargs)) if isinstance(leaf, Tensor)), None)
    if first is not None and answer.ndim == first.ndim == 4 and answer.shape[1] == 2 * first.shape[1]:
        return answer[:, : first.shape[1]]
    return answer


def _shares(timestep: Tensor) -> Tensor:
    """Times in [0, 1] from numbers of an unknown range."""
    low, high = float(timestep.min()), float(timestep.max())
    if low < 0:
        return (timestep - low) / max(high - low, 1e-9)
    top = 1.0
    while top < high:
        top *= 10
    return timestep / top
