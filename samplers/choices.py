"""Order, grid and integrand of a DEISScheduler: from its config, and the best of a solver where that names none."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from ..errors import UserError
from .configs import check_choice
from .maths.coefficients import RUNGE_KUTTA, Rule, steady
from .maths.corrector import corrected
from .maths.flow_grids import FLOW_GRIDS, SHIFTS
from .maths.grids import EVEN_IN_NOISE, GRIDS, SPACINGS

# Order and grid of each solver where the user names none: the best of the README's tables.
DEFAULTS = {
    "t_ab": (3, "quad"),
    "ipndm": (2, "linear"),
    "rho_ab": (2, "quad"),
    "log_rho": (1, "edm"),
    "rho_rk": (None, "edm"),
}
# Of flow-matching models, whose grid is their own: order, and what the polynomials are of.
FLOW_DEFAULTS = {
    "t_ab": (1, "velocity"),
    "ipndm": (1, "velocity"),
    "rho_ab": (1, "velocity"),
    "log_rho": (1, "epsilon"),
    "rho_rk": (None, "velocity"),
}
CORRECTED = ("t_ab",)  # of flows' velocities, unless the config says otherwise
# Of EDM's models, on their own two grids: the best on exact models of Gaussians and mixtures, with errors of 5 % too.
EDM_GRIDS = {"karras": "edm", "exponential": "log"}
EDM_ORDERS = {"t_ab": 2, "ipndm": 2, "rho_ab": 2, "log_rho": 1, "rho_rk": None}
PREDICTIONS = ("epsilon", "v_prediction", "sample")
FLOW = "flow_prediction"
DIFFUSERS = "diffusers"  # the timestep_grid of diffusers' DEIS, by its own names, or of its flow-matching Euler
# How many times |sum w| the sum of |w| may be in a step, before its degree is lowered. An order that the user names
# is kept up to 24: diffusers' DEIS is below, and what is above multiplies errors of epsilon by hundreds. A solver's
# best order was found on its best grid; on grids that use_karras_sigmas and the like bring in, what is above 3
# (degree 3, and most of degree 2) wins less than errors of 2 % in epsilon take away.
CANCELS, CANCELS_UNASKED = 24.0, 3.0
CANCELS_CORRECTED = 8.0
FLAGS = {"edm": "use_karras_sigmas", "log": "use_exponential_sigmas", "beta": "use_beta_sigmas"}
FLOW_FIELDS = ("shift", "shift_terminal", "base_shift", "max_shift", "use_dynamic_shifting", "invert_sigmas")


@dataclass(frozen=True)
class Choice:
    """What a config comes to, where it leaves things open."""

    order: int  # degree of the polynomial; "rho_rk" has its own
    grid: str
    cancels: float | None  # the bound of `steady`, None for none
    of_diffusers: bool  # whether diffusers' samplers have a grid like this by the same config
    integrand: str = "epsilon"
    relaid: str = ""  # of a flow: the grid on which levels are laid out anew after the shift, if any
    corrects: bool = False  # whether each step is done again with the evaluation at its end

    def table(self, rule: Rule, early: bool = False) -> list[list[np.ndarray]]:
        """Weights of each step by the number of earlier evaluations, newest first.

        early: the last steps look back no further than there are steps left.
        """
        table = rule.table(self.order)
        table = table if self.cancels is None else steady(table, self.cancels)
        if early:
            table = [weights[:left] for weights, left in zip(table, range(len(table), 0, -1), strict=True)]
        return corrected(table, rule, CANCELS_CORRECTED) if self.corrects else table


def choose(config) -> Choice:
    """The choice of order and grid from a DEISScheduler's config.

    Raises:
        UserError: a value that does not exist, or two that exclude each other.
    """
    check_choice("solver", config.solver, tuple(DEFAULTS))
    check_choice("prediction_type", config.prediction_type, (*PREDICTIONS, FLOW))
    check_choice("rk_method", config.rk_method, tuple(RUNGE_KUTTA))
    if config.order is not None:
        check_choice("order", config.order, (0, 1, 2, 3))
    if config.solver == "log_rho" and config.order is None:
        check_choice("solver_order", config.solver_order, (1, 2, 3, 4))
    asked = [grid for grid, flag in FLAGS.items() if config[flag]]
    if len(asked) > 1:
        raise UserError("use_karras_sigmas, use_exponential_sigmas and use_beta_sigmas exclude each other.")
    if config.corrector and config.solver == "rho_rk":
        raise UserError("a corrector is of multistep solvers; solver 'rho_rk' has none.")
    if config.prediction_type == FLOW:
        return _flow(config, asked)
    if config.integrand not in (None, "epsilon"):
        raise UserError(f"integrand '{config.integrand}' is of flow-matching models (prediction_type='{FLOW}').")
    if given := [name for name in FLOW_FIELDS if config[name]]:
        raise UserError(f"{given[0]} is of flow-matching models: give prediction_type='{FLOW}' with it.")
    choice = _edm(config, asked) if config.sigma_data is not None else _variance_preserving(config, asked)
    return replace(choice, corrects=bool(config.corrector))


def _variance_preserving(config, asked: list[str]) -> Choice:
    best_order, best_grid = DEFAULTS[config.solver]
    if config.timestep_grid is not None:
        check_choice("timestep_grid", config.timestep_grid, (*GRIDS, DIFFUSERS))
    if config.timestep_grid == DIFFUSERS:
        check_choice("timestep_spacing", config.timestep_spacing, SPACINGS)
        if config.solver != "log_rho" or config.beta_schedule == "continuous":
            raise UserError("timestep_grid 'diffusers' goes with solver 'log_rho' on discrete timesteps.")
    grid = config.timestep_grid or (asked or [best_grid])[0]
    # ipndm's weights are the same on all grids.
    unasked = config.order is None and config.solver != "ipndm" and grid in EVEN_IN_NOISE and grid != best_grid
    of_diffusers = grid == DIFFUSERS or (bool(asked) and config.timestep_grid is None)
    return Choice(_order(config, best_order), grid, CANCELS_UNASKED if unasked else CANCELS, of_diffusers)


def _flow(config, asked: list[str]) -> Choice:
    best_order, integrand = FLOW_DEFAULTS[config.solver]
    if config.timestep_grid is not None:
        check_choice("timestep_grid of a flow-matching model", config.timestep_grid, (*FLOW_GRIDS, DIFFUSERS))
    check_choice("time_shift_type", config.time_shift_type, SHIFTS)
    if config.integrand is not None:
        one_way = {
            "log_rho": ("epsilon",),
            "rho_rk": ("velocity",),
        }  # rho is infinite where a Runge-Kutta step begins
        allowed = one_way.get(config.solver, ("epsilon", "velocity"))
        check_choice(f"integrand of solver '{config.solver}'", config.integrand, allowed)
        integrand = config.integrand
    if config.shift is not None and not config.shift > 0:
        raise UserError(f"shift must be above 0; got {config.shift:g}.")
    if config.shift_terminal is not None and not 0 <= config.shift_terminal < 1:
        raise UserError(f"shift_terminal must be from 0 to below 1; got {config.shift_terminal:g}.")
    grid = config.timestep_grid or (asked or ["linear"])[0]
    relaid = grid if grid in EVEN_IN_NOISE else (asked or [""])[0] if grid == DIFFUSERS else ""
    unasked = config.order is None and config.solver != "ipndm"
    of_diffusers = config.timestep_grid in (None, "linear", DIFFUSERS) or config.invert_sigmas
    order, cancels = _order(config, best_order), CANCELS_UNASKED if unasked else CANCELS
    corrects = config.corrector
    if corrects is None:  # order 0 is Euler's step, or DDIM's
        corrects = order > 0 and integrand == "velocity" and config.solver in CORRECTED
    return Choice(order, grid, cancels, of_diffusers, integrand, relaid, corrects)


def _edm(config, asked: list[str]) -> Choice:
    check_choice("prediction_type of an EDM model", config.prediction_type, ("epsilon", "v_prediction"))
    check_choice("sigma_schedule", config.sigma_schedule, ("karras", "exponential"))
    check_choice("final_sigmas_type", config.final_sigmas_type, ("zero", "sigma_min"))
    if config.timestep_grid is not None:
        check_choice("timestep_grid of an EDM model", config.timestep_grid, EVEN_IN_NOISE)
    if not 0 < config.sigma_min < config.sigma_max:
        raise UserError(
            f"sigma_min must be above 0 and below sigma_max; got {config.sigma_min:g}, {config.sigma_max:g}."
        )
    grid = config.timestep_grid or (asked or [EDM_GRIDS[config.sigma_schedule]])[0]
    unasked = config.order is None and config.solver != "ipndm" and grid not in EDM_GRIDS.values()
    order = _order(config, EDM_ORDERS[config.solver])
    return Choice(order, grid, CANCELS_UNASKED if unasked else CANCELS, of_diffusers=True)


def _order(config, best: int | None) -> int:
    if config.order is not None:
        return config.order
    return config.solver_order - 1 if config.solver == "log_rho" else best or 0
