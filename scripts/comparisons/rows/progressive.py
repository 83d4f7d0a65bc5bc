"""Rows of QoQ."""

from __future__ import annotations

from functools import partial

import controls_steps

from ptq4dm import QoQConfig, RTNConfig
from rows.row import Row, shuffled_rounding


def progressive_bits() -> list[Row]:
    """QoQ: each pass off, every pass off, the same weights on direct scales, and each decision dealt at random."""
    name, every = "QoQ W4A8 g128", {"rotation": "inputs", "smoothing": 0.3, "reorder": True, "clip": "none"}
    off = {"rotation": "none", "smoothing": "none", "reorder": False, "clip": "none"}
    recipe, plain = partial(QoQConfig, **every), partial(QoQConfig, **off)
    direct = partial(RTNConfig, weight_bits=4, group_size=128, affine=True, activations="dynamic")
    passes = {
        "no rotation": {"rotation": "none"}, "values rotated": {"rotation": "values"},
        "no smoothing": {"smoothing": "none"}, "no reorder": {"reorder": False}, "nearest": {"rounding": "nearest"},
        "clip by weights": {"clip": "mse"}, "clip by outputs": {"clip": "output"},
    }  # fmt: skip
    rows = [
        Row(f"{name}, every pass off", "baseline", partial(plain, rounding="nearest"), name),
        Row("RTN W4A8 g128 affine, dynamic", "baseline", direct, name),
        Row(name, "method", recipe),
        *(Row(f"{name}, {label}", "ablation", partial(recipe, **one), name) for label, one in passes.items()),
        Row(f"{name}, rounding alone", "ablation", plain, name),
        Row(f"{name}, rounding alone, direct scales", "ablation", partial(direct, rounding="gptq"), name),
        Row(f"{name}, all layers rotated", "ablation", recipe, name, plan=controls_steps.rotate_all),
        *shuffled_rounding(name, recipe),
        Row(f"{name}, rotations shuffled", "shuffled", recipe, name, plan=controls_steps.shuffle_rotation),
        Row(f"{name}, divisors shuffled", "shuffled", recipe, name, plan=controls_steps.shuffle_divisors),
        Row(f"{name}, order shuffled", "shuffled", recipe, name, plan=controls_steps.shuffle_order),
    ]
    name, rows_of_4 = "QoQ W4A8 channel", partial(QoQConfig, variant="channel", clip="output")
    return [
        *rows,
        Row(f"{name}, every pass off", "baseline", partial(plain, variant="channel", rounding="nearest"), name),
        Row(name, "method", rows_of_4),
        Row(f"{name}, no clip", "ablation", partial(rows_of_4, clip="none"), name),
        *shuffled_rounding(name, rows_of_4),
    ]
