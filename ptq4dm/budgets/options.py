"""Options of a choice of formats under budgets; recipes take them in by inheritance."""

from __future__ import annotations

from dataclasses import dataclass

from ..errors import UserError
from ..options import option
from .masking import SCALES

SENSITIVITIES = ("masked", "direct")
INPUTS = ("calibration", "noise")


@dataclass
class BudgetOptions:
    """Budgets, candidates, and how they are measured.

    latency: budget of time, as a share of the model's own step in full precision on this device (float32 on a CPU,
        bfloat16 on a GPU: the dtype that the model has), above 0 and at most 1; None for none.
    bytes: budget of stored tensors, as a share of the model's in 16 bits, likewise.
    candidates: recipes, see candidates.py; full precision is one beside them.
    efficiency: weight of time and bytes in the objective beside the error, each as a share; 0: budgets alone.
    sensitivity: "masked", or "direct": see masking.py. scale: of formats beside masks, "weights" or "outputs".
    inputs: "calibration", or "noise": recorded calls with Gaussian noise in place of the samples.
    num_tuples: of the sensitivities; draws: masks of a layer, each on its part of the tuples; share: of a layer's
        weights that a mask zeroes.
    timed_batch: rows of the call that is timed; rounds: how often. costs: folder of measurements that are used again,
        None for the user's cache, "" for none.
    seed: of masks and noise.
    """

    latency: float | None = option(None, "budget of time, as a share of the full-precision step here", parse=float)
    bytes: float | None = option(0.375, "budget of bytes, as a share of the model's in 16 bits", parse=float)
    candidates: tuple[str, ...] = option((), "recipes, each 'method option=value ...'")
    efficiency: float = option(0.0, "weight of time and bytes beside the error, within the budgets", low=0.0)
    sensitivity: str = option("masked", "masked weights, or one layer quantized", choices=SENSITIVITIES)
    scale: str = option(SCALES[0], "errors of formats beside those of masks: of weights or outputs", choices=SCALES)
    inputs: str = option("calibration", "of the sensitivities: calibration, or noise", choices=INPUTS)
    num_tuples: int = option(32, "calibration tuples of the sensitivities", low=1)
    draws: int = option(4, "masks of a layer", low=1)
    share: float = option(0.1, "of a layer's weights that a mask zeroes", low=0.0, high=1.0)
    timed_batch: int = option(16, "rows of the call that is timed", low=1)
    rounds: int = option(15, "times that each format is timed", low=1)
    costs: str | None = option(None, "folder of measured times; the user's cache otherwise")
    seed: int = option(0, "of masks and noise", flag=False, low=0)

    def check(self) -> None:
        """Raises UserError where an option is none of its choices, or there is nothing to choose by."""
        self.candidates = tuple(self.candidates)
        for name in ("latency", "bytes"):
            value = getattr(self, name)
            if value is not None and not 0 < value <= 1:
                told = f"{name} is a share of the full-precision model, above 0 and at most 1"
                raise UserError(f"{told}; got {value:g}.")
        if not 0 < self.share < 1:
            raise UserError(f"share is a part of a layer's weights, above 0 and below 1; got {self.share:g}.")
        if self.latency is None and self.bytes is None and not self.efficiency:
            raise UserError("give a budget, latency or bytes, or an efficiency: else nothing is worth quantizing.")
