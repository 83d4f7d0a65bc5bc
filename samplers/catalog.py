"""Samplers by name: ours in every setting, and diffusers' own, all built from a pipeline's scheduler config.

ddim, deis                                  ours, with their defaults
ipndm, t_ab, rho_ab, log_rho, rho_rk        the solvers of DEIS, each with its best order and grid
ipndm2/edm, t_ab3/quad, rho_rk-3heun/edm    solver and order (or Runge-Kutta method) / timestep grid
.../clean                                   any of the latter, ending at clean data (final_denoise)
.../epsilon, .../velocity                   of flow-matching models: what the solver's polynomials are of (integrand)
.../corrected                               each step done again with the evaluation at its end; without it none is
diffusers/dpm++2m, ...                      diffusers' own, of a flow-matching or EDM model those that know it; with
                                            -karras where they know that grid
a folder                                    a schedule fitted to the model, as `bench samplers --fit` writes it; of
                                            commands `fitted`, that beside the model
"""

from __future__ import annotations

import inspect
import re
from pathlib import Path

import diffusers

from ..errors import UserError
from ..files.outside import naming, read_json
from .choices import DEFAULTS
from .configs import class_of, kind_of, refuse_foreign
from .ddim import DDIMScheduler
from .deis import DEISScheduler
from .fitted import FittedScheduler
from .maths.coefficients import RUNGE_KUTTA
from .maths.grids import GRIDS
from .translation import flow_fields, predicted

DIFFUSERS = {
    "ddim": ("DDIMScheduler", {}),
    "deis": ("DEISMultistepScheduler", {"solver_order": 3}),
    "dpm++2m": ("DPMSolverMultistepScheduler", {"solver_order": 2}),
    "dpm++3m": ("DPMSolverMultistepScheduler", {"solver_order": 3}),
    "unipc": ("UniPCMultistepScheduler", {"solver_order": 2}),
    "unipc3": ("UniPCMultistepScheduler", {"solver_order": 3}),
    "euler": ("EulerDiscreteScheduler", {}),
    "heun": ("HeunDiscreteScheduler", {}),
}
# Of flow-matching and EDM models, diffusers has other classes by these names.
OF_FLOWS = {
    **{name: DIFFUSERS[name] for name in ("deis", "dpm++2m", "dpm++3m", "unipc", "unipc3")},
    "euler": ("FlowMatchEulerDiscreteScheduler", {}),
    "heun": ("FlowMatchHeunDiscreteScheduler", {}),
}
OF_EDM = {
    "euler": ("EDMEulerScheduler", {}),
    "dpm++2m": ("EDMDPMSolverMultistepScheduler", {"solver_order": 2}),
    "dpm++3m": ("EDMDPMSolverMultistepScheduler", {"solver_order": 3}),
}
FITTED = "fitted"  # the sampler, and the folder of the schedule beside a model
_OURS = re.compile(
    r"(?:(t_ab|rho_ab|ipndm|log_rho)([0-3])|rho_rk-(\w+))/(\w+)(/clean)?(?:/(epsilon|velocity))?(/corrected)?"
)


def make_sampler(name: str, config, order: int | None = None, grid: str | None = None):
    """The scheduler that a name stands for, on the noise schedule of another scheduler's config.

    Args:
        order, grid: for the plain names of ours: `DEISScheduler`'s order and timestep_grid; DDIM has a grid only.

    Raises:
        UserError: no such sampler, an order or a grid where there can be none, or the config of a model that the
            sampler cannot sample.
    """
    if "generator_timestep" in config:
        raise UserError(f"the model was distilled to one step and takes no sampler but its own, so not '{name}'.")
    given = {key: value for key, value in (("order", order), ("timestep_grid", grid)) if value is not None}
    if order is not None and name in ("ddim", "rho_rk"):
        raise UserError(f"{name} has no order to choose; deis, t_ab, rho_ab, ipndm and log_rho have orders 0 to 3.")
    if name == "ddim":
        return DDIMScheduler.from_config(config, **given)
    if name == "deis":
        if class_of(config) == "DEISMultistepScheduler":  # "deis" is ours; diffusers' is diffusers/deis
            given["solver"] = "t_ab"
        return DEISScheduler.from_config(config, **given)
    if name in DEFAULTS:
        return DEISScheduler.from_config(config, solver=name, **given)
    check_fixed(name, order, grid)
    if name.startswith("diffusers/"):
        return _diffusers(name, config)
    if Path(name, "scheduler_config.json").is_file():
        return fitted_in(Path(name), config)
    match = _OURS.fullmatch(name)
    if not match or match[4] not in GRIDS or (match[3] and match[3] not in RUNGE_KUTTA):
        raise UserError(_unknown(name))
    solver = {"solver": match[1], "order": int(match[2])} if match[1] else {"solver": "rho_rk", "rk_method": match[3]}
    if match[6]:
        solver["integrand"] = match[6]
    how = {"timestep_grid": match[4], "final_denoise": bool(match[5]), "corrector": bool(match[7])}
    return DEISScheduler.from_config(config, **how, **solver)


def check_fixed(name: str, order: int | None, grid: str | None) -> None:
    """Raises UserError where an order or a grid is asked of a sampler whose name says both."""
    if order is not None or grid is not None:
        raise UserError(
            f"sampler '{name}' fixes its order and grid; give a plain name (deis, t_ab, ddim, ...) or leave them out."
        )


def _unknown(name: str) -> str:
    """What to say of a name that is no sampler."""
    inside = Path(name) / FITTED
    if (inside / "scheduler_config.json").is_file():
        return f"'{name}' is no sampler; did you mean {inside}?"
    if name == FITTED:
        return "fitted stands for the schedule beside the --model of a command; give the schedule's folder here."
    return (
        f"unknown sampler '{name}'; choose ddim, deis, {', '.join(DEFAULTS)}, one with order and grid such as "
        f"t_ab3/quad or rho_rk-3heun/edm, diffusers/ with {', '.join(DIFFUSERS)}, fitted for the schedule beside a "
        "command's --model, or a folder with the scheduler_config.json of a fitted schedule."
    )


def fitted_in(folder: Path, config) -> FittedScheduler:
    """The fitted schedule that a folder holds.

    Raises:
        UserError: another scheduler's config, a damaged one, or one fitted to a model that predicts something else
            than that of `config`.
    """
    file = folder / "scheduler_config.json"
    found = read_json(file)
    if not isinstance(found, dict) or found.get("_class_name") != "FittedScheduler":
        raise UserError(f"{file} is not a fitted schedule; fit one by ptq4dm.samplers.fit(pipe).")
    with naming(file):
        scheduler = FittedScheduler.from_config(found)
    model = {"prediction_type": predicted(config), "num_train_timesteps": config.get("num_train_timesteps")}
    for field, its in model.items():
        mine = scheduler.config[field]
        if its is not None and its != mine:
            raise UserError(f"{folder} was fitted to a model of {field} {mine}, not {its}; fit one to this model.")
    return scheduler


def _diffusers(name: str, config):
    short = name.removeprefix("diffusers/")
    karras = short.endswith("-karras")
    short = short.removesuffix("-karras")
    if short not in DIFFUSERS or (karras and short == "ddim"):
        raise UserError(f"unknown sampler '{name}'; diffusers/ goes with {', '.join(DIFFUSERS)}.")
    written = class_of(config)
    model, _ = kind_of(config, written)
    known = {"flow": OF_FLOWS, "edm": OF_EDM}.get(model or "", DIFFUSERS)
    if short not in known:
        refuse_foreign(config, f"diffusers' {DIFFUSERS[short][0]}", written)
    kind, options = known[short]
    refuse_foreign(config, f"diffusers' {kind}", written, frozenset({"flow", "edm"}))
    parameters = inspect.signature(getattr(diffusers, kind).__init__).parameters
    if model == "flow":
        fields = flow_fields(config, written)
        flows = {"use_flow_sigmas": True, "flow_shift": fields["shift"], "use_karras_sigmas": False}
        options = {**options, **fields, **{field: value for field, value in flows.items() if field in parameters}}
        options = {field: value for field, value in options.items() if field in parameters}
    if karras and ("use_karras_sigmas" not in parameters or model == "edm" or "use_flow_sigmas" in options):
        raise UserError(f"'{name}' does not know Karras' levels for this model; leave -karras out.")
    if karras:
        options = {**options, "use_karras_sigmas": True}
    return getattr(diffusers, kind).from_config(config, **options)
