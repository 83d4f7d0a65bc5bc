"""A row of the table of all methods, and the shuffled controls that several families share."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import controls

from ptq4dm.quantization.recipe import QuantConfig

CALLED = 4
KINDS = ("method", "baseline", "ablation", "shuffled")


@dataclass(frozen=True)
class Row:
    """One model quantized in one way.

    name: unique in the table. kind: one of KINDS. recipe: makes the config; None for full precision.
    of: the method that the row stands beside; empty for methods and for what stands beside all.
    plan: changes the plan, (model, plan, store, seed) -> plan. packed: changes the quantized model, (model, exact,
        store, seed). Shuffled controls are one or both of them (controls.py).
    calls: quantized by the first so many calls of the pipeline, of CALLED images, in the place of the calibration.
    needs: what the recipe waits for, where that is not in the library yet: the row is then left out, and this said.
    """

    name: str
    kind: str
    recipe: Callable[[], QuantConfig] | None
    of: str = ""
    plan: Callable | None = None
    packed: Callable | None = None
    calls: int = 0
    needs: str = ""


def shuffled_rounding(name: str, recipe: Callable[[], QuantConfig]) -> list[Row]:
    """The controls of a rounder: as many codes flipped at random, and its Hessian with columns permuted."""
    return [
        Row(f"{name}, flips at random", "shuffled", recipe, name, plan=controls.shuffle_rounding),
        Row(f"{name}, Hessian shuffled", "shuffled", recipe, name, plan=controls.shuffle_hessian),
    ]
