"""The choices that fix one SVDQuant layer."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from ...annotations import fits
from ...kernels.formats.rotation import check_rotation, rotate
from ...kernels.w4.reference import ACTIVATIONS
from ...layers.choices import check_groups
from ...layers.rotated.choices import ROTATED, rotation_text
from ...rounding.registry import ROUNDERS

SEARCHES = ("finalists", "exhaustive")
EVIDENCE = ("store", "none")
SUBSPACES = ("weight", "inputs")


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
    rotation: inputs that are rotated together in every call, and the weight to match (kernels/formats/rotation.py),
        0 for none; rotation_kind: "regular" or "sylvester". The branch reads the input as it comes.
    subspace: what the branch holds: "weight", the part of the weight that 4 bits cannot hold; or "inputs", the
        directions in which inputs are largest, which are then left out of what is rounded (see svdquant/group.py).
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
    rotation: int = 0
    rotation_kind: str = "regular"
    subspace: str = "weight"
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
        if self.subspace not in SUBSPACES:
            raise ValueError(f"subspace is one of {', '.join(SUBSPACES)}, not '{self.subspace}'")
        if self.projects and (self.evidence == "none" or self.activation == "none" or not self.rank or self.shift):
            raise ValueError("a branch of the inputs' directions has a rank, evidence, rounded inputs and no shift")
        if self.rotation:
            check_rotation(self.rotation, self.rotation_kind)
            if self.activation == "none" or self.shift != 0:
                raise ValueError("inputs that are rotated are rounded, and not lifted")
        if self.shift is not None and self.shift < 0:
            raise ValueError(f"shift is 0 or more, not {self.shift}")
        for name, adapter in self.adapters.items():
            if not fits(adapter, tuple[int, float]) or adapter[0] < 1:
                raise ValueError(f"adapter '{name}' is no rank with a strength")
        ROUNDERS.find(self.rounding)

    def check_layer(self, layer: nn.Module) -> None:
        """Raises ValueError where a float layer is no matrix product over tokens, or has other groups."""
        check_groups(layer, self.group_size)
        check_groups(layer, self.rotation or 1)
        if isinstance(layer, nn.Conv2d):
            plain = (layer.kernel_size, layer.stride, layer.groups) == ((1, 1), (1, 1), 1)
            if not plain or layer.padding not in ((0, 0), "valid", "same"):
                raise ValueError("of convolutions, only those of 1x1 pixels and stride 1 can be of this format")

    @property
    def projects(self) -> bool:
        """Whether what the branch holds is left out of the inputs that are rounded."""
        return self.subspace == "inputs"

    def turned(self, x: Tensor) -> Tensor:
        """x [..., K] rotated, which undoes itself; as it is where the plan rotates nothing."""
        return rotate(x, self.rotation, self.rotation_kind) if self.rotation else x

    def stored(self, down: Tensor, dtype: torch.dtype) -> Tensor:
        """What a down projection [r, K] for rotated inputs is, float32, once it is stored for those as they come."""
        return self.turned(self.turned(down).to(dtype).float())

    def __str__(self) -> str:
        bits = {"int4": "A4", "int8": "A8", "fp8": "A8 (fp8)", "none": "A16"}[self.activation]
        rank = f" r{self.rank}" + (" of inputs" if self.projects else "") if self.rank else ""
        turned = f" {rotation_text(self.rotation, self.rotation_kind)}" if self.rotation else ""
        return f"W4{bits} g{self.group_size}{rank}{turned}" + "".join(f" +{name}" for name in self.adapters)


def _rotated(plan: SVDQPlan, group: int, kind: str) -> SVDQPlan:
    """The plan with a rotated input; a layer that does not round its inputs stays as it is."""
    return plan if plan.activation == "none" else replace(plan, rotation=group, rotation_kind=kind)


ROTATED[SVDQPlan] = _rotated
