"""Round to nearest, the baseline: every range reaches to the largest value."""

from __future__ import annotations

from dataclasses import dataclass

from ..layers.plan import FLOAT_INPUTS
from ..options import option
from ..pipelines.parts import AUTOENCODER, DENOISER, ENCODER
from ..quantization.recipe import DEFAULTS, register
from .choices import INPUT_WIDTHS
from .eight_bit import IntegerConfig


@register("rtn")
@dataclass(repr=False)
class RTNConfig(IntegerConfig):
    """Round-to-nearest with maximum ranges. Options of IntegerConfig, and:

    activation_bits: also 16: inputs stay floats, and weights alone are quantized, to 4 bits and less, uniform or of a
        codebook. Layers at a denoiser's ends have 8 and 8 bits in either case, unless `first_last` says otherwise.
    """

    activation_bits: int = option(
        8, "8; narrower grids are simulated; or 16: inputs of 4-bit weights as they are", choices=INPUT_WIDTHS
    )


# Recipes that need no calibration. A text is encoded once an image: weights of encoders are memory and little else,
# and their inputs have outliers. A decoder's first and last layers are small, and what they round is in every pixel.
DEFAULTS.add(ENCODER, RTNConfig(weight_bits=4, group_size=64, activation_bits=FLOAT_INPUTS, activations="dynamic"))
DEFAULTS.add(AUTOENCODER, RTNConfig(activations="dynamic", first_last="keep"))
DEFAULTS.add(DENOISER, RTNConfig(activations="dynamic"))
