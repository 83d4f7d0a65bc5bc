"""The formats of rotated inputs: "int8-rotated", "fp8-rotated", "int4-rotated", "codebook-rotated" and
"progressive-rotated"."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import nn

from ..choices import as_plan_of
from ..codebook import CodebookConv2d, CodebookLinear, CodebookPlan
from ..int4 import Int4Conv2d, Int4Linear
from ..plan import Int4Plan, LayerPlan
from ..progressive import ProgressiveConv2d, ProgressiveLinear, ProgressivePlan
from ..registry import register_format
from ..w8a8 import Fp8Conv2d, Fp8Linear, Int8Conv2d, Int8Linear
from .choices import ROTATED, RotatedChoices
from .layer import RotatedLayer
from .tokens import GroupedTokens, RotatedTokens


@dataclass
class RotatedInt8Plan(RotatedChoices, LayerPlan):
    """LayerPlan of a rotated input, also of fp8."""

    format: str = "int8-rotated"


@dataclass
class RotatedInt4Plan(RotatedChoices, Int4Plan):
    """Int4Plan of a rotated input."""

    format: str = "int4-rotated"


@dataclass
class RotatedCodebookPlan(RotatedChoices, CodebookPlan):
    """CodebookPlan of a rotated input."""

    format: str = "codebook-rotated"


@dataclass
class RotatedProgressivePlan(RotatedChoices, ProgressivePlan):
    """ProgressivePlan of a rotated input: by the kind and group that a transform says, and not by its own choice."""

    format: str = "progressive-rotated"

    def check(self) -> None:
        super().check()
        if self.rotation != 0:
            raise ValueError("an input is rotated once: rotation is 0 beside hadamard_group")


class RotatedInt8Linear(RotatedTokens, Int8Linear):
    """Int8Linear of a rotated input."""


class RotatedInt8Conv2d(RotatedLayer, Int8Conv2d):
    """Int8Conv2d of a rotated input."""


class RotatedFp8Linear(RotatedTokens, Fp8Linear):
    """Fp8Linear of a rotated input."""


class RotatedFp8Conv2d(RotatedLayer, Fp8Conv2d):
    """Fp8Conv2d of a rotated input."""


class RotatedInt4Linear(GroupedTokens, Int4Linear):
    """Int4Linear of a rotated input."""


class RotatedInt4Conv2d(RotatedLayer, Int4Conv2d):
    """Int4Conv2d of a rotated input."""


class RotatedCodebookLinear(RotatedLayer, CodebookLinear):
    """CodebookLinear of a rotated input."""


class RotatedCodebookConv2d(RotatedLayer, CodebookConv2d):
    """CodebookConv2d of a rotated input."""


class RotatedProgressiveLinear(RotatedTokens, ProgressiveLinear):  # type: ignore[override]
    """ProgressiveLinear of a rotated input."""


class RotatedProgressiveConv2d(RotatedLayer, ProgressiveConv2d):
    """ProgressiveConv2d of a rotated input."""


def _as(kind: type, plan: Any, group: int, name: str) -> Any:
    return as_plan_of(kind, plan, format=f"{plan.format}-rotated", hadamard_group=group, hadamard_kind=name)


ROTATED |= {
    LayerPlan: partial(_as, RotatedInt8Plan),
    Int4Plan: partial(_as, RotatedInt4Plan),
    CodebookPlan: partial(_as, RotatedCodebookPlan),
    ProgressivePlan: partial(_as, RotatedProgressivePlan),
}

register_format(
    "int8-rotated", plan=RotatedInt8Plan, layers={nn.Linear: RotatedInt8Linear, nn.Conv2d: RotatedInt8Conv2d}
)
register_format(
    "fp8-rotated",
    plan=RotatedInt8Plan,
    layers={nn.Linear: RotatedFp8Linear, nn.Conv2d: RotatedFp8Conv2d},
    grid="e4m3",
)
register_format(
    "int4-rotated", plan=RotatedInt4Plan, layers={nn.Linear: RotatedInt4Linear, nn.Conv2d: RotatedInt4Conv2d}
)
register_format(
    "codebook-rotated",
    plan=RotatedCodebookPlan,
    layers={nn.Linear: RotatedCodebookLinear, nn.Conv2d: RotatedCodebookConv2d},
    grid="codebook",
)
register_format(
    "progressive-rotated",
    plan=RotatedProgressivePlan,
    layers={nn.Linear: RotatedProgressiveLinear, nn.Conv2d: RotatedProgressiveConv2d},
)
