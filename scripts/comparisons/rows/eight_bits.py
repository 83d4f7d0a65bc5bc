"""Rows of 8-bit weights: ranges, and rounding by what layers are fed."""

from __future__ import annotations

from functools import partial

import controls

from ptq4dm import PTQ4DMConfig, RTNConfig
from rows.row import Row, shuffled_rounding


def eight_bits() -> list[Row]:
    rows = [
        Row("full precision", "baseline", None),
        Row("RTN W8A8", "baseline", RTNConfig),
        Row("RTN W8A8, dynamic", "baseline", partial(RTNConfig, activations="dynamic")),
    ]
    for bits in (8, 6):  # at 6, simulated, ranges matter more
        name, of = f"PTQ4DM W{bits}A{bits}", dict(weight_bits=bits, activation_bits=bits)
        recipe = partial(PTQ4DMConfig, **of)
        if bits != 8:
            rows.append(Row(f"RTN W{bits}A{bits}", "baseline", partial(RTNConfig, **of), name))
        shuffle = {"plan": controls.shuffle_input_ranges, "packed": controls.shuffle_weight_ranges}
        rows += [
            Row(name, "method", recipe),
            Row(f"{name}, mse ranges", "ablation", partial(recipe, objective="mse"), name),
            Row(f"{name}, ranges shuffled", "shuffled", recipe, name, **shuffle),
        ]
    return rows


def hessian_rounding() -> list[Row]:
    """Rounding and ranges that look at what layers are fed, in 8 bits."""
    name, gptq = "PTQ4DM W8A8, gptq", partial(PTQ4DMConfig, rounding="gptq")
    return [
        Row(name, "method", gptq),
        Row(f"{name}, max ranges", "ablation", partial(RTNConfig, rounding="gptq"), name),
        *shuffled_rounding(name, gptq),
        Row("PTQ4DM W8A8, output ranges", "ablation", partial(PTQ4DMConfig, objective="output"), "PTQ4DM W8A8"),
    ]
