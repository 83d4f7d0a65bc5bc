"""How far the end of sampling moves where the model's output moves, at each evaluation, as the scheduler has it.

Beside the samples two copies of the scheduler step small numbers: zeros, and as many numbers as there are
evaluations, of which the k-th is pushed at evaluation k alone. What they differ in at the end is the answer:
schedulers are linear in what they are given, but for clipping, and nothing so small is clipped. Noise that they add
is the same in both.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..hooks import of_this_thread
from ..pipelines.stepping import own_step

PUSH = 1e-3  # of an output


class Finished(Exception):
    """Raised after the last step: what a pipeline does then need not be done."""


class Ends:
    """How far the end moves, from a run of a pipeline within `watching`; Finished is raised after its last step."""

    def __init__(self) -> None:
        self.found: Tensor | None = None

    @contextmanager
    def watching(self, scheduler: Any) -> Iterator[None]:
        step = scheduler.step
        others: list[Any] = []
        states: list[Tensor] = []
        begun: Any = None  # the timesteps of a generation
        taken = 0

        def watched(*args: Any, **kwargs: Any) -> Any:
            nonlocal begun, taken
            count = len(scheduler.timesteps)
            if scheduler.timesteps is not begun:
                begun, taken = scheduler.timesteps, 0
                others.clear()
                states.clear()
            if not others:
                own = vars(scheduler).pop("step")
                others.extend(copy.deepcopy(scheduler) for _ in range(2))
                scheduler.step = own
            bound = inspect.signature(step).bind(*args, **kwargs).arguments
            sample = bound["sample"]
            for k, one in enumerate(others):
                if len(states) < 2:
                    states.append(torch.zeros((1,) * (sample.ndim - 1) + (count,), device=sample.device))
                width = max(1, bound["model_output"].shape[1] // sample.shape[1])  # 2: with a learned variance
                output = torch.cat([torch.zeros_like(states[k])] * width, 1)
                output[:, :1, ..., taken] = PUSH * (k == 0)
                given = {**bound, "model_output": output, "sample": states[k], "return_dict": False}
                if "generator" in inspect.signature(type(one).step).parameters:
                    given["generator"] = torch.Generator("cpu").manual_seed(taken)
                states[k] = type(one).step(one, **given)[0]
            result = step(*args, **kwargs)
            taken += 1
            if taken == count:
                self.found = (states[0] - states[1]).flatten() / PUSH
                raise Finished
            return result

        with own_step(scheduler, wraps(step)(of_this_thread(watched, step))):
            yield

    def moved(self) -> np.ndarray:
        """[N] of the evaluations, in units of the output."""
        assert self.found is not None
        return self.found.abs().double().cpu().numpy()
