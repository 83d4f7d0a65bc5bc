"""Noise of a model's own schedule, and what the model is to predict."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ...errors import UserError

PREDICTIONS = ("epsilon", "v_prediction", "sample")


@dataclass(frozen=True)
class Schedule:
    """x_t = alpha_t x_0 + sigma_t noise at whole timesteps. alpha, sigma [T] float32; prediction: of what."""

    alpha: Tensor
    sigma: Tensor
    prediction: str

    def noisy(self, x: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """x_t [B, ...] of images x [B, ...]."""
        return self._at(self.alpha, t, x) * x + self._at(self.sigma, t, x) * noise

    def target(self, x: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """What a right prediction is [B, ...]."""
        if self.prediction == "epsilon":
            return noise
        if self.prediction == "sample":
            return x
        return self._at(self.alpha, t, x) * noise - self._at(self.sigma, t, x) * x

    def times(self, low: float, high: float) -> tuple[int, int]:
        """The first timestep of a range given as shares of the schedule, and the one after the last; at least one."""
        number = len(self.alpha)
        first = min(int(low * number), number - 1)
        return first, max(first + 1, int(high * number))

    @staticmethod
    def _at(values: Tensor, t: Tensor, x: Tensor) -> Tensor:
        return values[t].view(-1, *[1] * (x.ndim - 1))


def schedule_of(pipe, device: torch.device) -> Schedule:
    """The schedule that a pipeline's scheduler stands for.

    Raises UserError for schedulers without alpha_bar at whole timesteps (flow matching, EDM), and for predictions of
    something else.
    """
    scheduler = getattr(pipe, "scheduler", None)
    bars = getattr(scheduler, "alphas_cumprod", None)
    prediction = getattr(scheduler, "config", {}).get("prediction_type", "epsilon")
    if bars is None or prediction not in PREDICTIONS:
        raise UserError(
            f"personalization needs a model with alpha_bar at whole timesteps that predicts "
            f"{', '.join(PREDICTIONS)}; {type(scheduler).__name__} says otherwise."
        )
    bars = torch.as_tensor(bars).double()
    return Schedule(bars.sqrt().float().to(device), (1 - bars).sqrt().float().to(device), prediction)
