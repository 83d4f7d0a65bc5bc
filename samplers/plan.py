"""What DEISScheduler works out before the first step: order and grid from its config, then times and evaluations."""

from __future__ import annotations

import warnings
from dataclasses import dataclass

import numpy as np
from diffusers import DEISMultistepScheduler

from ..errors import UserError
from .configs import check_choice
from .kinds import BLIND
from .maths.coefficients import RUNGE_KUTTA, log_rho_weights, multistep_weights, steady
from .maths.evaluations import Evaluation, multistep, runge_kutta
from .maths.grids import EVEN_IN_NOISE, GRIDS, SPACINGS, make_grid
from .maths.schedule import (
    ContinuousVP,
    DiscreteVP,
    Schedule,
    discrete_betas,
    ends_in_noise,
    rho_of,
    zero_terminal_snr,
)

# Order and grid of each solver where the user names none: the best of the README's tables.
DEFAULTS = {
    "t_ab": (3, "quad"),
    "ipndm": (2, "linear"),
    "rho_ab": (2, "quad"),
    "log_rho": (1, "edm"),
    "rho_rk": (None, "edm"),
}
PREDICTIONS = ("epsilon", "v_prediction", "sample")
DIFFUSERS = "diffusers"  # the timestep_grid of diffusers' DEIS, by its own names
# How many times |sum w| the sum of |w| may be in a step, before its degree is lowered. An order that the user names
# is kept up to 24: diffusers' DEIS is below, and what is above multiplies errors of epsilon by hundreds. A solver's
# best order was found on its best grid; on grids that use_karras_sigmas and the like bring in, what is above 3
# (degree 3, and most of degree 2) wins less than errors of 2 % in epsilon take away.
CANCELS, CANCELS_UNASKED = 24.0, 3.0


@dataclass(frozen=True)
class Choice:
    """What a config comes to, where it leaves things open."""

    order: int  # degree of the polynomial; "rho_rk" has its own
    grid: str
    cancels: float  # the bound of `steady`
    of_diffusers: bool  # whether diffusers' samplers have a grid like this by the same config


def choose(config) -> Choice:
    """The choice of order and grid from a DEISScheduler's config.

    Raises:
        UserError: a value that does not exist, or two that exclude each other.
    """
    check_choice("solver", config.solver, tuple(DEFAULTS))
    check_choice("prediction_type", config.prediction_type, PREDICTIONS)
    check_choice("rk_method", config.rk_method, tuple(RUNGE_KUTTA))
    if config.timestep_grid is not None:
        check_choice("timestep_grid", config.timestep_grid, (*GRIDS, DIFFUSERS))
    if config.order is not None:
        check_choice("order", config.order, (0, 1, 2, 3))
    if config.timestep_grid == DIFFUSERS:
        check_choice("timestep_spacing", config.timestep_spacing, SPACINGS)
        if config.solver != "log_rho" or config.beta_schedule == "continuous":
            raise UserError("timestep_grid 'diffusers' goes with solver 'log_rho' on discrete timesteps.")
    named = {
        "edm": config.use_karras_sigmas,
        "log": config.use_exponential_sigmas,
        "beta": config.use_beta_sigmas,
    }
    asked = [grid for grid, flag in named.items() if flag]
    if config.solver == "log_rho" and config.order is None:
        check_choice("solver_order", config.solver_order, (1, 2, 3, 4))
    if len(asked) > 1:
        raise UserError("use_karras_sigmas, use_exponential_sigmas and use_beta_sigmas exclude each other.")
    best_order, best_grid = DEFAULTS[config.solver]
    grid, order = config.timestep_grid or (asked or [best_grid])[0], config.order
    if order is None:
        order = config.solver_order - 1 if config.solver == "log_rho" else best_order or 0
    # ipndm's weights are the same on all grids.
    unasked = config.order is None and config.solver != "ipndm" and grid in EVEN_IN_NOISE and grid != best_grid
    of_diffusers = grid == DIFFUSERS or (bool(asked) and config.timestep_grid is None)
    return Choice(order, grid, CANCELS_UNASKED if unasked else CANCELS, of_diffusers)


def noise_schedule(config) -> tuple[Schedule, np.ndarray]:
    """The schedule of a config, and its betas [N] in float64.

    Raises:
        UserError: an unknown beta_schedule, or epsilon prediction where the last timestep is pure noise.
    """
    if config.beta_schedule == "continuous":
        schedule = ContinuousVP(config.beta_start, config.beta_end)
        a = schedule.alpha_bar(np.linspace(0, 1, config.num_train_timesteps + 1))
        return schedule, 1 - a[1:] / a[:-1]
    names = ("num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "trained_betas")
    betas = discrete_betas(*(config[name] for name in names))
    betas = zero_terminal_snr(betas) if config.rescale_betas_zero_snr else betas
    if config.prediction_type == "epsilon" and ends_in_noise(betas):
        raise UserError(BLIND)
    return DiscreteVP(np.cumprod(1 - betas)), betas


def plan(config, choice: Choice, schedule: Schedule, steps: int) -> tuple[list[float], list[Evaluation]]:
    """The times at which the model is called, decreasing, and what is done after each call.

    steps of them, and for "rho_rk" as many for each of its stages.

    Raises:
        UserError: no steps, or more than the schedule has timesteps.
    """
    theirs = choice.grid == DIFFUSERS
    grid = make_grid(schedule, config.timestep_spacing if theirs else choice.grid, steps, config.steps_offset)
    rho = rho_of(schedule, grid)
    if theirs:
        grid, rho = _grid_of_diffusers(config, steps) or (grid, rho)
    if config.final_denoise:
        rho[-1] = 0.0
    if config.solver == "rho_rk":
        return runge_kutta(config.rk_method, schedule, grid, rho)
    if theirs:
        table = log_rho_weights(rho, choice.order)
    else:
        weights = multistep_weights(config.solver, schedule, grid[:-1], float(rho[-1]), choice.order)
        table = steady(weights, choice.cancels)
    early = config.solver == "log_rho" and config.lower_order_final and len(grid) <= 15
    return grid[:-1].tolist(), multistep(table, rho, early)


def _grid_of_diffusers(config, steps: int) -> tuple[np.ndarray, np.ndarray] | None:
    """(times, rho) [steps + 1] of diffusers' DEIS, which calls the model at whole times beside its sigmas.

    None where it would stand still: between two evaluations, asked for as many steps as there are timesteps, or
    altogether, asked for one step of sigmas that end where they begin.
    """
    names = ("num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "trained_betas", "steps_offset")
    grids = ("timestep_spacing", "use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas")
    theirs = DEISMultistepScheduler(**{name: config[name] for name in names + grids})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it gives tensors to numpy's functions
        theirs.set_timesteps(steps)
    times, sigmas = theirs.timesteps.double().numpy(), theirs.sigmas.double().numpy()
    rho: np.ndarray = np.append(sigmas[:steps], sigmas[-1])  # by rounding, "trailing" can have one too many
    moves = rho[0] > rho[-1] and (np.diff(rho[:-1]) < 0).all()
    return (np.append(times[:steps], 0.0), rho) if moves else None
