"""The rows of compare_gradptq.py: block training with one choice changed, in five stages.

    Trial("factors", "loss cosine", {"loss": "cosine"})      one option of GradPTQConfig, all others as in the base

A new value of a factor is one word in FACTORS. What a value is tried with beside (a variable that a wider move needs,
static inputs where ranges are trained) stands in COMBINED, and is said in the row's name.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from controls_trained import flip_trained

STAGES = ("lr", "factors", "calibration", "steps", "pdquant")
OPTIMIZERS = {
    "adam": (3e-4, 1e-3, 3e-3, 1e-2, 3e-2),
    "adamw": (3e-4, 1e-3, 3e-3, 1e-2, 3e-2),
    "adamax": (1e-3, 3e-3, 1e-2, 3e-2, 1e-1),
    "signsgd": (3e-4, 1e-3, 3e-3, 1e-2, 3e-2),
    "sgd": (1e-2, 1e-1, 1.0, 1e1, 1e2),
}
"""The rates that are tried of each. They are ours; where the best is the first or the last, --learning-rates adds."""

FACTORS: dict[str, tuple] = {
    "loss": ("mse", "fisher", "cosine", "relative"),
    "moves": ("up-down", "wide"),
    "variable": ("sigmoid", "straight-through", "division"),
    "optimizer": tuple(OPTIMIZERS),
    "train": (
        ("rounding",), ("scales",), ("biases",), ("rounding", "scales"), ("rounding", "biases"),
        ("rounding", "scales", "biases"),
    ),
    "augmentation": ("qdrop", "noise", "none"),
    "unit": ("block", "layer"),
    "weight_grid": ("uniform", "power"),
}  # fmt: skip
STATIC = {"activations": "static"}
COMBINED: tuple[dict, ...] = (
    {"moves": "wide", "variable": "straight-through"},
    {"moves": "wide", "variable": "division"},
    {**STATIC, "train": ("rounding",)},
    {**STATIC, "train": ("ranges",)},
    {**STATIC, "train": ("rounding", "ranges")},
)
LAWS = ("uniform", "ndtc", "solver", "one timestep")
STEPS = (50, 100, 200, 500, 1500, 20000)
PREDICTION = (0.1, 1.0, 10.0)
ALONE = 1e4  # a weight of the prediction term beside which the block's own loss is nothing


@dataclass(frozen=True)
class Trial:
    """One model quantized in one way.

    stage: one of STAGES, or "" for what all stages are compared with. name: unique. options: of the recipe.
    rounding: "" for block training; "nearest" or "gptq" for those, on the same grid of weights.
    law: the calibration's timesteps, one of LAWS; "" for the base's. optimizer: whose best learning rate is taken
        from the rows of stage lr. control: changes the quantized model, (model, exact, store, seed).
    """

    stage: str
    name: str
    options: dict[str, Any] = field(default_factory=dict)
    rounding: str = ""
    law: str = ""
    optimizer: str = ""
    control: Callable | None = None


def all_trials(base: dict[str, Any], law: str = "solver", rates: tuple[float, ...] = ()) -> list[Trial]:
    """The rows of all stages in the order in which they are printed, for a base with these options.

    law: the base's calibration. rates: learning rates of every optimizer beside OPTIMIZERS.
    """
    return [*beside_all(), *learning_rates(rates), *factors(base), *laws(law), *steps(base), *prediction()]


def beside_all() -> list[Trial]:
    """The base, and nearest and Hessian rounding on its grid."""
    return [Trial("", "base"), Trial("", "nearest", rounding="nearest"), Trial("", "gptq", rounding="gptq")]


def learning_rates(more: tuple[float, ...]) -> list[Trial]:
    return [
        Trial("lr", f"{optimizer}, rate {rate:g}", {"optimizer": optimizer, "learning_rate": rate})
        for optimizer, rates in OPTIMIZERS.items()
        for rate in sorted({*rates, *more})
    ]


def factors(base: dict[str, Any]) -> list[Trial]:
    """Every value of every factor that is not the base's."""
    single = [
        {name: value} for name, values in FACTORS.items() for value in values if value != base.get(name)
    ]  # fmt: skip
    rows = [
        Trial("factors", called(options), options, optimizer=options.get("optimizer", ""))
        for options in (*single, *COMBINED)
    ]
    for options in ({"weight_grid": "power"}, STATIC):
        rows += [
            Trial("factors", f"{rounding}, {called(options)}", options, rounding=rounding)
            for rounding in ("nearest", "gptq")
        ]
    alone = {"train": ("rounding",)}
    return [*rows, Trial("factors", f"{called(alone)}, flips at random", alone, control=flip_trained)]


def called(options: dict[str, Any]) -> str:
    """The name of a row: "loss cosine", "train rounding + scales, activations static"."""
    words = {name: " + ".join(value) if isinstance(value, tuple) else value for name, value in options.items()}
    return ", ".join(f"{name} {value}" for name, value in words.items())


def laws(base: str) -> list[Trial]:
    return [
        Trial("calibration", f"{label}calibration {law}", rounding=rounding, law=law)
        for law in LAWS
        if law != base
        for label, rounding in (("", ""), ("gptq, ", "gptq"))
    ]


def steps(base: dict[str, Any]) -> list[Trial]:
    return [Trial("steps", f"{count} steps", {"steps": count}) for count in STEPS if count != base.get("steps")]


def prediction() -> list[Trial]:
    weights = [{"prediction": weight} for weight in PREDICTION]
    rows = [{"correction": True}, *weights, {"prediction": PREDICTION[1], "correction": True}]
    alone = Trial("pdquant", "prediction alone", {"prediction": ALONE})
    return [*(Trial("pdquant", called(options), options) for options in rows), alone]
