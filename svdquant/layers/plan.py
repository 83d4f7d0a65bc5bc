"""The choices that fix one SVDQuant layer."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import nn

from ...annotations import fits
from ...kernels.w4.reference import ACTIVATIONS
from ...layers.choices import check_groups
from ...rounding.registry import ROUNDERS

SEARCHES = ("finalists", "exhaustive")
EVIDENCE = ("store", "none")


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
    evidence: "store", what layers are fed in calibration; or "none": from the weight alone (data_free.py), each layer
        by itself, rounded to nearest and not smoothed.
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
    evidence: str = "store"
    adapters: dict[str, list] = field(default_factory=dict)

    simulated = False

    def check(self) -> None:
        """Raises ValueError where a choice is out of its range."""
        if self.rank < 0 or self.refinements < 0:
            raise ValueError(f"rank and refinements are 0 or more, not {self.rank} and {self.refinements}")
        if self.group_size < 2 or self.group_size % 2:
            raise ValueError(f"group_size is even, not {self.group_size}")
        if self.activation not in ACTIVATIONS:
            raise ValueError(f"activation is one of {', '.join(ACTIVATIONS)}, not '{self.activation}'")
        if self.search not in SEARCHES:
            raise ValueError(f"search is one of {', '.join(SEARCHES)}, not '{self.search}'")
        if self.evidence not in EVIDENCE:
            raise ValueError(f"evidence is one of {', '.join(EVIDENCE)}, not '{self.evidence}'")
        if self.evidence == "none" and (self.lender or self.shift or self.alpha or self.beta):
            raise ValueError("without evidence a layer is by itself, and neither smoothed nor lifted")
        if self.shift is not None and self.shift < 0:
            raise ValueError(f"shift is 0 or more, not {self.shift}")
        for name, adapter in self.adapters.items():
            if not fits(adapter, tuple[int, float]) or adapter[0] < 1:
                raise ValueError(f"adapter '{name}' is no rank with a strength")
        ROUNDERS.find(self.rounding)

    def check_layer(self, layer: nn.Module) -> None:
        """Raises ValueError where a float layer is no matrix product over tokens, or has other groups."""
        check_groups(layer, self.group_size)
        if isinstance(layer, nn.Conv2d):
            plain = (layer.kernel_size, layer.stride, layer.groups) == ((1, 1), (1, 1), 1)
            if not plain or layer.padding not in ((0, 0), "valid", "same"):
                raise ValueError("of convolutions, only those of 1x1 pixels and stride 1 can be of this format")

    def __str__(self) -> str:
        bits = {"int4": "A4", "int8": "A8", "fp8": "A8 (fp8)", "none": "A16"}[self.activation]
        rank = f" r{self.rank}" if self.rank else ""
        return f"W4{bits} g{self.group_size}{rank}" + "".join(f" +{name}" for name in self.adapters)
