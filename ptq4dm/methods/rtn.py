"""Round to nearest, the baseline: every range reaches to the largest value."""

from __future__ import annotations

from dataclasses import dataclass

from ..options import option
from ..quantization.recipe import register
from .choices import INPUT_WIDTHS
from .eight_bit import IntegerConfig


@register("rtn")
@dataclass(repr=False)
class RTNConfig(IntegerConfig):
    """Round-to-nearest with maximum ranges. Options of IntegerConfig, and:

    activation_bits: also 16: inputs stay floats, and weights alone are quantized, to 4 bits and less. Layers at a
        denoiser's ends have 8 and 8 bits in either case, unless `first_last` says otherwise.
    """

    activation_bits: int = option(
        8, "8; narrower grids are simulated; or 16: inputs of 4-bit weights as they are", choices=INPUT_WIDTHS
    )
