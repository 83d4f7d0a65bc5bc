"""Samplers by name: ours in every setting, and diffusers' own, all built from a pipeline's scheduler config.

    ddim, deis                       ours with their defaults
    t_ab3/quad, ipndm2/edm, ...      DEIS solver and order / timestep grid
    rho_rk-3kutta/edm                Runge-Kutta method / timestep grid
    .../last                         any of these, ending at the grid's last time instead of clean data
    diffusers/dpm++2m, ...           diffusers' own; with -karras where they know that grid
"""

from __future__ import annotations

import re

import diffusers

from ptq4dm.errors import UserError

from .coefficients import RUNGE_KUTTA
from .ddim import DDIMScheduler
from .deis import SOLVERS, DEISScheduler
from .grids import GRIDS

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
PLAIN = {"ddim": DDIMScheduler, "deis": DEISScheduler}
_OURS = re.compile(r"(?:(t_ab|rho_ab|ipndm|log_rho)([0-3])|rho_rk-(\w+))/(\w+)(/last)?")


def make_sampler(name: str, config):
    """The scheduler that a name stands for, on the noise schedule of another scheduler's config.

    Raises:
        UserError: no such sampler.
    """
    if name in PLAIN:
        return PLAIN[name].from_config(config)
    if name.startswith("diffusers/"):
        return _diffusers(name, config)
    match = _OURS.fullmatch(name)
    if not match or match[4] not in GRIDS or (match[3] and match[3] not in RUNGE_KUTTA):
        raise UserError(
            f"unknown sampler '{name}'; choose ddim, deis, SOLVER+ORDER/GRID such as ipndm3/edm (solvers "
            f"{', '.join(SOLVERS[:-1])}; grids {', '.join(GRIDS)}), rho_rk-METHOD/GRID ({', '.join(RUNGE_KUTTA)}), "
            f"or diffusers/ with {', '.join(DIFFUSERS)}."
        )
    solver = {"solver": match[1], "order": int(match[2])} if match[1] else {"solver": "rho_rk", "rk_method": match[3]}
    return DEISScheduler.from_config(config, timestep_grid=match[4], final_denoise=not match[5], **solver)


def _diffusers(name: str, config):
    short = name.removeprefix("diffusers/")
    karras = short.endswith("-karras")
    short = short.removesuffix("-karras")
    if short not in DIFFUSERS or (karras and short == "ddim"):
        raise UserError(f"unknown sampler '{name}'; diffusers/ goes with {', '.join(DIFFUSERS)}.")
    kind, options = DIFFUSERS[short]
    return getattr(diffusers, kind).from_config(config, **options, **({"use_karras_sigmas": True} if karras else {}))
