"""Use a pipeline for as long as its networks wait for calls."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack, suppress
from typing import Any

from ..calibration.request import Done
from ..errors import UserError
from ..hooks import hooked
from ..pipelines.denoiser import turn_at
from ..pipelines.sampling import call_pipeline, refusals
from .wait import Wait


def use(
    pipe: Any,
    waiting: Mapping[str, Wait],
    seeds: Sequence[int],
    *,
    num_inference_steps: int,
    conditioning: dict[str, Any] | None = None,
    pipeline_kwargs: dict[str, Any] | None = None,
) -> None:
    """Sample with a pipeline until none of its networks waits any more; what is left of the sampling is not done.

    seeds, conditioning, pipeline_kwargs: as in `sampling.sample`.

    Raises UserError where a network was called too few times; then none waits.
    """
    networks = list(waiting.values())

    def stop(*_: Any) -> None:
        if all(one.done for one in networks):
            raise Done

    with turn_at(pipe), refusals(pipe, conditioning, pipeline_kwargs), ExitStack() as stack:
        for one in networks:
            stack.callback(one.cancel)
            stack.enter_context(hooked(one.model, {"": stop}))
        with suppress(Done):
            call_pipeline(
                pipe,
                seeds,
                num_inference_steps=num_inference_steps,
                conditioning=conditioning,
                pipeline_kwargs=pipeline_kwargs,
            )
        if lacking := next((one for one in networks if one.waits), None):
            raise UserError(
                f"'{lacking.name}' is called {len(lacking.calls)} times in {num_inference_steps} steps, and "
                f"{lacking.count} calls are waited for; take more steps, or fewer calls."
            )
