"""Noise of a model's own schedule, and what the model is to predict."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import UserError

PREDICTIONS = ("epsilon", "v_prediction", "sample")
DISTILLED = ("LCMScheduler", "TCDScheduler", "FlowMatchLCMScheduler")  # beside our own of one step
FLOW = "flow"
LATENT_TIMES = (0.5, 0.9)  # the paper's, in shares of Stable Diffusion's timesteps
# Of pixels measured on dit-cifar10: between the rows of two classes the loss falls towards the right one from 0.1 to
# 0.5, and from 0.7 on not at all: the same noise hides more of a picture of 32x32 than of one of 512x512.
PIXEL_TIMES = (0.1, 0.5)
LATENT_BETAS = (0.00085, 0.012, 1000)  # of Stable Diffusion, whose timesteps the paper's range is of


@dataclass(frozen=True)
class Schedule:
    """x_t = alpha_t x_0 + sigma_t noise, t a whole number below T.

    alpha, sigma [T] float32. prediction: what models give. told [T]: what they are told of t. usual: the shares of
    the schedule where timesteps begin and end unless somebody says otherwise.
    """

    alpha: Tensor
    sigma: Tensor
    prediction: str
    told: Tensor
    usual: tuple[float, float]

    def noisy(self, x: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """x_t [B, ...] of images x [B, ...]."""
        return self._at(self.alpha, t, x) * x + self._at(self.sigma, t, x) * noise

    def target(self, x: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """What a right prediction is [B, ...]."""
        if self.prediction == "epsilon":
            return noise
        if self.prediction == "sample":
            return x
        if self.prediction == FLOW:
            return noise - x
        return self._at(self.alpha, t, x) * noise - self._at(self.sigma, t, x) * x

    def times(self, low: float | None = None, high: float | None = None) -> tuple[int, int]:
        """The first timestep of a range given as shares of the schedule, and the one after the last; at least one.

        Of a flow model the range has the noise, sigma / alpha, that it has in Stable Diffusion's schedule (our
        assumption: the paper has no flow model).
        """
        number = len(self.alpha)
        low, high = self.usual if low is None or high is None else (low, high)
        if self.prediction == FLOW:
            low, high = (_flow_share(share) for share in (low, high))
        first = min(int(low * number), number - 1)
        return first, max(first + 1, int(high * number))

    @staticmethod
    def _at(values: Tensor, t: Tensor, x: Tensor) -> Tensor:
        return values[t].view(-1, *[1] * (x.ndim - 1))


def _flow_share(share: float) -> float:
    """The share sigma = r / (1 + r) of a flow at which sigma / alpha = r is that of Stable Diffusion at a share."""
    first, last, number = LATENT_BETAS
    if share in (0.0, 1.0):
        return share
    bars = (1 - torch.linspace(first**0.5, last**0.5, number, dtype=torch.float64) ** 2).cumprod(0)
    bar = bars[min(int(share * number), number - 1)]
    ratio = float(((1 - bar) / bar).sqrt())
    return ratio / (1 + ratio)


def schedule_of(pipe, device: torch.device) -> Schedule:
    """The schedule of a pipeline's scheduler: alpha_bar at whole timesteps, or a flow's (FlowMatchEuler or our DEIS).

    Raises UserError for others (EDM and what else has noise levels only), for predictions of something else, and for
    schedulers of distilled models, of one step or few.
    """
    scheduler = getattr(pipe, "scheduler", None)
    config = getattr(scheduler, "config", {})
    bars, prediction = getattr(scheduler, "alphas_cumprod", None), config.get("prediction_type", "epsilon")
    if type(scheduler).__name__ in DISTILLED or "generator_timestep" in config:
        raise UserError(
            f"{type(scheduler).__name__} is of a distilled model, which does not predict noise at all times; take "
            "its teacher, and distil what comes of it."
        )
    ours = type(scheduler).__name__ == "DEISScheduler" and prediction == "flow_prediction"
    if ours or type(scheduler).__name__ == "FlowMatchEulerDiscreteScheduler":
        number = config["num_train_timesteps"]
        sigma = torch.arange(1, number + 1, dtype=torch.float64) / number
        parts, prediction = (1 - sigma, sigma, number * sigma), FLOW
    elif bars is None or prediction not in PREDICTIONS:
        raise UserError(
            f"learning needs a model with alpha_bar at whole timesteps that predicts {', '.join(PREDICTIONS)} "
            f"or a flow of FlowMatchEulerDiscreteScheduler; {type(scheduler).__name__} says otherwise."
        )
    else:
        bars = torch.as_tensor(bars).double()
        parts = (bars.sqrt(), (1 - bars).sqrt(), torch.arange(len(bars)))
    alpha, sigma, told = parts
    told = told if prediction != FLOW else told.float()
    usual = PIXEL_TIMES if getattr(pipe, "vae", None) is None else LATENT_TIMES
    return Schedule(alpha.float().to(device), sigma.float().to(device), prediction, told.to(device), usual)


def even_times(number: int, times: int) -> Tensor:
    """int64 [number], rising: whole times at the middles of `number` equal parts of 0 .. times - 1."""
    return (2 * torch.arange(number) + 1) * times // (2 * number)
