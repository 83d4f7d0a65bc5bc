"""Fit a few-step schedule to a model: times and weights that follow a teacher, its own sampler with many steps."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ...checks import check_fields, check_seeds, checked, named_options
from ...errors import UserError
from ...options import option
from ...pipelines.denoiser import check_sampled
from ...pipelines.sampling import check_arguments
from ...progress import progress_bar
from ..fitted import FittedScheduler
from ..made_with import arguments_of
from .grid import best_grid, inner_products
from .teacher import teaching
from .trajectories import Trajectories, record
from .weights import fit_weights

# Grids that are tried for each number of evaluations: exponents of `best_grid`. Which of them is best depends on how
# errors spread in the model, which local errors do not tell; the held-out trajectories do.
TRIED = ((0.0, 1.0), (1.0, 1.0), (2.0, 1.0), (0.0, 2.0), (1.0, 2.0), (2.0, 2.0))


@named_options
@dataclass
class FitConfig:
    """Settings of a fit.

    evaluations: what schedules are fitted for, each its own.
    num_trajectories: of the teacher, from seeds that begin at seed; half of them are held out where grids are chosen.
    teacher: a sampler as --sampler names it; its times are the candidates.
    teacher_steps: its evaluations.
    history: outputs of the model that a step weighs, 1 to 4.
    jitter: the share of an output that is taken for its error: larger means smaller weights.
    """

    evaluations: Sequence[int] = (4, 5, 6, 8)
    num_trajectories: int = option(
        64, "of --fit: samples of the teacher that are followed, half to choose by", low=2, high=100_000
    )
    teacher: str = "deis"
    teacher_steps: int = option(
        60, "of --fit: evaluations of the teacher, whose times are candidates", low=2, high=1000
    )
    history: int = option(3, low=1, high=4)
    jitter: float = option(1e-2, low=0.0, high=1.0)
    batch_size: int = option(64, low=1, high=100_000)
    seed: int = option(1_000_000, low=0)

    def __post_init__(self) -> None:
        check_fields(self, "FitConfig")
        check_seeds(self.seed, self.num_trajectories)
        wrong = [n for n in self.evaluations if not 1 <= n < self.teacher_steps]
        if wrong or not self.evaluations:
            raise UserError(
                f"FitConfig: evaluations must be from 1 to {self.teacher_steps - 1}, fewer than the teacher's; "
                f"got {list(self.evaluations)}."
            )


@checked
def fit(
    pipe: Any,
    config: FitConfig | None = None,
    *,
    teacher: Any = None,
    conditioning: dict[str, Any] | None = None,
    pipeline_kwargs: dict[str, Any] | None = None,
) -> FittedScheduler:
    """The schedule fitted to a pipeline's model, a scheduler for `pipe.scheduler`; its config holds the tables.

    For each number of evaluations several grids are found by dynamic programming (grid.py) and each gets its weights
    by least squares on its own way (weights.py); the one is kept whose end states are nearest to the teacher's on
    trajectories that it was not fitted to. "error" in its table is that distance, the mean over trajectories of the
    root mean square of an element.

    Args:
        teacher: the pipeline whose trajectories are followed, with the same parts and arguments: the full-precision
            one of a quantized `pipe`, say. None: `pipe` itself.
        conditioning, pipeline_kwargs: as in `ptq4dm.sample`, the same in every generation to come: guidance_scale...
            The schedule's origin records them, and a note tells a use with others.

    Raises:
        UserError: a sampler that this model cannot take, arguments that its pipeline does not take, or a teacher
            whose prediction or whose samples' shape is another.
    """
    config = config or FitConfig()
    check_sampled(pipe)
    check_arguments(conditioning, pipeline_kwargs)
    source = pipe if teacher is None else teacher
    check_sampled(source, "teacher")
    options = {"conditioning": conditioning, "pipeline_kwargs": pipeline_kwargs}
    scheduler, facts = teaching(config.teacher, pipe, source, config.teacher_steps, options)
    seeds = range(config.seed, config.seed + config.num_trajectories)
    followed = record(source, scheduler, seeds, config.teacher_steps, options, config.batch_size)
    if len(followed.times) != config.teacher_steps:
        raise UserError(
            f"{type(source).__name__} took {len(followed.times)} of {config.teacher_steps} steps, and a schedule is "
            "fitted to whole generations; take DEISScheduler."
        )
    tables = {}
    inner = inner_products(followed)
    with progress_bar(sorted(set(config.evaluations)), desc="fit", unit="schedule") as bar:
        for evaluations in bar:
            grids = candidates(inner, evaluations, config.history)
            tables[str(evaluations)] = _best(pipe, followed, grids, seeds, options, facts, config)
    origin = {"pipeline_kwargs": arguments_of(pipe, pipeline_kwargs), "shape": list(followed.shape)}
    return FittedScheduler(tables=tables, origin=origin, **facts)


def candidates(inner, evaluations: int, history: int) -> list[list[int]]:
    """Grids to try: those of TRIED, and the teacher's own grid thinned out evenly."""
    found = [best_grid(inner, evaluations, history, *exponents) for exponents in TRIED]
    found.append([round(i * inner.evaluations / evaluations) for i in range(evaluations + 1)])
    return [list(grid) for grid in dict.fromkeys(map(tuple, found))]


def _best(
    pipe: Any,
    followed: Trajectories,
    grids: Iterable[list[int]],
    seeds: Sequence[int],
    options: dict[str, Any],
    facts: dict[str, Any],
    config: FitConfig,
) -> dict[str, Any]:
    """The table with the least error on the second half of the trajectories, fitted to the first."""
    half = len(seeds) // 2
    found = []
    for grid in grids:
        table, ends = fit_weights(
            pipe, followed, grid, seeds, options, facts, slice(half), config.history, config.jitter
        )
        error = endpoint_error(ends[half:], followed.states[-1][half:])
        found.append({**table, "error": error})
    return min(found, key=lambda table: table["error"])


def endpoint_error(ends: torch.Tensor, right: torch.Tensor) -> float:
    """Mean over trajectories of the root mean square difference of their end states [K, D]."""
    return (ends - right).square().mean(1).sqrt().mean().item()
