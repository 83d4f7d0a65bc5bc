"""Rows of SVDQuant."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import controls
from budgets import at_bytes_of

from ptq4dm import RTNConfig, SVDQuantConfig
from ptq4dm.quantization.recipe import QuantConfig
from rows.row import Row


def svdquant(**options) -> Callable[[], QuantConfig]:
    return partial(SVDQuantConfig, **options)


def low_rank() -> list[Row]:
    """SVDQuant; its shuffled controls are of one turn, rounded to nearest (see `controls.split_anew`)."""
    rows = []
    for activations in ("int8", "int4"):
        name = f"SVDQuant W4A{activations[3:]}"
        make = partial(svdquant, activations=activations)
        plain = {"rank": 0, "smoothing": "none", "rounding": "nearest"}
        turn = {"rounding": "nearest", "refinements": 0}
        fill = at_bytes_of(make(), RTNConfig)
        alone, few = partial(make, evidence="none"), partial(make, evidence="calls")
        rows += [
            Row(f"RTN as {name}", "baseline", make(**plain), name),
            Row(f"RTN in the bytes of {name}", "baseline", make(**plain), name, plan=fill),
            Row(name, "method", make()),
            Row(f"{name}, no branch", "ablation", make(rank=0), name),
            Row(f"{name}, no smoothing", "ablation", make(smoothing="none"), name),
            Row(f"{name}, nearest", "ablation", make(**turn), name),
            Row(f"{name}, nearest, no branch", "ablation", make(rank=0, **turn), name),
            Row(f"{name}, nearest, no smoothing", "ablation", make(smoothing="none", **turn), name),
            Row(f"{name}, nearest, smoothing shuffled", "shuffled", make(**turn), name,
                packed=controls.shuffle_smoothing),
            Row(f"{name}, nearest, branch at random", "shuffled", make(**turn), name, packed=controls.random_branch),
            Row(f"{name}, no data", "method", alone()),
            Row(f"{name}, 4 calls", "method", few(), calls=4),
            Row(f"{name}, 20 calls", "ablation", few(num_calls=20), f"{name}, 4 calls", calls=20),
            Row(f"{name}, 4 calls, no smoothing", "ablation", few(smoothing="none"), f"{name}, 4 calls", calls=4),
            Row(f"{name}, 4 calls, nearest", "ablation", few(**turn), f"{name}, 4 calls", calls=4),
            Row(f"{name}, 4 calls, nearest, smoothing shuffled", "shuffled", few(**turn), f"{name}, 4 calls",
                packed=controls.shuffle_smoothing, calls=4),
            Row(f"{name}, no data, one turn", "ablation", alone(refinements=0), f"{name}, no data"),
            Row(f"{name}, no data, branch at random", "shuffled", alone(refinements=0), f"{name}, no data",
                packed=controls.random_branch),
            Row(f"{name}, no data, no branch", "ablation", alone(rank=0), f"{name}, no data"),
            Row(f"RTN in the bytes of {name}, no data", "baseline", alone(rank=0), f"{name}, no data",
                plan=at_bytes_of(alone(), RTNConfig)),
        ]  # fmt: skip
    return rows
