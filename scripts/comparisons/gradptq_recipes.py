"""The recipes and calibrations of compare_gradptq.py's rows."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from dataclasses import fields
from typing import Any

from trials import Trial

import ptq4dm
from ptq4dm.errors import UserError
from ptq4dm.methods.trained import OF_ROUNDING

APART = 100_000  # trajectories between the calibrations of two seeds; held-out seeds are from a million
OBJECTIVE = "mse"
SHARED = ("weight_bits", "activation_bits", "activations", "first_last", "num_tuples", "weight_grid", "seed")
TUNED = ("optimizer", "variable", "start")


def recipe(trial: Trial, bits: str, base: dict, seed: int, rate: float | None = None) -> ptq4dm.QuantConfig:
    """The recipe of a row. Raises UserError where its weights would be on another grid than those beside it.

    rate: the learning rate of a row whose optimizer, variable or start has one of its own; None where none is known:
        an optimizer then has its default, and the others the base's.
    """
    weight_bits, activation_bits = widths(bits)
    whole = defaults() | base | {"weight_bits": weight_bits, "activation_bits": activation_bits, "seed": seed}
    if trial.rounding:
        options = {name: whole[name] for name in SHARED} | trial.options
        return ptq4dm.PTQ4DMConfig(objective=OBJECTIVE, rounding=trial.rounding, **options)
    learning = {} if rate is None else {"learning_rate": rate}
    if rate is None and "optimizer" in trial.options:
        learning = {"learning_rate": None}
    options = whole | learning | trial.options
    if "rounding" not in options["train"]:  # what is said of it would be refused
        options = {name: value for name, value in options.items() if name not in OF_ROUNDING}
    config = ptq4dm.GradPTQConfig(**options)
    if config.ranges()[0] != OBJECTIVE:
        raise UserError(f"the ranges of GradPTQConfig are those of '{config.ranges()[0]}', not of '{OBJECTIVE}'.")
    return config


def tuned(options: dict) -> tuple:
    """What has a learning rate of its own: the optimizer, the variable and the start of whole options."""
    return tuple(options[name] for name in TUNED)


def best_rates(rows: Iterable[dict], model: str, bits: str) -> dict[tuple, float]:
    """`tuned` -> the learning rate of least mean error over the seeds of stage lr, of one model and width."""
    errors: dict[tuple, dict[float, list[float]]] = {}
    for row in rows:
        if (row["stage"], row["model"], row["bits"]) == ("lr", model, bits):
            own = errors.setdefault(tuned(row["options"]), {})
            own.setdefault(row["options"]["learning_rate"], []).append(row["eps_error"])
    return {key: min(own, key=lambda rate: sum(own[rate]) / len(own[rate])) for key, own in errors.items()}


def untuned(rows: list[dict], rated: list[dict], base: dict, trials: list[Trial]) -> list[str]:
    """A line for each row that has not the learning rate which stage lr finds best for what it trains with."""
    lines = []
    looked_at = {trial.name: base | trial.options for trial in trials if trial.tuned or trial.name == "base"}
    for row in rows:
        if row["row"] in looked_at:
            best = best_rates([*rows, *rated], row["model"], row["bits"]).get(tuned(looked_at[row["row"]]))
            if best is not None and row["learning_rate"] != best:
                what = f"{row['model']} {row['bits']}: {row['row']}, seed {row['seed']}"
                lines.append(f"{what}, has the rate {row['learning_rate']:g}; stage lr is best at {best:g}")
    return lines


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
    """The options of GradPTQConfig where nothing is said, but for inputs, which are dynamic here; the start of 8-bit
    ones is that of all widths."""
    config = ptq4dm.GradPTQConfig()
    options = {item.name: getattr(config, item.name) for item in fields(config) if item.init}
    return options | {"activations": "dynamic", "start": config.origin}


def calibration(law: str, seed: int, args) -> ptq4dm.CalibrationConfig:
    """Of a law of timesteps; "one timestep" is the middle one."""
    chosen = {"collector": "ndtc", "mu": 0.5, "sigma": 0.0} if law == "one timestep" else {"collector": law}
    return ptq4dm.CalibrationConfig(
        num_samples=args.calibration_samples, num_inference_steps=args.sampling_steps, batch_size=args.batch_size,
        seed=seed * APART, **chosen,
    )  # fmt: skip
