"""Configs of diffusers' schedulers in a DEISScheduler's own words, and what those of a flow or of EDM leave open."""

from __future__ import annotations

from collections.abc import Mapping

from ..checks import whole
from ..errors import UserError
from .choices import DIFFUSERS, FLOW
from .configs import class_of, kind_of
from .kinds import FLOW as FLOW_CLASSES

# Fields of FlowMatchEulerDiscreteScheduler that pipelines read, and of EDMEulerScheduler, with their defaults.
FLOW_DEFAULTS = {
    "shift": 1.0,
    "base_shift": 0.5,
    "max_shift": 1.15,
    "base_image_seq_len": 256,
    "max_image_seq_len": 4096,
}
EDM_DEFAULTS = {"sigma_min": 0.002, "sigma_max": 80.0, "sigma_schedule": "karras", "rho": 7.0}


def in_our_words(config: Mapping, kwargs: dict) -> dict:
    """kwargs of `from_config`, with the fields of ours that a config stands for.

    The config of diffusers' DEIS stands for its solver and, of a model with alpha_bar, its timesteps, too.

    Raises:
        UserError: it speaks of flow matching and of another prediction.
    """
    name, whole_config = class_of(config), {**config, **kwargs}
    kind, _ = kind_of(whole_config, name)
    if name == "DEISMultistepScheduler" and "solver" not in kwargs:
        order = min(whole(whole_config.get("solver_order", 2), "solver_order"), 3) - 1  # it has no solver above 3
        grid = {} if kind == "flow" else {"timestep_grid": DIFFUSERS}
        kwargs = {"solver": "log_rho", "order": order, **grid, **kwargs}
    if kind == "flow":
        kwargs = {**flow_fields(whole_config, name), **kwargs}
    if kind == "edm" and whole_config.get("sigma_data") is None:
        kwargs = {"sigma_data": 0.5, **kwargs}
    return kwargs


def predicted(config: Mapping) -> str:
    """What the model of a scheduler's config predicts, in diffusers' words; of every flow "flow_prediction"."""
    if kind_of(config, class_of(config))[0] == "flow":
        return FLOW
    return config.get("prediction_type") or "epsilon"


def flow_fields(config: Mapping, name: str | None) -> dict:
    """prediction_type and shift of a flow-matching config, whatever class of diffusers wrote it (`name`).

    Raises:
        UserError: it speaks of another prediction, too.
    """
    prediction = FLOW if name in FLOW_CLASSES else config.get("prediction_type")
    if prediction != FLOW:
        raise UserError(
            f"the config has fields of flow matching beside prediction_type {prediction!r}: give prediction_type="
            f"'{FLOW}' if the model predicts velocities, else the config without them (use_flow_sigmas, shift, ...)."
        )
    shift = config.get("shift") if config.get("shift") is not None else config.get("flow_shift")
    return {"prediction_type": FLOW, "shift": 1.0 if shift is None else shift}


def left_open(config: Mapping) -> dict:
    """Fields that a flow-matching or EDM config of ours leaves open, by diffusers' defaults."""
    defaults = FLOW_DEFAULTS if config["prediction_type"] == FLOW else {}
    defaults = EDM_DEFAULTS if config["sigma_data"] is not None else defaults
    return {name: value for name, value in defaults.items() if config[name] is None}
