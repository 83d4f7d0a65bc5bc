"""The recipes and calibrations of compare_gradptq.py's rows."""

from __future__ import annotations

import json
import re
from dataclasses import fields
from typing import Any

from trials import Trial

import ptq4dm
from ptq4dm.errors import UserError

APART = 100_000  # trajectories between the calibrations of two seeds; held-out seeds are from a million
OBJECTIVE = "mse"


def recipe(trial: Trial, bits: str, base: dict, seed: int, rate: float | None) -> ptq4dm.QuantConfig:
    """The recipe of a row. Raises UserError where its weights would be on another grid than those beside it.

    rate: the learning rate of a row with an optimizer of its own; None is that optimizer's default.
    """
    weight_bits, activation_bits = widths(bits)
    shared = {"weight_bits": weight_bits, "activation_bits": activation_bits, "activations": "dynamic", "seed": seed}
    if trial.rounding:
        kept = {
            name: base[name] for name in ("first_last", "num_tuples", "weight_grid", "activations") if name in base
        }
        options = shared | kept | trial.options
        return ptq4dm.PTQ4DMConfig(objective=OBJECTIVE, rounding=trial.rounding, **options)
    learning = {"learning_rate": rate} if trial.optimizer else {}  # the base's is none of another optimizer
    config = ptq4dm.GradPTQConfig(**(shared | base | learning | trial.options))
    if config.ranges()[0] != OBJECTIVE:
        raise UserError(f"the ranges of GradPTQConfig are those of '{config.ranges()[0]}', not of '{OBJECTIVE}'.")
    return config


def widths(bits: str) -> tuple[int, int]:
    """(4, 8) of "W4A8"."""
    found = re.fullmatch(r"W([2-8])A([2-8])", bits)
    if not found:
        raise UserError(f"--bits are like W4A8, with widths from 2 to 8; got '{bits}'.")
    return int(found[1]), int(found[2])


def base_of(words: list[str]) -> dict[str, Any]:
    """The options of "name=value" words, as GradPTQConfig takes them; "a+b" is a tuple in `train`."""
    known = {item.name for item in fields(ptq4dm.GradPTQConfig)}
    base: dict[str, Any] = {}
    for word in words:
        name, equals, text = word.partition("=")
        if not equals or name not in known:
            raise UserError(f"--base takes name=value with an option of GradPTQConfig; got '{word}'.")
        try:
            base[name] = json.loads(text)
        except ValueError:
            base[name] = text
        if name == "train":
            base[name] = tuple(text.split("+"))
    return base


def defaults() -> dict[str, Any]:
    """The options of GradPTQConfig where nothing is said."""
    config = ptq4dm.GradPTQConfig()
    return {item.name: getattr(config, item.name) for item in fields(config)}


def calibration(law: str, seed: int, args) -> ptq4dm.CalibrationConfig:
    """Of a law of timesteps; "one timestep" is the middle one."""
    chosen = {"collector": "ndtc", "mu": 0.5, "sigma": 0.0} if law == "one timestep" else {"collector": law}
    return ptq4dm.CalibrationConfig(
        num_samples=args.calibration_samples, num_inference_steps=args.sampling_steps, batch_size=args.batch_size,
        seed=seed * APART, **chosen,
    )  # fmt: skip
