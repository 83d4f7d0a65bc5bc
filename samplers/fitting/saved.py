"""Fitted schedules in folders: made once, then read; beside a model, and of which model."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ...errors import UserError
from ...files.atomic import replacing
from ...files.claim import claimed
from ...files.places import output_folder
from ...pipelines.embedded import folder_of
from ..catalog import FITTED, fitted_in
from ..fitted import FittedScheduler
from ..made_with import arguments_of
from .fit import FitConfig, fit

IN_PYTHON = "ptq4dm.samplers.fit(pipe, ...).save_pretrained(FOLDER)"


def fitted_to(
    pipe: Any,
    teacher: Any,
    config: FitConfig,
    folder: Path,
    settings: dict[str, Any],
    pipeline_kwargs: dict[str, Any] | None = None,
) -> tuple[FittedScheduler, bool]:
    """The schedule in a folder, and whether it was there.

    Where there is none for these numbers of evaluations, it is fitted and written first.

    Args:
        teacher, pipeline_kwargs: as in `fit`.
        settings: what decides it (model, dtype, teacher, what config says beside the evaluations).

    Raises:
        UserError: a damaged schedule in the folder, or one made with other settings; any error of `fit`.
    """
    file = folder / "scheduler_config.json"
    wanted = {**settings, "pipeline_kwargs": arguments_of(pipe, pipeline_kwargs)}
    with output_folder(folder), claimed(folder, wanted):
        if file.is_file():
            scheduler = fitted_in(folder, pipe.scheduler.config)
            origin = {"pipeline_kwargs": {}, **(scheduler.config.origin or {})}
            if {name: value for name, value in origin.items() if name != "shape"} != wanted:
                raise UserError(f"{folder} holds a schedule fitted with other settings; choose another --output.")
            if set(config.evaluations) <= set(scheduler.fitted_for):
                return scheduler, True
        found = fit(pipe, config, teacher=teacher, pipeline_kwargs=pipeline_kwargs)
        scheduler = FittedScheduler.from_config(found.config, origin={**settings, **found.config.origin})
        with replacing(file) as temporary:
            temporary.write_text(scheduler.to_json_string())
    return scheduler, False


def fitted_beside(models: Sequence[str], by_command: bool) -> Path:
    """The folder of the schedule that lies beside the first of these models that has one, in `fitted`.

    by_command: whether `bench samplers --fit` can make one.

    Raises UserError where none has.
    """
    for folder in (folder_of(model) / FITTED for model in models):
        if (folder / "scheduler_config.json").is_file():
            return folder
    way = "`ptq4dm bench samplers --fit`" if by_command else f"{IN_PYTHON} in Python"
    raise UserError(f"no fitted schedule lies beside {models[0]}; fit one by {way}, and give its folder.")


def fitted_elsewhere(scheduler: Any, models: Sequence[str]) -> str | None:
    """The model that a schedule was fitted to, where it says so and that is none of these."""
    origin = scheduler.config.get("origin")
    name = origin.get("model") if isinstance(origin, dict) else None
    here = {folder_of(model).resolve() for model in models}
    return name if isinstance(name, str) and folder_of(name).resolve() not in here else None
