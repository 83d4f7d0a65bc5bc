"""Steps of a sampler that reuse the deep part of a network, as a plan says.

Neighbouring steps see nearly the same picture, and what the deep part of a network makes of it changes slowly. Which
steps compute it anew a plan says (step_plan.py), made from what reuse costs at each step of the model's own sampler
(plan_steps.py).

    plan = ptq4dm.plan_cached_steps(pipe, num_inference_steps=20, reuse=0.5)
    with ptq4dm.cached_steps(pipe, plan) as cache:
        ptq4dm.sample(pipe, range(16), num_inference_steps=20)
    print(cache)

Whether a call reuses depends on the plan and the number of the evaluation alone: nothing is read back from a GPU, and
each of the two kinds of calls has CUDA graphs of its own (inference/graphs.py). What is reused is of the same
generation (a new one begins where the scheduler's timesteps are set), of the same call within a step (the first or
second half of guidance) and of a call with tensors of the same shapes, and never older than the plan says; where
there is no such the network is computed whole.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from ..calibration.clock import counted
from ..checks import check
from ..errors import UserError
from ..hooks import computing, of_this_thread
from ..pipelines.denoiser import check_pipeline, denoiser_names, schedulers_of, turn_at
from .cut import cut
from .deep_part import DeepPart, Kept
from .made_for import OTHER_TIMES, differences, made_for, other_times
from .step_clock import StepClock
from .step_plan import StepPlan

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

MOST_FORMS = 16  # of calls that a network keeps deep parts of: what came first goes first


class CachedModel:
    """A network whose calls compute or reuse its deep part."""

    def __init__(self, model: nn.Module, part: DeepPart, clock: StepClock, cache: StepCache) -> None:
        self.model, self.part, self.clock, self.cache = model, part, clock, cache
        self.kept: dict[Any, Kept] = {}
        self._run, self._evaluation, self._calls = -1, -1, 0

    def call(self, forward: Callable, args: tuple, kwargs: dict[str, Any]) -> Any:
        """A call of the network."""
        if torch.is_grad_enabled():
            raise UserError(
                "cached steps are for sampling, and have no gradient: call the model under torch.no_grad()."
            )
        if getattr(self.model, "is_cache_enabled", False):
            raise UserError(
                f"{type(self.model).__name__} has got a cache of diffusers while its steps are cached; end that with "
                "its disable_cache()."
            )
        evaluation, plan = self.clock.read(lambda: named(self.model, args, kwargs)), self.cache.plan
        if evaluation is None or evaluation >= plan.evaluations:
            return forward(*args, **kwargs)
        self._begin(evaluation)
        kept = self._kept(_form(args, kwargs))
        self._calls += 1
        sources = plan.sources(evaluation)
        if sources and kept.steps[: len(sources)] == sources:
            self.cache.reused += 1
            return self.part.reused(kept, plan.weights[evaluation], lambda: forward(*args, **kwargs))
        self.cache.computed += 1
        self.cache.unplanned += bool(sources)
        output = self.part.computed(kept, evaluation, lambda: forward(*args, **kwargs))
        self.cache.uncompiled |= self.part.uncompiled
        self.cache.most_bytes = max(self.cache.most_bytes, sum(one.bytes for one in self.kept.values()))
        return output

    def _kept(self, form: tuple) -> Kept:
        """What is kept of calls of this form at this place within an evaluation."""
        key = self._calls, form
        if key not in self.kept:
            while len(self.kept) >= MOST_FORMS:
                del self.kept[next(iter(self.kept))]
            self.kept[key] = Kept()
        return self.kept[key]

    def _begin(self, evaluation: int) -> None:
        """Count calls within an evaluation; forget what was kept where a generation begins."""
        if self._run != self.clock.runs:
            if len(self.clock.times) != self.cache.plan.evaluations:
                raise UserError(
                    f"the plan of cached steps is for {self.cache.plan.evaluations} evaluations, and the sampler has "
                    f"{len(self.clock.times)}; sample with as many, or make another plan."
                )
            self.cache.compare_times(self.clock.times)
            self._run, self._evaluation = self.clock.runs, -1
            for one in self.kept.values():
                one.steps = []
        if evaluation != self._evaluation:
            self._evaluation, self._calls = evaluation, 0


class StepCache:
    """What `cached_steps` did; `str()` of it is a report, also after the block.

    computed, reused: calls of the networks. unplanned: of those computed, calls that the plan would have had reuse,
    where nothing fit was kept. most_bytes: of what one network kept. uncompiled: whether code that `optimize` had
    compiled, of a network as a whole or of a part with modules of the deep part in it, ran as written. others: in
    what the plan was made for something else.
    """

    def __init__(self, plan: StepPlan, others: list[str]) -> None:
        self.plan, self.others = plan, others
        self.computed = self.reused = self.unplanned = self.most_bytes = 0
        self.uncompiled = False

    def compare_times(self, times: Sequence[float]) -> None:
        """Take note where a sampler has other times than those that the plan was made for."""
        if OTHER_TIMES not in self.others and other_times(self.plan.times, times):
            self.others.append(OTHER_TIMES)

    def __str__(self) -> str:
        lines = [
            f"calls: {self.computed} computed, {self.reused} reused a deep part (planned: "
            f"{len(self.plan.computed)} of {self.plan.evaluations} evaluations computed)",
            f"at most {self.most_bytes:,} bytes",
        ]
        if self.others:
            lines.append(
                f"its plan was made for {' and '.join(self.others)}: what reuse costs here was not looked at"
            )
        if self.unplanned:
            lines.append(f"{self.unplanned} were computed because nothing of their step and shape was kept")
        if self.uncompiled:
            lines.append("compiled code around the deep part ran as written: optimize with compiled=False")
        return "\n".join(lines)


@contextmanager
def cached_steps(target: DiffusionPipeline, plan: StepPlan) -> Iterator[StepCache]:
    """A `StepCache`: in the `with` block the pipeline's denoisers reuse their deep part as the plan says.

    Served are UNets of diffusers and transformers with a list of blocks, also quantized, fused and optimized. The
    plan's depth is where they are cut: in a UNet so many layers of the way down are computed in each step, as many of
    the way up, and one more; in a transformer so many blocks before the deep part, and as many behind it. In the
    block the networks are called by the pipeline, or by a loop that steps its scheduler. Calls in other threads are
    as before.

    Raises:
        UserError: what is no pipeline, one with several schedulers, a model that is compiled as a whole, runs
            through an engine or has no deep part, a sampler with another number of evaluations, or a call with
            gradients enabled.
    """
    check(plan, StepPlan, "plan")
    name, models = cached_models(target)
    with turn_at(target):
        now = made_for(getattr(target, name), models)
        clock, cache = StepClock(target, name), StepCache(plan, differences(plan.origin, now))
        with ExitStack() as stack:
            for called, model in models.items():
                part = DeepPart(model, cut(model, plan.depth, f"'{called}'"), plan.history)
                one = CachedModel(model, part, clock, cache)
                stack.enter_context(part.put_in())
                stack.enter_context(computing(model, {"": _through(one, model.forward)}))
            stack.enter_context(counted({name: clock.track}, lambda _: None))
            yield cache


def cached_models(target: Any) -> tuple[str, dict[str, nn.Module]]:
    """(the scheduler's name, denoiser's name -> denoiser) of a pipeline. UserError where steps cannot be cached."""
    check_pipeline(target, "what is sampled with cached steps")
    names = list(schedulers_of(target))
    if len(names) != 1:
        raise UserError(f"cached steps need a pipeline with one scheduler; {type(target).__name__} has {len(names)}.")
    models = {name: getattr(target, name) for name in denoiser_names(target)}
    for name, model in models.items():
        if hasattr(model, "_orig_mod") or getattr(model, "_compiled_call_impl", None) is not None:
            raise UserError(f"'{name}' is compiled as a whole, so no part of it can be reused; compile its blocks.")
        if getattr(vars(model).get("forward"), "computes_whole", False):
            raise UserError(
                f"'{name}' runs through an engine as a whole, so no part of it can be reused; unoptimize it."
            )
        if getattr(model, "is_cache_enabled", False):
            raise UserError(f"'{name}' has a cache of diffusers already; end that with its disable_cache().")
    return names[0], models


def _through(one: CachedModel, forward: Callable) -> Callable:
    return of_this_thread(lambda *args, **kwargs: one.call(forward, args, kwargs), forward)


def named(model: nn.Module, args: tuple, kwargs: dict[str, Any]) -> dict[str, Any]:
    """A call's arguments by the names that the network's class gives them."""
    return dict(inspect.signature(type(model).forward).bind(model, *args, **kwargs).arguments)


def _form(args: tuple, kwargs: dict[str, Any]) -> tuple:
    """What decides whether a call may reuse what another one kept: the forms of all tensors that it is given, and the
    modes of torch that change those of its results."""
    tensors = [one for one in pytree.tree_leaves((args, kwargs)) if isinstance(one, Tensor)]
    forms = tuple((tuple(one.shape), one.dtype, one.device) for one in tensors)
    kinds = {one.device.type for one in tensors}
    casts = tuple((kind, torch.get_autocast_dtype(kind)) for kind in kinds if torch.is_autocast_enabled(kind))
    return forms, casts, torch.is_inference_mode_enabled()
