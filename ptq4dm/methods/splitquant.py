"""SplitQuant: "SplitQuant: Layer Splitting for Low-Bit Neural Network Quantization", Song et al., arXiv 2501.12428.

1. The weights of a layer are clustered by value, by k-means with three centres: those of a Linear all together, those
   of a convolution for each output.
2. The layer becomes three whose sum it is, each with the weights of one cluster and zeros elsewhere; each is rounded
   on a grid of its own, narrower than that of all weights, so that few bits have finer steps.
3. Weights alone are quantized; inputs stay as they come. Layers with fewer outputs than clusters are left alone.

form="literal" stores the three: b bits say 3 b. form="codes", ours, stores the cluster of each weight beside its code
in it: b + 1.6 bits, and clusters need not cover zero. Both are below grids of groups at the bytes that they take
(scripts/comparisons, and methods/README.md): the paper compares at the same b. What of it pays in diffusion models is
the split of inputs at concatenations, which every static recipe has as `split_inputs`.

Biases, which the paper splits too, are not rounded here: a sum of three would be the same number.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from ..allocation.roles import allocate, edge_role
from ..calibration.store import CalibrationStore
from ..errors import UserError
from ..layers.plan import LayerPlan
from ..layers.split.values import FORMS, ValueSplitPlan
from ..layers.view import LayerView
from ..options import option
from ..quantization.recipe import QuantConfig, register

EDGES = ("same", "int8", "keep")
GRANULARITIES = ("paper", "tensor", "output")


@register("splitquant")
@dataclass(repr=False)
class SplitQuantConfig(QuantConfig):
    """SplitQuant. Options of QuantConfig, and:

    weight_bits: of a code, 2 to 8.
    clusters: 3, or 2. 1, with form="literal", is the plain grid with a zero point that the paper compares with; in
        form="codes" that grid has no code for zero.
    form: "codes", a cluster and a code for each weight, or "literal", a tensor of codes for each cluster.
    granularity: what is clustered and has grids by itself: "paper", a Linear's whole tensor and each output of a
        convolution; "tensor" or "output" in both.
    first_last: the layers at the model's ends: "same", "int8" (8 and 8 bits, dynamic) or "keep".
    """

    weight_bits: int = option(2, "of a code, 2 to 8", low=2, high=8)
    clusters: int = option(3, "1, 2 or 3; 1 is the plain grid", low=1, high=3)
    form: str = option("codes", "codes, or literal: a tensor for each cluster", choices=FORMS)
    granularity: str = option("paper", "of clusters and grids", choices=GRANULARITIES)
    first_last: str = option("same", "the layers at the model's ends", choices=EDGES)

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, known in (("form", FORMS), ("granularity", GRANULARITIES), ("first_last", EDGES)):
            if getattr(self, name) not in known:
                raise UserError(f"{name} must be one of {', '.join(known)}; got '{getattr(self, name)}'.")

    def resolve(
        self, model: nn.Module, views: list[LayerView], store: CalibrationStore | None
    ) -> dict[str, LayerPlan]:
        """A plan for each layer with as many outputs as there are clusters."""

        def inner(view: LayerView) -> LayerPlan | None:
            if len(view.weight) < self.clusters:
                return None
            scope = self.granularity
            if scope == "paper":
                scope = "output" if isinstance(view.module, nn.Conv2d) else "tensor"
            return ValueSplitPlan(
                weight_bits=self.weight_bits, form=self.form, scope=scope, clusters=self.clusters
            )  # fmt: skip

        edge = {"same": inner, "int8": lambda view: LayerPlan(), "keep": None}[self.first_last]
        return allocate(views, {"edge": edge, "inner": inner}, edge_role)
