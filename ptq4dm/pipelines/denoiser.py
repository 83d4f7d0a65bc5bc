"""The network that a pipeline runs at every step: where it is, what it is conditioned on, and turns at using it."""

from __future__ import annotations

import inspect
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from diffusers import DiffusionPipeline
from torch import nn

from ..checks import shown
from ..errors import UserError
from ..hooks import check_settled, has_diffusers_hook
from ..interrupts import uninterrupted
from .turns import turns

MAIN = ("unet", "transformer")
TIMES = ("timestep", "timesteps", "t", "timestep_ratio", "r")  # what networks of diffusers call their time


def components_of(pipe) -> dict[str, Any]:
    """Name -> part of a pipeline: what it has registered, also where its own class takes other arguments, too."""
    parts = {} if isinstance(pipe, type) else getattr(pipe, "__dict__", {})
    registered = getattr(pipe, "config", None) if parts else {}
    if not isinstance(registered, Mapping):
        registered = parts
    return {name: parts[name] for name in registered if str(name)[:1] != "_" and name in parts}


def device_of(pipe) -> torch.device:
    """Where a pipeline computes: of one whose networks are offloaded, where each is brought for its call."""
    try:
        return pipe._execution_device
    except ValueError:  # its class registers other parts than it takes, and diffusers will not list them
        return denoiser(pipe).device


def check_pipeline(pipe: Any, what: str = "pipe") -> None:
    """Raises UserError unless this is a pipeline with networks: no name of one, no class and no model by itself."""
    if isinstance(pipe, (str, os.PathLike)):
        raise UserError(f"{str(pipe)!r} is a name; give the pipeline itself, e.g. from ptq4dm.load_pipeline.")
    if isinstance(pipe, nn.Module):
        raise UserError(f"{what} must be a pipeline, and {type(pipe).__name__} is a model by itself.")
    if not networks_of(pipe):
        raise UserError(
            f"{what} must be a diffusers pipeline, such as ptq4dm.load_pipeline gives; got {shown(pipe)}."
        )


def check_sampled(pipe: Any, what: str = "pipe", use: bool = False) -> None:
    """Raises UserError unless this is a pipeline that can be sampled: its networks hold values, or are offloaded.

    use: whether it is used for its images alone; else none of its networks may wait to be quantized by that.
    """
    check_pipeline(pipe, what)
    if not use:
        check_settled(*networks_of(pipe).values())
    if any(_is_empty(getattr(pipe, name)) for name in denoiser_names(pipe)):
        raise UserError(f"{what} is on device 'meta', which holds shapes and no values; load it with its weights.")


def _is_empty(network: nn.Module) -> bool:
    """Whether a network has shapes and no values, and no hook of accelerate or diffusers that brings them."""
    first = next(network.parameters(), None)
    if first is None or not first.is_meta:
        return False
    return not any(hasattr(part, "_hf_hook") or has_diffusers_hook(part) for part in network.modules())


def denoiser_names(pipe) -> list[str]:
    """The attributes of a pipeline that hold networks which are run at its steps, the main one first.

    "unet" or "transformer"; then all others that are called with a time (transformer_2, prior, decoder, ...), but for
    ControlNets, which steer a denoiser.

    Raises:
        UserError: the pipeline has none.
    """
    networks = networks_of(pipe)
    main = [name for name in MAIN if name in networks][:1]
    timed = [
        name
        for name, part in networks.items()
        if name not in main and is_timed(type(getattr(part, "_orig_mod", part)))
    ]
    if not main + timed:
        raise UserError(f"{type(pipe).__name__} has no network that takes a timestep; ptq4dm needs a denoiser.")
    return main + timed


def denoiser_name(pipe) -> str:
    """The attribute of a pipeline that holds its main denoiser, see `denoiser_names`."""
    for name in MAIN:
        if isinstance(getattr(pipe, name, None), nn.Module):
            return name
    return denoiser_names(pipe)[0]


def denoiser(pipe) -> nn.Module:
    """The pipeline's main denoising network (UserError when it has none)."""
    return getattr(pipe, denoiser_name(pipe))


def denoisers_by_prefix(target: Any, what: str) -> dict[str, nn.Module]:
    """What stands before a layer's name -> denoiser: nothing, but where a pipeline has several; a model by itself.

    Raises UserError for what is neither, and for a network that waits for calls; what: as in `check_pipeline`.
    """
    if isinstance(target, nn.Module):
        check_settled(target)
        return {"": target}
    check_pipeline(target, what)
    names = denoiser_names(target)
    check_settled(*(getattr(target, name) for name in names))
    return {f"{name}." if len(names) > 1 else "": getattr(target, name) for name in names}


def networks_of(pipe) -> dict[str, nn.Module]:
    """Name -> network of a pipeline."""
    return {name: part for name, part in components_of(pipe).items() if isinstance(part, nn.Module)}


def schedulers_of(pipe) -> dict[str, Any]:
    """Component name -> scheduler of a pipeline, the main one first."""
    found = {name: part for name, part in components_of(pipe).items() if hasattr(part, "set_timesteps")}
    return dict(sorted(found.items(), key=lambda item: item[0] != "scheduler"))


def pipelines_in(pipe) -> list[Any]:
    """A pipeline and those that it is made of: a combined one has one for each stage."""
    found = [pipe]
    for one in found:
        parts = [part for part in getattr(one, "__dict__", {}).values() if isinstance(part, DiffusionPipeline)]
        found += [part for part in parts if not any(part is other for other in found)]
    return found


def turn_at(*targets: Any) -> AbstractContextManager[None]:
    """The turn of this thread at pipelines (with all their networks and schedulers) or models; others wait.

    Who takes several turns takes them in one call: then no two threads wait for each other.
    """
    parts = [part for target in targets for one in pipelines_in(target) for part in (one, *_stateful(one))]
    return turns(parts)


def _stateful(pipe: Any) -> list[Any]:
    if isinstance(pipe, nn.Module):
        return []
    return [*networks_of(pipe).values(), *schedulers_of(pipe).values()]


def time_names(names: Sequence[str]) -> list[str]:
    """Which of a network's arguments are times: what most call it, or what ends or begins as such names do."""
    exact = [name for name in TIMES if name in names]
    if exact:
        return exact[:1]
    ends = ("timesteps", "timestep", "_time")
    return [name for name in names if name.endswith(ends) or name.startswith("timestep_")]


def is_timed(kind: Any) -> bool:
    """Whether a class is of networks that are called with a time, as those are that run at a pipeline's steps."""
    return "ControlNet" not in kind.__name__ and bool(time_names(list(inspect.signature(kind.forward).parameters)))


def model_of(target) -> nn.Module:
    """A model as it is, or the denoiser of a pipeline. Raises UserError for what is neither."""
    if isinstance(target, (str, os.PathLike)):
        raise UserError(f"'{target}' is a name; give the pipeline or model itself, e.g. from ptq4dm.load_pipeline.")
    if isinstance(target, nn.Module):
        return target
    check_pipeline(target, "what is given here")
    return denoiser(target)


def class_count(pipe) -> int | None:
    """Number of class labels that the denoiser knows; None when it is not class-conditional."""
    config = getattr(denoiser(pipe), "config", None)
    # DiTTransformer2DModel and UNet2DModel have their own names for it.
    return getattr(config, "num_embeds_ada_norm", None) or getattr(config, "num_class_embeds", None)


def foreign_inputs(pipe) -> list[str]:
    """What the denoiser has to be given, by name, beside an image, a time and the class that it may know."""
    known = {*TIMES, "class_labels"} if class_count(pipe) is not None else {*TIMES}
    parameters = list(inspect.signature(denoiser(pipe).forward).parameters.values())
    needed = {p.name for p in parameters[1:] if p.default is p.empty and p.kind is p.POSITIONAL_OR_KEYWORD}
    return sorted(needed - known)


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Dropout and the like off; afterwards every module is in the mode it was in.

    One thread at a time has a model in it, others wait: hooks on the model's layers then see one thread's calls.
    """
    with turn_at(model):
        training = [module for module in model.modules() if module.training]
        try:
            model.eval()
            yield
        finally:
            with uninterrupted():
                for module in training:
                    module.training = True
