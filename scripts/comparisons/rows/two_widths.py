"""Rows of models whose output rows have two widths: by importance, and by salience over the whole model."""

from __future__ import annotations

from functools import partial

import controls
import controls_steps

from ptq4dm import MixLLMConfig, PTQ4DMConfig
from rows.row import Row


def important_rows() -> list[Row]:
    """Rows of 8 bits among those of 4, by importance, at 4.5 bits a weight: by each score, and by a draw.

    Scores that are dealt out anew over all rows are a draw ("by random"); the shuffled control keeps layers' shares.
    """
    rows = []
    for rounding in ("gptq", "nearest"):
        four = {"weight_bits": 4, "activations": "dynamic", "objective": "mse", "rounding": rounding}
        recipe = partial(PTQ4DMConfig, average_bits=4.5, **four)
        name = f"PTQ4DM W4.5A8 rows, {rounding}"
        rows += [
            Row(f"PTQ4DM W4A8 per row, mse, dynamic, {rounding}", "baseline", partial(PTQ4DMConfig, **four), name),
            Row(name, "method", recipe),
            *(
                Row(f"{name}, by {score}", "ablation", partial(recipe, importance=score), name)
                for score in ("endpoint", "gradient", "magnitude", "random")
            ),
            Row(f"{name}, shuffled in each layer", "shuffled", recipe, name, plan=controls.shuffle_rows),
        ]
    return rows


def salient_rows() -> list[Row]:
    """MixLLM: a tenth of all rows in 8 bits, by two scores; by others and in each layer alike; and none, with smaller
    groups instead, in fewer bytes (64) and in more (32). With Hessian rounding groups are clipped."""
    rows = []
    for rounding, clip in (("gptq", "output"), ("nearest", "none")):
        recipe = partial(MixLLMConfig, rounding=rounding, clip=clip)
        name, none = f"MixLLM W4.4A8 g128, {rounding}", partial(recipe, rows=0.0)
        by = {
            "in each layer": controls_steps.rows_of(controls_steps.salience_of(recipe), 0.1, each=True),
            "by norm": controls_steps.rows_of(controls_steps.row_norms, 0.1),
            **{f"random {i}": controls_steps.rows_of(controls_steps.draw_of(i), 0.1) for i in range(5)},
        }
        rows += [
            Row(name, "method", recipe),
            Row(f"{name}, rows=0", "ablation", none, name),
            Row(f"{name}, by fisher", "ablation", partial(recipe, importance="fisher"), name),
            *(Row(f"{name}, {label}", "ablation", none, name, plan=change) for label, change in by.items()),
            Row(f"{name}, permuted in each layer", "shuffled", recipe, name, plan=controls.shuffle_rows),
            *(Row(f"{name}, rows=0, g{size}", "baseline", partial(none, group_size=size), name) for size in (64, 32)),
        ]
    return rows
