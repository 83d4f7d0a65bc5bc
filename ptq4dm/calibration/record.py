"""Record what a denoiser is called with while its own pipeline samples, and call a denoiser with it again.

A calibration tuple is only worth something if it is (x_t, the t the model was called with): so the tuples are
taken from the arguments of the model's own `forward`, never rebuilt from a step counter.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..errors import UserError
from ..hooks import hooked
from ..pipelines.denoiser import denoiser, evaluation_mode
from ..pipelines.sampling import own_step, sample

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline, SchedulerMixin

TIMESTEPS = ("timestep", "timesteps", "t")  # what diffusers' models call the argument


@dataclass
class Calls:
    """B recorded rows of denoiser calls.

    sample: [B, ...] noisy input x_t, as the model saw it (scheduler scaling included).
    timestep: [B] the model's own timestep argument (integers or floats).
    conditioning: name -> [B, ...] tensors that differ per row ("a/b" is entry b of the dict argument a, and "a/0" the
        first tensor of the tuple or list a).
    shared: name -> tensors or plain values that the rows have in common (position ids, None, flags).
    """

    sample: Tensor
    timestep: Tensor
    conditioning: dict[str, Tensor] = field(default_factory=dict)
    shared: dict[str, Any] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.sample)

    @property
    def plain(self) -> dict[str, Any]:
        """The shared arguments that are no tensors: what JSON can hold."""
        return {k: v for k, v in self.shared.items() if not isinstance(v, Tensor)}

    def __getitem__(self, rows: slice | Tensor) -> Calls:
        """Rows of it, by slice or index tensor."""
        picked = {k: v[rows] for k, v in self.conditioning.items()}
        return Calls(self.sample[rows], self.timestep[rows], picked, self.shared)

    @staticmethod
    def concatenate(parts: Sequence[Calls]) -> Calls:
        """The rows of several recordings of one model; UserError where they cannot share a batch."""
        first = parts[0]
        for part in parts[1:]:
            if different := _differing(first, part):
                raise UserError(
                    f"the model is called with '{min(different)}' of different shapes or values, which cannot be put "
                    "into one batch; give conditioning of one length."
                )
        return Calls(
            torch.cat([p.sample for p in parts]),
            torch.cat([p.timestep for p in parts]),
            {k: torch.cat([p.conditioning[k] for p in parts]) for k in first.conditioning},
            first.shared,
        )


def _differing(one: Calls, other: Calls) -> set[str]:
    """The arguments that keep two recordings from being one batch."""

    def shapes(calls: Calls) -> dict:
        return {k: v.shape[1:] for k, v in {"sample": calls.sample, **calls.conditioning}.items()}

    def same(a: object, b: object) -> bool:
        return type(a) is type(b) and (torch.equal(a, b) if isinstance(a, Tensor) else a == b)

    ours, theirs = shapes(one), shapes(other)
    common = one.shared.keys() & other.shared.keys()
    different = {k for k in ours if theirs.get(k) != ours[k]}
    return different | {k for k in common if not same(one.shared[k], other.shared[k])}


class _AllRecorded(Exception):
    """Raised inside the sampling loop once every row is on record: the remaining steps need not run."""


class _Recorder:
    """The calls of one run of a sampler: for row k of the batch the one at the grid time nearest timesteps[k].

    It is told of each call of the model and of each step of the scheduler, and counts the steps.
    """

    def __init__(self, model: nn.Module, scheduler: SchedulerMixin, timesteps: Sequence[float]) -> None:
        self.signature = inspect.signature(model.forward)
        self.scheduler = scheduler
        self.timesteps = torch.as_tensor(list(timesteps), dtype=torch.float64)
        self.index: Tensor | None = None  # [B] the step that each row is recorded at; known with the first call
        self.step = 0
        self.parts: list[Calls] = []

    def before_forward(self, _: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        if self.index is None:
            grid = self.scheduler.timesteps.to("cpu", torch.float64)
            self.index = (self.timesteps[:, None] - grid[None, :]).abs().argmin(dim=1)
        if self.complete:
            raise _AllRecorded
        rows = (self.index == self.step).nonzero().flatten()
        if len(rows):
            self.parts.append(_rows(self.signature, args, kwargs, rows, len(self.timesteps)))

    def counted(self, step: Callable) -> Callable:
        @functools.wraps(step)  # pipelines inspect the signature of step
        def counted_step(*args: Any, **kwargs: Any) -> Any:
            self.step += 1
            return step(*args, **kwargs)

        return counted_step

    @property
    def complete(self) -> bool:
        return self.index is not None and self.step > int(self.index.max())


def record_calls(
    pipe: DiffusionPipeline,
    seeds: Sequence[int],
    timesteps: Sequence[float],
    *,
    num_inference_steps: int,
    conditioning: dict | None = None,
    pipeline_kwargs: dict | None = None,
) -> Calls:
    """Sample from the pipeline once and record, for seeds[k], the call at the grid time nearest timesteps[k].

    timesteps are in the units of `pipe.scheduler.timesteps` (0..num_train_timesteps-1). A pipeline that runs
    classifier-free guidance as one call of 2B rows (or as two calls of B) gives every such row a record of its
    own, so the result holds a multiple of len(seeds) rows. Tensors are returned on the CPU.
    """
    model = denoiser(pipe)
    if len(timesteps) != len(seeds):
        raise UserError(f"one timestep for each seed is needed; got {len(timesteps)} for {len(seeds)} seeds.")
    recorder = _Recorder(model, pipe.scheduler, timesteps)
    # The model first: no other thread's calls reach the hook, and the scheduler's step is its own.
    with evaluation_mode(model), hooked(model, {"": recorder.before_forward}), suppress(_AllRecorded):  # noqa: SIM117
        with own_step(pipe.scheduler, recorder.counted(pipe.scheduler.step)):
            sample(
                pipe,
                seeds,
                num_inference_steps=num_inference_steps,
                conditioning=conditioning,
                pipeline_kwargs=pipeline_kwargs,
            )
    if not recorder.complete:
        raise UserError(
            f"{type(pipe).__name__} took {recorder.step} steps of its scheduler, fewer than its sampling grid has; "
            "its calls cannot be recorded."
        )
    return Calls.concatenate(recorder.parts)


@torch.no_grad()
def replay(model: nn.Module, calls: Calls) -> Tensor:
    """Call a denoiser with recorded arguments. Returns its noise prediction, shaped like calls.sample.

    Channels past the sample's own (a learned variance) are cut off. Floating arguments are cast to the model's
    dtype and moved to its device.
    """
    calls = moved(calls, model)
    first, timestep = _leading(inspect.signature(model.forward))
    arguments: dict[str, Any] = {first: calls.sample, timestep: calls.timestep}
    arguments |= _nested({**calls.shared, **calls.conditioning})
    arguments.pop("return_dict", None)
    output = model(**arguments, return_dict=False)[0]
    return output[:, : calls.sample.shape[1]] if output.ndim == 4 else output


def moved(calls: Calls, model: nn.Module) -> Calls:
    """Calls on a model's device, floating arguments but the timestep in its dtype."""
    parameter = next(model.parameters())
    dtype = getattr(model, "dtype", parameter.dtype)

    def ready(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        return value.to(parameter.device, dtype if value.is_floating_point() else None)

    return Calls(
        ready(calls.sample),
        calls.timestep.to(parameter.device),
        {name: ready(value) for name, value in calls.conditioning.items()},
        {name: ready(value) for name, value in calls.shared.items()},
    )


def _leading(signature: inspect.Signature) -> tuple[str, str]:
    """The names of a model's sample and timestep arguments."""
    names = list(signature.parameters)
    timestep = next((name for name in TIMESTEPS if name in names), None)
    if timestep is None:
        raise UserError(f"the model takes no timestep ({', '.join(names)}); its calls cannot be recorded.")
    return names[0], timestep


def _rows(signature: inspect.Signature, args: tuple, kwargs: dict[str, Any], rows: Tensor, batch: int) -> Calls:
    """The given items of one call (args, kwargs), guidance copies included."""
    bound = signature.bind(*args, **kwargs).arguments
    extra = bound.pop("kwargs", {})
    bound = {**bound, **extra}
    first, timestep = _leading(signature)
    x, t = bound.pop(first), torch.as_tensor(bound.pop(timestep))
    if not isinstance(x, Tensor):
        raise UserError(f"the model is called with a {type(x).__name__} of samples; only tensors can be recorded.")
    size = len(x)
    if size % batch:
        raise UserError(f"the model is called with {size} rows for {batch} images; such calls cannot be recorded.")
    every = torch.cat([rows + copy * batch for copy in range(size // batch)]).to(x.device)
    t = t.flatten().expand(size) if t.numel() == 1 else t
    conditioning, shared = {}, {}
    for name, value in _flatten(bound):
        if isinstance(value, Tensor) and value.ndim and len(value) == size:
            conditioning[name] = value.detach()[every.to(value.device)].cpu()
        elif isinstance(value, Tensor):
            shared[name] = value.detach().cpu()
        elif _plain(value):
            shared[name] = value
        else:
            raise UserError(
                f"the model is called with '{name}' of type {type(value).__name__}, which cannot be recorded; "
                "tensors, numbers, strings and dicts and tuples of them can."
            )
    return Calls(x.detach()[every].cpu(), t[every.to(t.device)].cpu(), conditioning, shared)


def _plain(value: object) -> bool:
    """True if JSON can hold a value: numbers, strings and lists of them."""
    if isinstance(value, (list, tuple)):
        return all(map(_plain, value))
    return value is None or isinstance(value, (bool, int, float, str))


def _flatten(arguments: dict) -> Iterator[tuple[str, Any]]:
    """(name, value) of all arguments, with the entries of dicts, and of tuples with tensors in them, one by one."""
    for name, value in arguments.items():
        if isinstance(value, (list, tuple)) and any(isinstance(entry, (Tensor, tuple)) for entry in value):
            value = value if _plain(value) else dict(enumerate(value))
        if isinstance(value, dict):
            yield from ((f"{name}/{key}", inner) for key, inner in _flatten(value))
        else:
            yield name, value


def _nested(flat: dict[str, Any]) -> Any:
    """The inverse of `_flatten`; sequences become tuples."""
    entries: dict[str, dict] = {}
    for name, value in flat.items():
        outer, _, inner = name.partition("/")
        entries.setdefault(outer, {})[inner] = value
    nested = {name: inner[""] if "" in inner else _nested(inner) for name, inner in entries.items()}
    places = [str(i) for i in range(len(nested))]
    return tuple(nested[place] for place in places) if nested and nested.keys() == set(places) else nested
