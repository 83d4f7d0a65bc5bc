"""Round to nearest, the baseline: every range reaches to the largest value."""

from __future__ import annotations

from dataclasses import dataclass

from ..quantization.recipe import register
from .eight_bit import IntegerConfig


@register("rtn")
@dataclass(repr=False)
class RTNConfig(IntegerConfig):
    """Round-to-nearest with maximum ranges. Options: IntegerConfig."""
