"""GradPTQ: "Gradient-Based Post-Training Quantization: Challenging the Status Quo", Yvinec et al., arXiv 2308.07662.

1. Grids of weights and inputs by least squared error, never by the largest value.
2. Block by block in the order of calls, behind what is quantized already, codes of weights (and the ends of static
   input grids) are trained so that the block gives what it gave in full precision: `Learning` has the choices that
   the paper compares: loss, degrees of freedom, variable, optimizer, augmentation of inputs.
3. Codes become whole numbers; nothing of training stays in the model.

The abstract alone was at hand, which names these factors and not what the authors choose: every default here is
our own measurement (scripts/comparisons/compare_gradptq.py), none of them a recommendation of the paper.
"""

from __future__ import annotations

from dataclasses import dataclass

from ..options import option
from ..quantization.recipe import register
from .trained import TrainedConfig


@register("gradptq")
@dataclass(repr=False)
class GradPTQConfig(TrainedConfig):
    """Gradient-based PTQ. Options: IntegerConfig and Learning; those with defaults of their own are below.

    Range objectives of IntegerConfig's methods apply: weights and static inputs get grids of least squared error.
    """

    weight_bits: int = option(4, "8, or 4 stored as such; 2 and 3 in 4 bits", low=2, high=8)
    rounding: str = option("learned", "how weights are rounded: learned, or another for comparison")
    num_tuples: int = option(256, "calibration tuples that training and objectives look at", low=1)
    prefix: str = option("quantized", "what blocks are fed: by quantized blocks before them, or exact")

    def ranges(self) -> tuple[str, float | None]:
        """The range objective and its parameter."""
        return "mse", None
