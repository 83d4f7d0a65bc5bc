"""MixPE: "MixPE: Quantization and Hardware Co-design for Efficient LLM Inference", Zhang et al., arXiv 2411.16158.

1. Weights in 4 bits with zero points, in groups of 128; inputs in 8 bits by token, or in 16 bits as they come.
2. Scales after the sums:  y[m, n] = s_x[m] sum_g s[n, g] sum_{k in g} q_x[m, k] (q[n, k] - z[n, g]):  whole numbers
   within a group, and one multiplication for each output and group instead of one for each weight. On a GPU Linear
   layers compute so where inputs are found in each call. Convolutions fold the scales into weights of 8 bits, which
   rounds these (kernels/w4/int4_codes.py); reports name the kernel of each layer.
3. The product of a weight and an input by shifts and additions: hardware that is not built. Its model is
   ptq4dm.hardware's; nothing here is faster for it.

Step 1 is round to nearest on that grid and no more: what is MixPE's own is the arithmetic.
"""

from __future__ import annotations

from dataclasses import dataclass

from ..layers.plan import FLOAT_INPUTS
from ..options import option
from ..quantization.recipe import register
from .choices import ACTIVATIONS, GROUP_SIZES
from .eight_bit import IntegerConfig

WIDTHS = (8, FLOAT_INPUTS)


@register("mixpe")
@dataclass(repr=False)
class MixPEConfig(IntegerConfig):
    """MixPE. Options of IntegerConfig, with defaults of its own, and:

    activation_bits: 8, or 16: inputs stay floats, and weights alone are quantized. Layers at the model's ends have 8
        and 8 bits in either case, unless `first_last` says otherwise.
    """

    format: str = option("int8", fixed=True)
    weight_bits: int = option(4, fixed=True)
    activation_bits: int = option(8, "8, or 16: inputs as they are", choices=WIDTHS)
    group_size: int | None = option(128, "of 4-bit weights: 32, 64 or 128", parse=int, choices=GROUP_SIZES[1:])
    affine: bool = option(True, fixed=True)
    weight_grid: str = option("uniform", fixed=True)
    rotate_inputs: bool = option(False, fixed=True)
    codebook_of: str = option("tensor", fixed=True)
    average_bits: float | None = option(None, fixed=True)
    importance: str = option("integrated", fixed=True)
    activations: str = option("dynamic", "input grids from calibration, or dynamic", choices=ACTIVATIONS)
