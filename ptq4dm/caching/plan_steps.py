"""`plan_cached_steps`: which evaluations reuse the deep part of a network, from its own sampler's trajectories.

The pipeline samples some seeds as it always does. At each evaluation its network is called twice: whole, and with the
deep part of the evaluation before, which tells how far an error of the deep part moves the output (g_j in
step_search.py). How far an error of an output moves the end of sampling (s_j) the scheduler tells
(step_ends.py).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from ..calibration.clock import counted
from ..calibration.record import tensors_of
from ..checks import check_fields, check_seeds, checked, named_options
from ..errors import UserError
from ..hooks import computing, of_this_thread
from ..options import option
from ..pipelines.denoiser import turn_at
from ..pipelines.sampling import call_pipeline, check_arguments, check_steps
from .cached_steps import cached_models, named
from .cut import cut
from .deep_part import DeepPart, Kept
from .made_for import made_for
from .step_clock import StepClock
from .step_ends import Ends, Finished
from .step_plan import MOST_KEPT, StepPlan
from .step_search import Costs, alike, best_steps, best_weights

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

MOST_REUSE = 0.9  # of evaluations
EXACT = 0.02  # how far a network may be from itself when its own deep part is put in its place, by rounding


@named_options
@dataclass
class StepPlanConfig:
    """Settings of a plan.

    num_inference_steps: of the sampler that the plan is for.
    reuse: the share of its evaluations that reuse a deep part.
    depth: where the network is cut, see `ptq4dm.cached_steps`; 0, all but its ends, was best at equal time.
    history: deep parts that are kept; 1 reuses the latest as it is, more continue its change.
    num_samples: trajectories that are looked at, from seeds that begin at seed, in batches of batch_size.
    """

    num_inference_steps: int = option(20, low=1, high=100_000)
    reuse: float = option(0.4, low=0.0, high=MOST_REUSE)
    depth: int = option(0, low=0, high=100_000)
    history: int = option(3, low=1, high=MOST_KEPT)
    num_samples: int = option(8, low=1, high=100_000)
    batch_size: int = option(8, low=1, high=100_000)
    seed: int = option(1_000_000, low=0)

    def __post_init__(self) -> None:
        check_fields(self, "StepPlanConfig")
        check_seeds(self.seed, self.num_samples)


@checked
def plan_cached_steps(
    pipe: DiffusionPipeline,
    config: StepPlanConfig | None = None,
    *,
    conditioning: dict[str, Any] | None = None,
    pipeline_kwargs: dict[str, Any] | None = None,
) -> StepPlan:
    """The plan for a pipeline as it is: its sampler, its number of steps, its weights, quantized or not.

    conditioning, pipeline_kwargs: as in `ptq4dm.sample`.

    Raises:
        UserError: a share that is less than one evaluation; as `cached_steps`; a network that is not itself when its
            own deep part is put in its place; or any error of `sample`.
    """
    config = config or StepPlanConfig()
    check_arguments(conditioning, pipeline_kwargs)
    check_steps(pipe, config.num_inference_steps)
    if getattr(getattr(pipe, "scheduler", None), "order", 1) == 1:  # else the sampler has more evaluations than steps
        computed_of(config.num_inference_steps, config.reuse)
    return measured(pipe, config, conditioning, pipeline_kwargs).plan(config.reuse, config.history)


def computed_of(count: int, reuse: float) -> int:
    """How many of `count` evaluations compute where this share reuses. Raises UserError where all of them do."""
    computed = max(1, math.ceil(count * (1 - reuse) - 1e-9))
    if computed == count:
        raise UserError(
            f"a share of {reuse:g} of {count} evaluation{'s' * (count != 1)} is less than one, so that nothing would "
            "be reused; give a larger share or more steps."
        )
    return computed


@dataclass
class Measured:
    """What trajectories told. products: [N, N]; outputs: [N], g_j^2; ends: [N], s_j; all as in step_search.py.

    origin: of plans, see StepPlan.
    """

    depth: int
    times: tuple[float, ...]
    products: np.ndarray
    outputs: np.ndarray
    ends: np.ndarray
    origin: dict[str, Any] = field(default_factory=dict)

    def plan(self, reuse: float, history: int) -> StepPlan:
        """The plan for a share of evaluations that reuse. Raises UserError where that is none, or none could."""
        count = len(self.times)
        computed = computed_of(count, reuse)
        costs = Costs(self.products, self.ends**2 * self.outputs)
        steps, total = best_steps(costs, computed, history, 2 * math.ceil(count / computed))
        if not steps:
            others = int(np.isnan(np.diag(self.products, 1)).sum())
            why = (
                f" (in {others} the calls have other shapes than before, as where guidance begins or ends)"
                if others
                else ""
            )
            raise UserError(f"no {count - computed} of {count} evaluations can reuse{why}: plan for a smaller reuse.")
        return self.with_steps(steps, history, math.sqrt(total))

    def with_steps(self, steps: tuple[int, ...], history: int, error: float | None = None) -> StepPlan:
        """The plan that computes these evaluations, with the best weights elsewhere."""
        rows: list[tuple[float, ...]] = []
        for k in range(len(self.times)):
            latest = tuple(c for c in steps if c < k)[::-1][:history]
            sources = [] if k in steps else list(alike(self.products, latest, k))
            rows.append(tuple(best_weights(self.products, sources, k)[0].tolist()) if sources else ())
        return StepPlan(weights=tuple(rows), depth=self.depth, times=self.times, error=error, origin=self.origin)


def measured(
    pipe: Any, config: StepPlanConfig, conditioning: dict[str, Any] | None, pipeline_kwargs: dict[str, Any] | None
) -> Measured:
    """What trajectories of a pipeline tell; see `plan_cached_steps`."""
    name, models = cached_models(pipe)
    seeds = range(config.seed, config.seed + config.num_samples)
    watched, ends = _Watched(StepClock(pipe, name)), Ends()
    with turn_at(pipe), ExitStack() as stack:
        for called, model in models.items():
            part = DeepPart(model, cut(model, config.depth, f"'{called}'"))
            stack.enter_context(part.put_in())
            stack.enter_context(computing(model, {"": watched.through(called, part, model.forward)}))
        for start in range(0, len(seeds), config.batch_size):
            some = list(seeds[start : start + config.batch_size])
            counting = counted({name: watched.clock.track}, lambda _: None)
            with suppress(Finished), ends.watching(getattr(pipe, name)), counting:
                call_pipeline(
                    pipe, some, num_inference_steps=config.num_inference_steps, conditioning=conditioning,
                    pipeline_kwargs=pipeline_kwargs,
                )  # fmt: skip
            watched.add()
    origin = made_for(getattr(pipe, name), models) | {"seed": config.seed, "num_samples": config.num_samples}
    times = tuple(watched.clock.times)
    return Measured(config.depth, times, watched.products, watched.factors(), ends.moved(), origin)


class _Watched:
    """The calls of a pipeline's networks, by evaluation: their deep parts, and what these count for."""

    def __init__(self, clock: StepClock) -> None:
        self.clock = clock
        self.deep: dict[int, dict[Any, Tensor]] = {}  # evaluation -> (network, call in it) -> [all numbers]
        self.batches = self.run = 0
        self.products = np.zeros((0, 0))
        self.moves: dict[int, list[float]] = {}

    def through(self, name: str, part: DeepPart, forward: Callable) -> Callable:
        def call(*args: Any, **kwargs: Any) -> Any:
            evaluation = self.clock.read(lambda: named(part.model, args, kwargs))
            if evaluation is None:
                return forward(*args, **kwargs)
            return self.call(name, part, evaluation, lambda: forward(*args, **kwargs))

        return of_this_thread(call, forward)

    def call(self, name: str, part: DeepPart, evaluation: int, forward: Callable[[], Any]) -> Any:
        if self.run != self.clock.runs:  # another generation: guidance_interval takes a look before it
            self.run, self.deep = self.clock.runs, {}
        mine = self.deep.setdefault(evaluation, {})
        key = name, sum(one == name for one, _ in mine)
        kept = Kept()
        output = part.computed(kept, evaluation, forward)
        if evaluation == 0:
            self._check_same(part, output, part.reused(kept, [1.0], forward))
        deep = torch.cat([one[0].flatten().float() for one in kept.parts.values()])
        before = self.deep.get(evaluation - 1, {}).get(key)
        if before is not None and before.shape == deep.shape:
            sizes = [one[0].numel() for one in kept.parts.values()]
            for one, old in zip(kept.parts.values(), before.split(sizes), strict=True):
                one[0].copy_(old.view(one[0].shape))
            moved = _square(part.reused(kept, [1.0], forward), output)
            change = float((deep - before).square().sum())
            if change > 0:
                self.moves.setdefault(evaluation, []).append(moved / change)
        mine[key] = deep
        return output

    def _check_same(self, part: DeepPart, output: Any, other: Any) -> None:
        size = sum(float(one.float().square().sum()) for one in tensors_of(output))
        if not _square(output, other) <= EXACT**2 * size:
            raise UserError(
                f"{type(part.model).__name__} does not give what it gave when its own deep part, from "
                f"'{part.cut.units[0]}' to '{part.cut.units[-1]}', is put in its place; its steps cannot be cached."
            )

    def add(self) -> None:
        """Add the products of a batch of trajectories, and forget its deep parts."""
        count = len(self.clock.times)
        found = np.full((count, count), np.nan)
        for i in range(count):
            for j in range(i, count):
                one, other = self.deep.get(i, {}), self.deep.get(j, {})
                if one and one.keys() == other.keys() and all(one[k].shape == other[k].shape for k in one):
                    found[i, j] = found[j, i] = sum(float(one[k] @ other[k]) for k in one)
        self.products = found if not self.batches else self.products + found
        self.batches += 1
        self.deep = {}

    def factors(self) -> np.ndarray:
        """[N]: the mean of g_j^2, for the first evaluation 0."""
        return np.array([np.mean(self.moves.get(k, [0.0])) for k in range(len(self.clock.times))])


def _square(one: Any, other: Any) -> float:
    """The sum of squares of a difference of outputs."""
    pairs = zip(tensors_of(one), tensors_of(other), strict=True)
    return sum(float((a.float() - b.float()).square().sum()) for a, b in pairs)
