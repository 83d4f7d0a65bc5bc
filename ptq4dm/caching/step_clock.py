"""Which evaluation of which generation a network is called in, from its scheduler alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ..calibration.calls import timestep_of
from ..calibration.clock import Track
from ..errors import UserError


class StepClock:
    """The evaluations of a pipeline's scheduler, counted by its steps. A generation begins with new timesteps, set
    after the clock was made.

    runs: generations that have begun. evaluation: from 0, within the latest one; None before the first.
    times: of the latest one.
    """

    def __init__(self, pipe: Any, name: str) -> None:
        self.pipe, self.name = pipe, name
        self.track = Track(getattr(pipe, name))
        self.runs = 0
        self.evaluation: int | None = None
        self.times: list[float] = []
        self._timesteps: Any = getattr(self.track.scheduler, "timesteps", None)

    def read(self, arguments: Callable[[], dict[str, Any]]) -> int | None:
        """The evaluation of a call of the network; None where no generation has begun.

        arguments: of the call, by name. Only the first call of a generation is asked, for its time, which may have to
            come from a GPU.

        Raises UserError where the pipeline has another scheduler by now.
        """
        scheduler = getattr(self.pipe, self.name, None)
        if scheduler is not self.track.scheduler:
            raise UserError("the pipeline got another scheduler while steps are cached; end the block first.")
        timesteps = getattr(scheduler, "timesteps", None)
        if timesteps is not self._timesteps and timesteps is not None:
            self._timesteps = timesteps
            self.times = [float(t) for t in timesteps]
            first = Track(scheduler)
            first.called(timestep_of(arguments()))  # an image to image begins in the middle
            self.evaluation = len(self.times) - len(first.grid if first.grid is not None else [])
            self.runs += 1
        elif self.track.stepped and self.evaluation is not None:
            self.evaluation += 1
        self.track.stepped = False
        return self.evaluation
