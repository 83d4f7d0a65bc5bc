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
RATES = {
    "adam": (1e-4, 3e-4, 1e-3, 3e-3, 1e-2),
    "adamw": (1e-4, 3e-4, 1e-3, 3e-3, 1e-2),
    "adamax": (3e-4, 1e-3, 3e-3, 1e-2, 3e-2),
    "signsgd": (1e-4, 3e-4, 1e-3, 3e-3),
    "sgd": (1e-2, 1e-1, 3e-1, 1.0, 3.0, 1e1, 1e2),
}
VARIABLE_RATES = {
    "sigmoid": (1e-2, 3e-2, 1e-1, 3e-1, 1.0),
    "straight-through": (3e-4, 1e-3, 3e-3, 1e-2, 3e-2),
    "division": (3e-4, 1e-3, 3e-3, 1e-2),
}
"""The rates that are tried of each optimizer, and of each variable with Adam. They are ours; where the best is the
first or the last, --learning-rates adds."""

FACTORS: dict[str, tuple] = {
    "loss": ("mse", "fisher", "cosine", "relative"),
    "moves": ("up-down", "wide"),
    "variable": ("sigmoid", "straight-through", "division"),
    "optimizer": tuple(RATES),
    "start": ("gptq", "nearest"),
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
    {"moves": "wide", "variable": "sigmoid"},
    {"moves": "wide", "variable": "division"},
    {"start": "nearest", "variable": "sigmoid"},
    {**STATIC, "train": ("rounding",)},
    {**STATIC, "train": ("ranges",)},
    {**STATIC, "train": ("rounding", "ranges")},
)
LAWS = ("uniform", "ndtc", "solver", "one timestep")
STEPS = (50, 100, 200, 500, 1500, 20000)
PREDICTION = (0.0, 0.3, 1.0, 3.0)
FEWER = 64  # tuples that are trained on, of all: what a correction of their distribution could mend
AS_PUBLISHED = {
    "prediction": 1.0, "variable": "sigmoid", "start": "nearest", "augmentation": "qdrop", "learning_rate": 0.1,
}  # fmt: skip
"""AdaRound's variable and QDrop's inputs, as in PD-Quant's code; its rate is for 20000 steps, this one for 300."""
ALONE = 1e4  # a weight of the prediction term beside which the block's own loss is nothing


@dataclass(frozen=True)
class Trial:
    """One model quantized in one way.

    stage: one of STAGES, or "" for what all stages are compared with. name: unique. options: of the recipe.
    rounding: "" for block training; "nearest" or "gptq" for those, on the same grid of weights.
    law: the calibration's timesteps, one of LAWS; "" for the base's. tuned: whether the row takes the learning rate
        that is best in stage lr for its optimizer, variable and start. control: changes the quantized model,
        (model, exact, store, seed).
    """

    stage: str
    name: str
    options: dict[str, Any] = field(default_factory=dict)
    rounding: str = ""
    law: str = ""
    tuned: bool = False
    control: Callable | None = None


def all_trials(base: dict[str, Any], law: str = "solver", rates: tuple[float, ...] = ()) -> list[Trial]:
    """The rows of all stages in the order in which they are printed, for a base with these options.

    base: whole options (gradptq_recipes.defaults). law: its calibration. rates: learning rates of every optimizer
        beside RATES.
    """
    return [*beside_all(), *learning_rates(base, rates), *factors(base), *laws(law), *steps(base), *prediction(base)]


def beside_all() -> list[Trial]:
    """The base, and nearest and Hessian rounding on its grid, also behind quantized blocks, as training is."""
    return [
        Trial("", "base"),
        Trial("", "nearest", rounding="nearest"),
        Trial("", "gptq", rounding="gptq"),
        Trial("", "gptq, after quantized blocks", {"prefix": "quantized"}, rounding="gptq"),
    ]


def learning_rates(base: dict[str, Any], more: tuple[float, ...] = ()) -> list[Trial]:
    """Optimizers of the base's variable, Adam of the other variables, and Adam of two variables from other starts."""
    own = {name: base[name] for name in ("variable", "start")}
    rows = [
        Trial("lr", f"{optimizer}, rate {rate:g}", own | {"optimizer": optimizer, "learning_rate": rate})
        for optimizer, rates in RATES.items()
        for rate in sorted({*rates, *more})
    ]
    rows += [
        Trial("lr", f"{variable}, adam, rate {rate:g}",
              own | {"variable": variable, "optimizer": "adam", "learning_rate": rate})
        for variable, rates in VARIABLE_RATES.items()
        if variable != base["variable"]
        for rate in sorted({*rates, *more})
    ]  # fmt: skip
    return rows + [
        Trial("lr", f"start {start}, {variable}, adam, rate {rate:g}",
              {"variable": variable, "start": start, "optimizer": "adam", "learning_rate": rate})
        for start in FACTORS["start"]
        if start != base["start"]
        for variable in dict.fromkeys((base["variable"], "sigmoid"))
        for rate in sorted({*VARIABLE_RATES[variable], *more})
    ]  # fmt: skip


def factors(base: dict[str, Any]) -> list[Trial]:
    """Every value of every factor that is not the base's, and COMBINED where at least two of its options are not."""
    changes = [{name: value} for name, values in FACTORS.items() for value in values]
    found = [options for options in changes if changed(options, base)]
    found += [left for left in (changed(options, base) for options in COMBINED) if len(left) > 1]
    rows = [Trial("factors", called(options), options, tuned=is_tuned(options)) for options in found]
    for options in ({"weight_grid": "power"}, STATIC):
        if changed(options, base):
            rows += [
                Trial("factors", f"{rounding}, {called(options)}", options, rounding=rounding)
                for rounding in ("nearest", "gptq")
            ]
    alone = {"train": ("rounding",)}
    return [*rows, Trial("factors", f"{called(alone)}, flips at random", alone, control=flip_trained)]


def changed(options: dict[str, Any], base: dict[str, Any]) -> dict[str, Any]:
    """The options that are not the base's. Of `train`, ranges count where inputs are static alone."""
    static = "static" in (options.get("activations"), base["activations"])

    def same(name: str, value: Any) -> bool:
        if name == "train" and not static:
            return {*value} - {"ranges"} == {*base[name]} - {"ranges"}
        return {*value} == {*base[name]} if name == "train" else value == base[name]

    left = {name: value for name, value in options.items() if not same(name, value)}
    if "activations" in left and "train" in options:  # said in the row's name: what static inputs are there for
        left["train"] = options["train"]
    return left


def is_tuned(options: dict[str, Any]) -> bool:
    """Whether a row takes its learning rate from stage lr."""
    return "learning_rate" not in options and bool({"optimizer", "variable", "start"} & {*options})


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


def prediction(base: dict[str, Any]) -> list[Trial]:
    """Weights of the prediction term that are not the base's, the term alone, few tuples with their inputs corrected
    and as they are, what PD-Quant's authors train with, and what of it pays: each of its choices left as in the base.
    """
    weights = [{"prediction": weight} for weight in PREDICTION if weight != base["prediction"]]
    few = {"num_tuples": FEWER, "prediction": 1.0}
    rows = [*weights, few, {**few, "correction": True}, AS_PUBLISHED, {**AS_PUBLISHED, "augmentation": "none"}]
    near = {"prediction": 1.0, "start": "nearest"}
    rows += [near, {**near, "augmentation": "qdrop"}]
    alone = Trial("pdquant", "prediction alone", {"prediction": ALONE})
    return [*(Trial("pdquant", called(options), options) for options in rows), alone]
