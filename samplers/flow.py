"""What DEISScheduler makes of a flow-matching model's config: its noise levels and its table of evaluations."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ..errors import UserError
from .maths.coefficients import multistep_rule, plain_rule
from .maths.evaluations import Evaluation, multistep, runge_kutta
from .maths.flow_grids import FlowLaw, check_levels, even_levels, is_even, shifted
from .maths.grids import POWERS
from .maths.paths import Flow
from .maths.velocities import noise_row, velocity_row


@dataclass(frozen=True)
class Request:
    """What set_timesteps was asked for: a number of steps, or the levels or times themselves; mu, if it was given."""

    steps: int
    sigmas: object = None
    timesteps: object = None
    mu: float | None = None


@dataclass(frozen=True)
class Plan:
    """What a scheduler steps through.

    times: what the model is told at each evaluation. sigmas: noise levels at each evaluation, and at the end of the
    last step, as diffusers' scheduler of such a model has them; None for models with alpha_bar.
    """

    times: list[float]
    evaluations: list[Evaluation]
    sigmas: list[float] | None = None


def flow_law(config) -> FlowLaw:
    return FlowLaw(
        shift=config.shift,
        dynamic=bool(config.use_dynamic_shifting),
        kind=config.time_shift_type,
        terminal=config.shift_terminal,
        trained=config.num_train_timesteps,
    )


def first_levels(config) -> np.ndarray:
    """The levels [N] of a config before steps are chosen, as diffusers' scheduler has them: 1 down to 1 / N."""
    even = np.arange(config.num_train_timesteps, 0, -1) / config.num_train_timesteps
    return even if config.use_dynamic_shifting else shifted(even, config.shift)


def flow_levels(config, grid: str, relaid: str, request: Request) -> tuple[np.ndarray, np.ndarray]:
    """(noise levels, times that the model is told), float64 [n] each: pure noise is 1, and the end, 0, is left out.

    Args:
        grid: timestep_grid; "diffusers" is FlowMatchEulerDiscreteScheduler's. One of POWERS takes the place of even
            levels that a pipeline passes.
        relaid: the grid of EVEN_IN_NOISE on which levels are laid out anew between their ends, or another.

    Raises:
        UserError: levels or times that do not decrease, or are not as many as the other; a missing mu.
    """
    if request.steps < 1:
        raise UserError(f"num_inference_steps must be 1 or more, not {request.steps}.")
    law, most = flow_law(config), float(config.num_train_timesteps)
    times = None if request.timesteps is None else check_levels(request.timesteps, "timesteps", most)
    if request.sigmas is not None:
        even = check_levels(request.sigmas, "sigmas", 1.0)
        if grid in POWERS and is_even(even):
            even = even_levels(grid, len(even))
    elif times is None:
        even = law.of_diffusers(request.steps) if grid == "diffusers" else even_levels(grid, request.steps)
    alone = times is not None and request.sigmas is None
    levels = times / most if alone else law.levels(even, relaid, request.mu)
    if times is not None and len(times) != len(levels):
        raise UserError(f"{len(levels)} sigmas do not go with {len(times)} timesteps; give as many.")
    if config.invert_sigmas:  # as in diffusers, whatever timesteps were given
        times = most * (1 - levels)
    return levels, most * levels if times is None else times


def plan_flow(config, choice, request: Request) -> Plan:
    """The times at which the model is called, and what is done after each call; `choice`: plan.py's."""
    levels, times = flow_levels(config, choice.grid, choice.relaid, request)
    sigmas = np.append(levels, 0.0)
    if config.solver == "rho_rk":
        told = np.append(times, config.num_train_timesteps if config.invert_sigmas else 0.0)

        def time(stages: np.ndarray) -> np.ndarray:
            return np.interp(stages, sigmas[::-1], told[::-1])

        called, evaluations = runge_kutta(config.rk_method, sigmas, velocity_row, time, times, ends_inside=True)
    else:
        if choice.integrand == "velocity":
            rule, row = plain_rule(sigmas, even=config.solver == "ipndm"), velocity_row
        else:
            rule, row = multistep_rule(config.solver, Flow(), levels, 0.0), noise_row
        early = config.solver == "log_rho" and config.lower_order_final and len(levels) < 15
        evaluations, called = multistep(choice.table(rule, early), sigmas, row), times.tolist()
    called_at = np.array(levels_of(evaluations, 0.0))
    return Plan(called, evaluations, (1 - called_at if config.invert_sigmas else called_at).tolist())


def levels_of(evaluations: list[Evaluation], end: float) -> list[float]:
    """sigma at each evaluation, those inside of a Runge-Kutta step too, and where the last one leads.

    Pipelines read `scheduler.sigmas[i]` beside `scheduler.timesteps[i]`.
    """
    return [at.sigma for at in evaluations] + [end]
