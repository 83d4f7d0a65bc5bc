"""What to record of a pipeline, how to run it while hooks watch it, and what a store's header says of it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from ..errors import UserError
from ..files.claim import digest
from ..files.places import lying_in
from ..hooks import check_settled, hooked
from ..layers.base import holds_quantized
from ..pipelines.denoiser import (
    check_pipeline,
    denoiser_names,
    evaluation_mode,
    networks_of,
    schedulers_of,
    turn_at,
)
from ..pipelines.sampling import call_pipeline
from .calls import Call, parameter_place
from .clock import Track, counted
from .input_statistics import check_size
from .store import fingerprint
from .store_files import TRAINED, VERSION, read_meta


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
    check_settled(*networks.values())
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


# --- the header of a store: what was asked for, so that a store is gone on with by the same arguments only ---------


def asked_of(request: Request, config: Any) -> dict[str, Any]:
    """All that decides what is in a store, as store.json holds it."""
    networks = request.networks
    asked: dict[str, Any] = {
        "version": VERSION,
        "config": asdict(config),
        "dtype": {name: str(parameter_place(network)[1]) for name, network in networks.items()},
        "scheduler": {
            name: {"class": type(one).__name__, **_describe(dict(one.config))}
            for name, one in schedulers_of(request.pipe).items()
        },
        "conditioning": _describe(request.options["conditioning"]),
        "pipeline_kwargs": _describe(request.options["pipeline_kwargs"]),
        "fingerprint": {name: fingerprint(network) for name, network in networks.items()},
    }
    for name, network in networks.items():
        if holds_quantized(network):
            raise UserError(f"'{name}' is quantized already; calibrate it in full precision.")
        if not asked["fingerprint"][name]:
            raise UserError(f"'{name}' has no Linear or Conv2d layers to calibrate.")
        check_size(len(asked["fingerprint"][name]), config.num_bins)
    return asked


def found_in(folder: Path, asked: dict) -> dict | None:
    """The header of the store that is in a folder, finished or not; None where there is none.

    Raises UserError where it is of other arguments.
    """
    if not (folder / "store.json").exists():
        return None
    meta = read_meta(folder)
    different = [name for name, value in asked.items() if meta.get(name) != value]
    if different:
        raise UserError(
            f"{folder} already holds a calibration store that differs in {', '.join(different)}; "
            "give another folder or delete it."
        )
    return meta


def new_header(folder: Path, config: Any, request: Request, asked: dict) -> dict:
    """The header of a new store."""
    if lying_in(folder):
        raise UserError(f"{folder} is not empty and is no calibration store; give another folder.")
    # It is written with the first batch: arguments that cannot be sampled with leave no store behind.
    main = next(iter(schedulers_of(request.pipe).values()))
    return {
        **asked,
        "run": digest(asked),
        "num_train_timesteps": int(main.config.get("num_train_timesteps") or TRAINED),
        "num_batches": -(-config.num_samples // config.batch_size),
        "complete": False,
    }


def _describe(value: Any) -> Any:
    """A JSON form of settings for comparing stores: tensors by shape and sum, other objects by their class."""
    if isinstance(value, dict):
        return {str(k): _describe(v) for k, v in value.items() if not str(k).startswith("_")}
    if isinstance(value, Tensor):
        return ["tensor", list(value.shape), float(value.double().sum())]
    if isinstance(value, (list, tuple, range)):
        return [_describe(v) for v in value]
    return value if value is None or isinstance(value, (bool, int, float, str)) else type(value).__name__
