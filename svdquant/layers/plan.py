"""The choices that fix one SVDQuant layer."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass
class SVDQPlan:
    """Plan by which one Linear or 1x1 Conv2d becomes 4-bit codes with a low-rank branch.

    activation: "int4", "int8", "fp8", or "none" for weight-only layers.
    lender: the first of the layers that share this one's input, if this is not it: they share smoothing and the down
        projection, which the first one holds.
    alpha, beta: exponents of the smoothing divisors; None until the search has found them.
    shift: constant added to the input before it is rounded as unsigned; 0 for signed, None until calibration tells.
    rounding: a name in rounding.ROUNDERS; seed: of the random projections in large decompositions.
    search: how alpha and beta are found: "finalists" or "exhaustive" (see group.search).
    adapters: LoRA adapters that the layer has taken in: name -> [rank, strength]. Nothing that is decided before
        quantizing: a plan with adapters can be loaded, and not followed.
    """

    format: str = "svdq"
    rank: int = 32
    group_size: int = 64
    activation: str = "int4"
    lender: str = ""
    alpha: float | None = None
    beta: float | None = None
    shift: float | None = 0.0
    rounding: str = "gptq"
    refinements: int = 10
    seed: int = 0
    search: str = "finalists"
    adapters: dict[str, list] = field(default_factory=dict)

    simulated = False

    def __str__(self) -> str:
        bits = {"int4": "A4", "int8": "A8", "fp8": "A8 (fp8)", "none": "A16"}[self.activation]
        rank = f" r{self.rank}" if self.rank else ""
        return f"W4{bits} g{self.group_size}{rank}" + "".join(f" +{name}" for name in self.adapters)
