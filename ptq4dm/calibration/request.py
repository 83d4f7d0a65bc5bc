"""What to record of a pipeline, and how to run it while hooks watch its networks and schedulers."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from typing import Any

from torch import nn

from ..errors import UserError
from ..hooks import hooked
from ..pipelines.denoiser import (
    check_pipeline,
    denoiser_names,
    evaluation_mode,
    networks_of,
    schedulers_of,
    turn_at,
)
from ..pipelines.sampling import call_pipeline
from .calls import Call
from .clock import Track, counted


class Done(Exception):
    """Raised inside the sampling loop once every call is on record: the remaining steps need not run."""


@dataclass
class Request:
    """What to record of a pipeline, and how to run it."""

    pipe: Any
    components: list[str]
    options: dict[str, Any]

    @property
    def networks(self) -> dict[str, nn.Module]:
        return {name: getattr(self.pipe, name) for name in self.components}

    def run(self, seeds: Sequence[int], bare: bool = False) -> None:
        call_pipeline(self.pipe, seeds, bare=bare, **self.options)

    @contextmanager
    def watched(self, tracks: dict[str, Track], watcher: Any) -> Iterator[None]:
        """watcher.called(component, module, call) before each call, watcher.stepping(track) before each step."""

        def hook(component: str) -> Any:
            return lambda module, args, kwargs: watcher.called(component, module, Call(args, kwargs))

        with ExitStack() as stack:
            stack.enter_context(turn_at(self.pipe))  # first: no other thread's calls reach the hooks
            for network in self.networks.values():
                stack.enter_context(evaluation_mode(network))
            stack.enter_context(processors_kept(networks_of(self.pipe).values()))
            for name, network in self.networks.items():
                stack.enter_context(hooked(network, {"": hook(name)}))
            stack.enter_context(counted(tracks, watcher.stepping))
            stack.enter_context(suppress(Done))
            yield


@contextmanager
def processors_kept(networks: Iterable[nn.Module]) -> Iterator[None]:
    """Put back attention processors that a pipeline sets for its own sampling (PAG), and would at its end."""
    modules = [module for network in networks for module in network.modules() if hasattr(module, "set_processor")]
    before = [module.processor for module in modules]
    try:
        yield
    finally:
        for module, processor in zip(modules, before, strict=True):
            if module.processor is not processor:
                module.set_processor(processor)


def request_of(
    pipe: Any,
    components: Sequence[str] | None = None,
    *,
    num_inference_steps: int,
    conditioning: dict | None = None,
    pipeline_kwargs: dict | None = None,
) -> Request:
    """A request for the calls of some networks of a pipeline, of all its denoisers by default.

    Raises UserError where the pipeline has no such network, or no scheduler.
    """
    check_pipeline(pipe)
    networks = networks_of(pipe)
    for name in components or ():
        if name not in networks:
            raise UserError(f"{type(pipe).__name__} has no network '{name}'; it has {', '.join(networks)}.")
    if not schedulers_of(pipe):
        raise UserError(f"{type(pipe).__name__} has no scheduler; record its calls with ptq4dm.record(model).")
    options = {
        "num_inference_steps": num_inference_steps,
        "conditioning": conditioning,
        "pipeline_kwargs": pipeline_kwargs,
    }
    return Request(pipe, list(components or denoiser_names(pipe)), options)


def never_called(request: Request, seeds: list[int]) -> UserError:
    return UserError(
        f"{type(request.pipe).__name__}, called like this, calls {', '.join(request.components)} at none of its "
        f"steps (seed {seeds[0]}); name the networks that it does call with component=."
    )
