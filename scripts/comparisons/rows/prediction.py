"""Rows of PD-Quant: ranges and training by the model's own prediction."""

from __future__ import annotations

from functools import partial

import controls
from controls_trained import flip_trained

from ptq4dm import PDQuantConfig, PTQ4DMConfig
from rows.row import Row


def prediction_difference() -> list[Row]:
    """PD-Quant's choice of input ranges. Rows of one width share their weight codes; scales of inputs differ."""
    rows = []
    for weight_bits, activation_bits in ((4, 4), (8, 4), (8, 8), (2, 4)):
        of = {"weight_bits": weight_bits, "activation_bits": activation_bits}
        name, mse = f"PD-Quant W{weight_bits}A{activation_bits}", partial(PTQ4DMConfig, objective="mse", **of)
        rows += [
            Row(name, "method", partial(PDQuantConfig, **of)),
            Row(f"{name}, mse ranges", "ablation", mse, name),
        ]
        others = {f"{objective} ranges": objective for objective in ("lp", "max", "output")}
        for label, objective in {**others, "of other tuples": "prediction, of other tuples"}.items():
            ranges = controls.input_ranges_of(partial(PTQ4DMConfig, objective=objective, **of))
            kind = "ablation" if label in others else "shuffled"
            rows.append(Row(f"{name}, {label}", kind, mse, name, plan=ranges))
    return rows


def trained_prediction() -> list[Row]:
    """PD-Quant's training of blocks, with and without the error in the model's prediction."""
    rows = []
    for bits in (4, 2):
        name = f"PD-Quant W{bits}A4, trained"
        recipe = partial(PDQuantConfig, weight_bits=bits, activation_bits=4, rounding="learned", num_tuples=128)
        rows += [
            Row(name, "method", recipe),
            Row(f"{name}, without prediction", "ablation", partial(recipe, prediction=0.0), name),
            Row(f"{name}, flips at random", "shuffled", recipe, name, packed=flip_trained),
        ]
    return rows
