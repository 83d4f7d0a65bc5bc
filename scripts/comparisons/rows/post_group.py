"""Rows of MixPE."""

from __future__ import annotations

from functools import partial

import controls_steps

from ptq4dm import MixPEConfig, RTNConfig
from rows.row import Row


def post_group() -> list[Row]:
    """MixPE: 4-bit weights with zero points in groups, under inputs of 8 bits and of 16.

    Its arithmetic rounds nothing, so that its errors are those of the grid: what is dealt at random are zero points.
    """
    rows = []
    for bits in (8, 16):
        name, recipe = f"MixPE W4A{bits} g128", partial(MixPEConfig, activation_bits=bits)
        rows += [
            Row(name, "method", recipe),
            Row(f"{name}, gptq", "ablation", partial(recipe, rounding="gptq"), name),
            Row(f"{name}, zero points shuffled", "shuffled", recipe, name, packed=controls_steps.shuffle_zeros),
        ]
    symmetric = partial(RTNConfig, weight_bits=4, group_size=128, activations="dynamic")
    return [Row("RTN W4A8 g128, dynamic", "baseline", symmetric, "MixPE W4A8 g128"), *rows]
