"""Rows of GradPTQ, whose blocks are trained."""

from __future__ import annotations

from functools import partial

import controls
from controls_trained import flip_trained

from ptq4dm import GradPTQConfig, PTQ4DMConfig
from rows.row import Row


def trained_blocks() -> list[Row]:
    """GradPTQ on uniform grids of least squared error, beside nearest and Hessian rounding on the same grids."""
    widths = {
        "W4A8 per row, dynamic": {"activations": "dynamic"},
        "W3A8 per row, dynamic": {"activations": "dynamic", "weight_bits": 3},
        "W4A8 g64, dynamic": {"activations": "dynamic", "group_size": 64},
        "W8A8, dynamic": {"activations": "dynamic", "weight_bits": 8},
        "W4A8 per row": {"activations": "static"},
    }
    rows = [row for label, options in widths.items() for row in _trained(f"GradPTQ {label}", options)]
    static, mixed = "GradPTQ W4A8 per row", "GradPTQ W4.5A8 rows, dynamic"
    recipe = partial(GradPTQConfig, activations="dynamic", average_bits=4.5)
    return [
        *rows,
        Row(f"{static}, rounding alone", "ablation", partial(GradPTQConfig, train=("rounding",)), static),
        Row(f"{static}, ranges alone", "ablation", partial(GradPTQConfig, train=("ranges",)), static),
        *_trained(mixed, {"activations": "dynamic", "average_bits": 4.5}),
        Row(f"{mixed}, by random", "ablation", partial(recipe, importance="random"), mixed),
        Row(f"{mixed}, shuffled in each layer", "shuffled", recipe, mixed, plan=controls.shuffle_rows),
    ]


def _trained(name: str, options: dict) -> list[Row]:
    """A method that trains blocks, what it trains taken apart, and as many flips elsewhere."""
    recipe = partial(GradPTQConfig, **options)
    shared = {"weight_bits": 4, "num_tuples": 256, "objective": "mse"} | options
    return [
        *(
            Row(f"{rounding} as {name}", "baseline", partial(PTQ4DMConfig, rounding=rounding, **shared), name)
            for rounding in ("nearest", "gptq")
        ),
        Row(name, "method", recipe),
        Row(f"{name}, each layer by itself", "ablation", partial(recipe, unit="layer"), name),
        Row(f"{name}, begun at nearest", "ablation", partial(recipe, start="nearest", learning_rate=1e-2), name),
        Row(f"{name}, flips at random", "shuffled", recipe, name, packed=flip_trained),
    ]
