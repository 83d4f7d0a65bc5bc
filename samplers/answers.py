"""What a model's output says, in what solvers integrate: epsilon, or a flow's velocity."""

from __future__ import annotations

from collections.abc import Callable

import torch

from .choices import FLOW
from .maths.evaluations import Evaluation
from .maths.outputs import noise_in

Threshold = Callable[[torch.Tensor], torch.Tensor]
Said = tuple[tuple[torch.Tensor, ...], torch.Tensor]


def said(
    config, integrand: str, output: torch.Tensor, x: torch.Tensor, at: Evaluation, threshold: Threshold | None
) -> Said:
    """(what the update of this step takes, what later ones may), of an output for x = alpha x_0 + sigma n.

    Epsilon for both; of a flow its velocity, and in noise velocity and epsilon now, epsilon later.

    Args:
        config: a DEISScheduler's.
        threshold: what is done to the predicted x_0, if anything.
    """
    if config.prediction_type == FLOW:
        return _of_a_flow(-output if config.invert_sigmas else output, integrand, x, at, threshold)
    if config.sigma_data is not None:
        x0 = _denoised(config, output, x, at.sigma)
        eps = (x - (threshold(x0) if threshold else x0)) / at.sigma
    else:
        eps = noise_in(output, x, at.alpha, at.sigma, config.prediction_type)
        if threshold:
            x0 = threshold((x - at.sigma * eps) / at.alpha)
            eps = (x - at.alpha * x0) / at.sigma
    return (eps,), eps


def _of_a_flow(
    velocity: torch.Tensor, integrand: str, x: torch.Tensor, at: Evaluation, threshold: Threshold | None
) -> Said:
    if threshold:
        velocity = (x - threshold(x - at.sigma * velocity)) / at.sigma
    if integrand == "velocity":
        return (velocity,), velocity
    eps = noise_in(velocity, x, at.alpha, at.sigma, FLOW)
    return (velocity, eps), eps


def _denoised(config, output: torch.Tensor, x: torch.Tensor, sigma: float) -> torch.Tensor:
    """x_0 by EDM's preconditioning, c_skip x + c_out F (arXiv:2206.00364, eq. 7 and table 1)."""
    data, total = config.sigma_data, sigma**2 + config.sigma_data**2
    c_out = sigma * data / total**0.5
    return data**2 / total * x + (-c_out if config.prediction_type == "v_prediction" else c_out) * output


def input_scale(config, sigma: float) -> float:
    """EDM's c_in: what a sample is multiplied by before the model sees it."""
    return (sigma**2 + config.sigma_data**2) ** -0.5
