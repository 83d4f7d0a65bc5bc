"""The formats of split inputs: "int8-split", "int4-split", "progressive-split" and "power-split"."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ...kernels.w8a8 import parts
from ..choices import as_plan_of
from ..int4 import Int4Conv2d, Int4Linear
from ..plan import Int4Plan, LayerPlan
from ..power import PowerConv2d, PowerLinear, PowerPlan
from ..progressive import ProgressiveConv2d, ProgressiveLinear, ProgressivePlan
from ..registry import register_format
from ..w8a8 import Int8Conv2d, Int8Linear
from .choices import SplitChoices
from .layer import SplitLayer


@dataclass
class SplitInt8Plan(SplitChoices, LayerPlan):
    """LayerPlan of an input in parts."""

    format: str = "int8-split"


@dataclass
class SplitInt4Plan(SplitChoices, Int4Plan):
    """Int4Plan of an input in parts. Where groups end at seams, their scales take the factors in, and no code of the
    weight is another for them; a scale for all of a row's inputs serves unlike parts less well."""

    format: str = "int4-split"


@dataclass
class SplitProgressivePlan(SplitChoices, ProgressivePlan):
    """ProgressivePlan of an input in parts."""

    format: str = "progressive-split"


@dataclass
class SplitPowerPlan(SplitChoices, PowerPlan):
    """PowerPlan of an input in parts."""

    format: str = "power-split"


class SplitInt8Linear(SplitLayer, Int8Linear):
    """Int8Linear of an input in parts. On a GPU codes come from one kernel, but from the compiler's own where it
    makes them in the kernel that computes the input."""

    def forward(self, input: Tensor) -> Tensor:
        if parts.takes_parts(input.device) and not torch.compiler.is_compiling():
            return parts.linear(input, *self.of_channels(), *self.operands)
        return super().forward(input)


class SplitInt8Conv2d(SplitLayer, Int8Conv2d):
    """Int8Conv2d of an input in parts. On a GPU codes come from one kernel."""

    def forward(self, input: Tensor) -> Tensor:
        if parts.takes_parts(input.device):
            geometry = (self.stride, self.padding, self.dilation)
            return parts.conv2d(input, *self.of_channels(), *self.operands, *geometry)
        return super().forward(input)


class SplitInt4Linear(SplitLayer, Int4Linear):
    """Int4Linear of an input in parts."""


class SplitInt4Conv2d(SplitLayer, Int4Conv2d):
    """Int4Conv2d of an input in parts."""


class SplitProgressiveLinear(SplitLayer, ProgressiveLinear):
    """ProgressiveLinear of an input in parts."""


class SplitProgressiveConv2d(SplitLayer, ProgressiveConv2d):
    """ProgressiveConv2d of an input in parts."""


class SplitPowerLinear(SplitLayer, PowerLinear):
    """PowerLinear of an input in parts."""


class SplitPowerConv2d(SplitLayer, PowerConv2d):
    """PowerConv2d of an input in parts."""


SPLIT: dict[type, type] = {
    LayerPlan: SplitInt8Plan,
    Int4Plan: SplitInt4Plan,
    ProgressivePlan: SplitProgressivePlan,
    PowerPlan: SplitPowerPlan,
}
"""The class of a plan -> that of the same plan of an input in parts."""


def split_plan(plan: LayerPlan, seams: list[int], factors: list[float], offsets: list[int]) -> LayerPlan:
    """The same choices for an input in parts. Its class must be one of SPLIT."""
    return as_plan_of(SPLIT[type(plan)], plan, seams=seams, input_factors=factors, input_offsets=offsets)


register_format("int8-split", plan=SplitInt8Plan, layers={nn.Linear: SplitInt8Linear, nn.Conv2d: SplitInt8Conv2d})
register_format("int4-split", plan=SplitInt4Plan, layers={nn.Linear: SplitInt4Linear, nn.Conv2d: SplitInt4Conv2d})
register_format(
    "progressive-split",
    plan=SplitProgressivePlan,
    layers={nn.Linear: SplitProgressiveLinear, nn.Conv2d: SplitProgressiveConv2d},
)
register_format(
    "power-split",
    plan=SplitPowerPlan,
    layers={nn.Linear: SplitPowerLinear, nn.Conv2d: SplitPowerConv2d},
    grid="power",
)
