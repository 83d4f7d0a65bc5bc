"""A sampler that steps through a table fitted to a model: `ptq4dm.samplers.fit` makes it, the config holds it.

    x' = scale x + sum_j weights[j] y_j

y_j is what the model gave at the newest evaluation (j = 0) and at those before it, whatever it was trained to
predict: noise, velocity or data. Times, scale and weights stand in the table, one for each number of evaluations it
was fitted for.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from diffusers import ConfigMixin, SchedulerMixin
from diffusers.configuration_utils import register_to_config
from diffusers.schedulers.scheduling_utils import SchedulerOutput

from ..checks import check
from ..errors import UserError
from ..progress import note
from .choices import FLOW
from .made_with import arguments_of, given_of, other_arguments, other_shape, other_times
from .maths.outputs import without_variance
from .maths.timesteps import number_of, own_index, single
from .memory import State, States
from .translation import FLOW_DEFAULTS

FIELDS = ("timesteps", "scale", "weights")
WHOLE = "a fitted schedule begins at its first timestep: for image to image or a refiner take DEISScheduler."
Row = tuple[float, list[float]]


class FittedScheduler(SchedulerMixin, ConfigMixin):
    """Multistep sampling by tables that were fitted to one model, saved with its pipeline.

    Args:
        tables: number of evaluations, as text, -> {"timesteps": [n] decreasing, "scale": [n], "weights": n lists, of
            one number for each output from the newest back}, of a flow also "sigmas" [n + 1], the noise levels that
            `sigmas` then has; and beside them what was measured when it was fitted. Timesteps of a flow that is
            told its share of data rise instead.
        num_train_timesteps, prediction_type: of the model; the tables hold all that follows from them.
        start: what unit noise is multiplied with.
        base_shift, max_shift, base_image_seq_len, max_image_seq_len: of a flow; some pipelines work out from them a
            mu, which is not read here.
        origin: what the tables were fitted to and with; a note tells where arguments or sizes are others. Nothing
            that is computed depends on it.

    Whole generations only: image to image and a refiner begin in the middle, where no table was fitted. A use with
    other guidance, times or sizes than those of the fit is told by a note on stderr, once (made_with.py).

    Raises:
        UserError: tables that are not as above.
    """

    order = 1

    @register_to_config
    def __init__(
        self,
        tables: dict[str, Any] | None = None,
        num_train_timesteps: int = 1000,
        prediction_type: str = "epsilon",
        start: float = 1.0,
        origin: dict[str, Any] | None = None,
        base_shift: float | None = None,
        max_shift: float | None = None,
        base_image_seq_len: int | None = None,
        max_image_seq_len: int | None = None,
    ):
        check(tables, dict[str, Any] | None, "FittedScheduler: tables")
        check(origin, dict[str, Any] | None, "FittedScheduler: origin")
        check(num_train_timesteps, int, "FittedScheduler: num_train_timesteps", 1, 1_000_000)
        check(prediction_type, str, "FittedScheduler: prediction_type")
        check(start, float, "FittedScheduler: start", 0)
        for shift, name in ((base_shift, "base_shift"), (max_shift, "max_shift")):
            check(shift, float | None, f"FittedScheduler: {name}")
        for length, name in ((base_image_seq_len, "base_image_seq_len"), (max_image_seq_len, "max_image_seq_len")):
            check(length, int | None, f"FittedScheduler: {name}")
        for steps, table in (tables or {}).items():
            check_table(steps, table, prediction_type == FLOW)
        if prediction_type == FLOW:
            shifts = {name: value for name, value in FLOW_DEFAULTS.items() if self.config.get(name, "") is None}
            self.register_to_config(**shifts)
        self.init_noise_sigma = start
        self.num_inference_steps: int | None = None
        self.timesteps = self._own_timesteps = torch.empty(0)
        self.sigmas: torch.Tensor | None = None
        self._rows: list[Row] = []
        self._told: set[str] = set()  # what was said already
        self._states, self._latest = States(), None

    @property
    def fitted_for(self) -> list[int]:
        """The numbers of evaluations that there are tables for."""
        return sorted(map(int, self.config.tables or {}))

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: str | torch.device | None = None,
        sigmas: Sequence[float] | None = None,
        mu: float | None = None,
        timesteps: Sequence[float] | None = None,
    ) -> None:
        """Take the table of so many evaluations.

        Args:
            sigmas, timesteps, mu: what pipelines of flow-matching models pass: only how many they are is read, for
                the table was fitted to a pipeline that passed its own. A note tells where these are others.

        Raises:
            UserError: no table was fitted for so many.
        """
        given, steps = given_of(sigmas, timesteps, mu), num_inference_steps
        if steps is None and (listed := given.get("sigmas", given.get("timesteps"))) is not None:
            steps = len(listed)
        times, rows, levels = self._table(number_of(steps))
        self._look_at(len(times), given)
        counted = all(float(t).is_integer() for t in times) and self.config.prediction_type != FLOW
        self.timesteps = torch.tensor(times, dtype=torch.int64 if counted else torch.float32, device=device)
        self.sigmas = None if levels is None else torch.tensor(levels, dtype=torch.float32, device=device)
        self._own_timesteps, self._rows, self.num_inference_steps = self.timesteps, rows, len(times)
        self._states, self._latest = States(), None

    def _table(self, steps: int) -> tuple[Sequence[float], list[Row], Sequence[float] | None]:
        """(times, scale and weights of each, noise levels if there are) for so many evaluations."""
        if steps not in self.fitted_for:
            known = ", ".join(map(str, self.fitted_for))
            why = (
                f"but for: {known}; take one of these, or fit it anew" if known else "nor for any other; fit it first"
            )
            raise UserError(f"this schedule was not fitted for {steps} evaluations, {why}.")
        table = self.config.tables[str(steps)]
        rows = list(zip(table["scale"], map(list, table["weights"]), strict=True))
        return table["timesteps"], rows, table.get("sigmas")

    def _look_at(self, steps: int, given: dict[str, Any]) -> None:
        """Tell where set_timesteps was given something else than in the fit."""
        self._tell("times", other_times(self.config.tables[str(steps)], given))

    def compare_arguments(self, pipe: Any, pipeline_kwargs: dict[str, Any] | None) -> None:
        """Tell where a pipeline is called with other arguments, such as guidance, than in the fit."""
        self._tell("arguments", other_arguments(self.config.origin, arguments_of(pipe, pipeline_kwargs)))

    def _tell(self, what: str, text: str | None) -> None:
        if text is not None and what not in self._told:
            self._told.add(what)
            note(text)

    def set_begin_index(self, begin_index: int = 0) -> None:
        """Take what pipelines say of where they begin. Raises UserError unless that is at the first timestep."""
        if begin_index != 0:
            raise UserError(WHOLE)

    def step(
        self,
        model_output: torch.Tensor,
        timestep: int | float | torch.Tensor,
        sample: torch.Tensor,
        return_dict: bool = True,
        generator: torch.Generator | None = None,
    ) -> SchedulerOutput | tuple:
        """Move the sample [B, ...] to the next time of the table; float32 at least, returned in the sample's dtype.

        A learned variance behind the prediction (twice the channels) is left out. Earlier outputs are remembered
        with the tensor that was returned; where a pipeline hands back another, the latest are used.

        Args:
            timestep: an entry of `timesteps`, or a number, which is taken for the nearest. generator: not used, no
                noise is added.

        Raises:
            UserError: set_timesteps has not been called, several timesteps, or a time that is neither the first nor
                the next of the table.
        """
        if not len(self.timesteps):
            raise UserError("call set_timesteps(num_inference_steps) before the first step.")
        state = self._states.get(sample, self._latest)
        if state is not None and state.shape != sample.shape:
            state = None
        index = self._index(timestep, state)
        if index == 0 and "times" not in self._told:  # another shift is told already, and by the same cause
            self._tell("size", other_shape(self.config.origin, sample.shape[1:]))
        dtype = torch.promote_types(sample.dtype, torch.float32)
        # A copy: the caller may write the next output over this one (static buffers of a CUDA graph).
        output = without_variance(model_output, sample).to(dtype, copy=True)
        past = state.history if index and state is not None else ()
        result = self._moved(index, sample.to(dtype), (output, *past)).to(sample.dtype)
        self._latest = None
        if index + 1 < len(self.timesteps):
            kept = self._kept(index + 1)
            self._latest = State(index + 1, sample.shape, None, (output, *past)[:kept])
            self._states[result] = self._latest
        return SchedulerOutput(prev_sample=result) if return_dict else (result,)

    def _kept(self, index: int) -> int:
        """How many earlier outputs evaluation `index` needs."""
        return len(self._rows[index][1]) - 1

    def _moved(self, index: int, x: torch.Tensor, outputs: tuple[torch.Tensor, ...]) -> torch.Tensor:
        scale, weights = self._rows[index]
        result = x * scale
        for weight, output in zip(weights, outputs, strict=True):
            result.add_(output, alpha=weight)
        return result

    def _index(self, timestep, state: State | None) -> int:
        timestep, expected = single(timestep), 0 if state is None else state.index
        index = own_index(timestep, self._own_timesteps)
        if index is None and isinstance(timestep, torch.Tensor) and timestep.device.type != "cpu":
            index = expected  # it is not read back from the device
        if index is None:  # a copy, which may be rounded: it is the nearest
            value, times = float(timestep), self._own_timesteps.tolist()
            index = min(range(len(times)), key=lambda i: abs(times[i] - value))
        if index and index != expected:
            raise UserError(WHOLE)
        return index

    def scale_model_input(self, sample: torch.Tensor, *args, **kwargs) -> torch.Tensor:
        """The sample itself."""
        return sample

    def scale_noise(
        self, sample: torch.Tensor, timestep: Any = None, noise: torch.Tensor | None = None
    ) -> torch.Tensor:
        """(1 - s) x_0 + s n of a flow, at the level s of the first timestep, where such pipelines begin.

        Raises UserError at any other timestep, and where the table has no noise levels.
        """
        if self.sigmas is None:
            raise UserError("this schedule holds no noise levels: fit it again, or take DEISScheduler.")
        if timestep is not None and (torch.as_tensor(timestep).cpu() != self.timesteps[0].cpu()).any():
            raise UserError(WHOLE)
        level = self.sigmas[0].to(sample)
        return (1 - level) * sample + level * (torch.randn_like(sample) if noise is None else noise)

    def __len__(self) -> int:
        return self.config.num_train_timesteps


def check_table(steps: str, table: Any, of_flow: bool) -> None:
    """Raises UserError unless this is a table for `steps` evaluations: see FittedScheduler."""
    what = f"FittedScheduler: the table of {steps} evaluations"
    check(table, dict[str, Any], what)
    if missing := [name for name in FIELDS if name not in table]:
        raise UserError(f"{what} lacks its {missing[0]}.")
    check(list(table["timesteps"]), list[float], f"{what}: timesteps")
    check(list(table["scale"]), list[float], f"{what}: scale")
    check([list(row) for row in table["weights"]], list[list[float]], f"{what}: weights")
    times, rows = table["timesteps"], table["weights"]
    if not (str(len(times)) == str(steps) and len(times) == len(table["scale"]) == len(rows)):
        raise UserError(f"{what} must have {steps} timesteps, and as many scales and rows of weights.")
    rises = [b > a for a, b in zip(times, times[1:], strict=False)]
    if any(a == b for a, b in zip(times, times[1:], strict=False)) or (any(rises) and not (of_flow and all(rises))):
        raise UserError(f"{what}: timesteps must decrease.")
    if table.get("sigmas") is not None:
        check(list(table["sigmas"]), list[float], f"{what}: sigmas")
        if len(table["sigmas"]) != len(times) + 1:
            raise UserError(f"{what} must have {len(times) + 1} sigmas, or none.")
    if any(not 1 <= len(row) <= i + 1 for i, row in enumerate(rows)):
        raise UserError(f"{what}: evaluation i can weigh its own output and the i before it.")
