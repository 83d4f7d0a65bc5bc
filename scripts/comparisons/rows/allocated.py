"""Rows of OHQ: formats chosen within budgets."""

from __future__ import annotations

from functools import partial

import controls

from ptq4dm import OHQConfig
from rows.row import Row


def measured_allocation() -> list[Row]:
    """Formats mixed under a budget of bytes, between 8 bits and 4 in all layers; times do not count there."""
    rows = []
    eight = "rtn activations=dynamic"
    for label, four in {
        "RTN": "rtn weight_bits=4 activations=dynamic group_size=64",
        "gptq": "ptq4dm weight_bits=4 activations=dynamic group_size=64 objective=mse rounding=gptq",
    }.items():
        name = f"OHQ W8A8 and W4A8 g64 {label}, bytes 0.385"
        options = {"candidates": (eight, four), "bytes": 0.385, "rounds": 1, "timed_batch": 1, "costs": ""}
        recipe = partial(OHQConfig, scale="weights" if label == "RTN" else "outputs", **options)
        rows += [
            Row(name, "method", recipe),
            *(
                Row(f"{name}, {word}", "ablation", partial(recipe, **change), name)
                for word, change in {
                    "direct": {"sensitivity": "direct", "scale": OHQConfig.scale}, "noise": {"inputs": "noise"},
                    "errors of outputs": {"scale": "outputs"}, "errors of weights": {"scale": "weights"},
                }.items()
                if change != {"scale": recipe().scale}
            ),
            Row(f"{name}, greedy", "ablation", recipe, name, plan=controls.chosen_by(recipe, controls.greedily)),
            Row(f"{name}, sensitivities permuted", "shuffled", recipe, name,
                plan=controls.chosen_by(recipe, controls.permuted_errors)),
            Row(f"{name}, formats at random", "shuffled", recipe, name,
                plan=controls.chosen_by(recipe, controls.at_random)),
        ]  # fmt: skip
    return rows
