"""What DEISScheduler works out before the first step: times and evaluations, from its config and what it is asked."""

from __future__ import annotations

import warnings
from dataclasses import replace

import numpy as np
import torch
from diffusers import DEISMultistepScheduler

from ..checks import check
from ..errors import UserError
from .choices import DIFFUSERS, FLOW, Choice
from .flow import Plan, Request, first_levels, levels_of, plan_flow
from .kinds import BLIND
from .maths.coefficients import log_rho_rule, multistep_rule
from .maths.evaluations import multistep, row_in_rho, runge_kutta
from .maths.flow_grids import check_levels
from .maths.grids import between, make_grid
from .maths.paths import EDM, Flow, Schedule
from .maths.schedule import ContinuousVP, DiscreteVP, discrete_betas, ends_in_noise, zero_terminal_snr
from .maths.timesteps import number_of


def noise_schedule(config) -> tuple[Schedule, np.ndarray]:
    """The schedule of a config, and its betas [N] in float64; [0] for flow-matching and EDM models, which have none.

    Raises:
        UserError: an unknown beta_schedule, or epsilon prediction where the last timestep is pure noise.
    """
    if config.prediction_type == FLOW:
        return Flow(), np.zeros(0)
    if config.sigma_data is not None:
        return EDM(config.sigma_min, config.sigma_max), np.zeros(0)
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


def before_any_steps(config, schedule: Schedule) -> tuple[torch.Tensor, torch.Tensor | None]:
    """(`timesteps` [N], `sigmas` [N + 1] if it has them) of a scheduler that has not been told how many steps."""
    number = config.num_train_timesteps
    if isinstance(schedule, Flow):
        levels = first_levels(config)
        times = number * (1 - levels if config.invert_sigmas else levels)
        return torch.from_numpy(times).float(), torch.from_numpy(levels).float()
    if isinstance(schedule, EDM):
        sigmas = between("edm", config.sigma_max, config.sigma_min, number, config.rho)
        return torch.from_numpy(schedule.time(sigmas)).float(), torch.from_numpy(np.append(sigmas, 0.0)).float()
    return torch.arange(number - 1, -1, -1), None


def asked(steps: int | None, sigmas, mu: float | None, timesteps) -> Request:
    """What set_timesteps was given. Raises UserError for a number of steps that it is not, or for none."""
    given = [one for one in (sigmas, timesteps) if one is not None]
    if steps is None and not given:
        raise UserError("set_timesteps needs num_inference_steps, or sigmas or timesteps.")
    try:
        lengths = [len(one) for one in given]
    except TypeError as error:
        raise UserError("sigmas and timesteps must be lists of numbers.") from error
    if steps is not None:
        steps = number_of(steps)
        if any(length != steps for length in lengths):
            raise UserError(
                f"num_inference_steps is {steps}, and {lengths[0]} sigmas or timesteps are given; leave it out."
            )
    if mu is not None:
        check(mu, float, "mu")
    return Request(lengths[0] if lengths else steps, sigmas, timesteps, mu)


def plan(config, choice: Choice, schedule: Schedule, request: Request) -> Plan:
    """The times at which the model is called, decreasing, and what is done after each call.

    As many as there are steps, and for "rho_rk" as many for each of its stages.

    Raises:
        UserError: no steps, or more than the schedule has timesteps; levels or times that do not fit the model.
    """
    if isinstance(schedule, Flow):
        return plan_flow(config, choice, request)
    theirs = choice.grid == DIFFUSERS and request.timesteps is None
    if isinstance(schedule, EDM):
        rho = edm_levels(config, choice.grid, request)
        grid = schedule.time(rho)
    else:
        grid = _times(config, choice, schedule, request)
        rho = schedule.rho(grid)
        if theirs:
            grid, rho = _grid_of_diffusers(config, request.steps) or (grid, rho)
        if config.final_denoise:
            rho[-1] = 0.0
    row = row_in_rho(schedule)
    if config.solver == "rho_rk":
        times, evaluations = runge_kutta(config.rk_method, rho, row, schedule.time, grid)
    else:
        table = _table(config, choice, schedule, grid, rho, theirs)
        times, evaluations = grid[:-1].tolist(), multistep(table, rho, row)
    return Plan(times, evaluations, levels_of(evaluations, float(rho[-1])) if isinstance(schedule, EDM) else None)


def _table(config, choice: Choice, schedule: Schedule, grid: np.ndarray, rho: np.ndarray, theirs: bool) -> list:
    """The weights of a multistep solver: `multistep`'s table."""
    if theirs:
        rule, choice = log_rho_rule(rho), replace(choice, cancels=None)
    else:
        rule = multistep_rule(config.solver, schedule, grid[:-1], float(rho[-1]))
    early = config.solver == "log_rho" and config.lower_order_final and len(grid) <= 15
    return choice.table(rule, early)


def _times(config, choice: Choice, schedule: DiscreteVP | ContinuousVP, request: Request) -> np.ndarray:
    """The grid [n + 1] of a schedule with alpha_bar: by its name, or the times that were given, and its end."""
    if request.sigmas is not None:
        raise UserError("sigmas are of flow-matching and EDM models; give this one timesteps=[...].")
    if request.timesteps is not None:
        times = check_levels(request.timesteps, "timesteps", schedule.first)
        if schedule.discrete and (times != times.round()).any():
            raise UserError("timesteps of this model must be whole numbers.")
        return np.append(times, 0.0 if schedule.discrete else schedule.last)
    grid = config.timestep_spacing if choice.grid == DIFFUSERS else choice.grid
    return make_grid(schedule, grid, request.steps, config.steps_offset)


def edm_levels(config, grid: str, request: Request) -> np.ndarray:
    """Noise levels [n + 1] of an EDM model as diffusers has them: n from sigma_max to sigma_min, and where it ends.

    With final_sigmas_type "sigma_min" the last step leads to sigma_min (where diffusers' stands still).
    """
    if request.timesteps is not None:
        raise UserError("an EDM model's timesteps follow from its noise levels; give sigmas=[...].")
    ends_at_zero = config.final_sigmas_type == "zero"
    if request.sigmas is not None:
        sigmas = check_levels(request.sigmas, "sigmas", config.sigma_max)
        if not ends_at_zero and sigmas[-1] <= config.sigma_min:
            raise UserError(
                f"the last of sigmas must be above sigma_min, {config.sigma_min:g}, where the last step ends."
            )
        return np.append(sigmas, 0.0 if ends_at_zero else config.sigma_min)
    if request.steps < 1:
        raise UserError(f"num_inference_steps must be 1 or more, not {request.steps}.")
    number = request.steps + (not ends_at_zero)
    sigmas = between(grid, config.sigma_max, config.sigma_min, number, config.rho)
    return np.append(sigmas, 0.0) if ends_at_zero else sigmas


def _grid_of_diffusers(config, steps: int) -> tuple[np.ndarray, np.ndarray] | None:
    """(times, rho) [steps + 1] of diffusers' DEIS, which calls the model at whole times beside its sigmas.

    None where it would stand still: between two evaluations, asked for as many steps as there are timesteps, or
    altogether, asked for one step of sigmas that end where they begin; and where its first sigma is infinite.
    """
    names = ("num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "trained_betas", "steps_offset")
    grids = ("timestep_spacing", "use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas")
    theirs = DEISMultistepScheduler(**{name: config[name] for name in names + grids})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it gives tensors to numpy's functions
        theirs.set_timesteps(steps)
    times, sigmas = theirs.timesteps.double().numpy(), theirs.sigmas.double().numpy()
    rho: np.ndarray = np.append(sigmas[:steps], sigmas[-1])  # by rounding, "trailing" can have one too many
    moves = np.isfinite(rho[0]) and rho[0] > rho[-1] and (np.diff(rho[:-1]) < 0).all()
    return (np.append(times[:steps], 0.0), rho) if moves else None
