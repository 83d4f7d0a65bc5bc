"""A fitted schedule in a folder: made once, then read."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ...errors import UserError
from ...files.atomic import replacing
from ...files.claim import claimed
from ...files.places import output_folder
from ..catalog import fitted_in
from ..fitted import FittedScheduler
from .fit import FitConfig, fit


def fitted_to(
    pipe: Any, teacher: Any, evaluations: Sequence[int], folder: Path, settings: dict[str, Any]
) -> FittedScheduler:
    """The schedule in a folder; where it has none for these numbers of evaluations, it is fitted and written first.

    Args:
        teacher: as in `fit`.
        settings: what else decides it (model, dtype, teacher).

    Raises:
        UserError: a damaged schedule in the folder, or one made with other settings; any error of `fit`.
    """
    file = folder / "scheduler_config.json"
    with output_folder(folder), claimed(folder, settings):
        if file.is_file():
            scheduler = fitted_in(folder, pipe.scheduler.config)
            if scheduler.config.origin != settings:
                raise UserError(f"{folder} holds a schedule fitted with other settings; choose another --output.")
            if set(evaluations) <= set(scheduler.fitted_for):
                return scheduler
        found = fit(pipe, FitConfig(evaluations=tuple(evaluations)), teacher=teacher)
        scheduler = FittedScheduler.from_config(found.config, origin=settings)
        with replacing(file) as temporary:
            temporary.write_text(scheduler.to_json_string())
    return scheduler
