"""Which teacher a model can follow: one of the same samples and the same prediction."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ...caching.made_for import kind
from ...errors import UserError
from ...pipelines.denoiser import denoiser
from ...progress import note
from ..catalog import make_sampler
from ..translation import FLOW_DEFAULTS, predicted
from .trajectories import Finished, stepped_through


def facts_of(config: Mapping) -> dict[str, Any]:
    """What a schedule says of the model that it was fitted to, by the config of the model's scheduler."""
    return {"num_train_timesteps": config.get("num_train_timesteps", 1000), "prediction_type": predicted(config)}


def teaching(
    sampler: str, pipe: Any, teacher: Any, steps: int, options: dict[str, Any]
) -> tuple[Any, dict[str, Any]]:
    """(the teacher's scheduler, what a schedule says of its model), where `pipe` can follow it.

    Of another teacher than `pipe` one step of each is begun, up to where the shape of its sample is seen. A note
    tells where it is another network.

    Args:
        sampler: by its name. teacher: a pipeline. steps, options: as in `run`.

    Raises:
        UserError: the teacher's model predicts something else, its samples have another shape, or its sampler scales
            what the model is given, or takes several evaluations a step.
    """
    facts = facts_of(teacher.scheduler.config)
    for name, mine in facts_of(pipe.scheduler.config).items():
        if mine != facts[name]:
            raise UserError(
                f"the teacher's model has {name} {facts[name]} and the fitted one {mine}; take a teacher of the same "
                "kind, such as the full-precision model of a quantized one."
            )
    scheduler = make_sampler(sampler, teacher.scheduler.config)
    if float(getattr(scheduler, "init_noise_sigma", 1.0)) != 1.0:
        raise UserError(
            f"the teacher's sampler {sampler} scales what this model is given, and no schedule is fitted to that; "
            "take one that starts from unit noise, such as deis, or, of an EDM model, sample with DEISScheduler."
        )
    if getattr(scheduler, "order", 1) != 1:
        raise UserError(f"the teacher {sampler} takes several evaluations a step; choose one that takes one.")
    if teacher is not pipe:
        its, mine = (sample_shape(one, scheduler, steps, options) for one in (teacher, pipe))
        if its != mine:
            raise UserError(f"the teacher's samples have shape {its} and the fitted model's {mine}; they must agree.")
        its, mine = (kind(denoiser(one)) for one in (teacher, pipe))
        if its != mine:
            fitted, other = mine["class"], its["class"]
            other += " with other settings" if fitted == other else ""
            note(f"the teacher's network is another ({other}) than the fitted {fitted}: its images are followed.")
    shifts = {name: teacher.scheduler.config.get(name) for name in FLOW_DEFAULTS if name != "shift"}
    return scheduler, {**facts, **{name: value for name, value in shifts.items() if value is not None}}


def sample_shape(pipe: Any, scheduler: Any, steps: int, options: dict[str, Any]) -> tuple[int, ...]:
    """The shape of one sample of a pipeline, as its scheduler sees it in the first step."""
    found: list[tuple[int, ...]] = []

    def seen(model_output, timestep, sample, *args, **kwargs):
        found.append(tuple(sample.shape[1:]))
        raise Finished

    stepped_through(pipe, scheduler, seen, [0], steps, options)
    return found[0]
