"""PD-Quant: "Post-Training Quantization based on Prediction Difference Metric", Liu et al., CVPR 2023.

arXiv 2212.07048, the mode that chooses scales and trains nothing.

1. Layers are quantized in the order of their calls; what comes later is in full precision.
2. For each layer, take the input scale under which the model's prediction is off the least: `ranges/prediction.py`.
3. Round weights to nearest.
"""

from __future__ import annotations

from dataclasses import dataclass

from ..quantization.recipe import register
from .eight_bit import IntegerConfig


@register("pdquant")
@dataclass(repr=False)
class PDQuantConfig(IntegerConfig):
    """PD-Quant, scale mode. Options: IntegerConfig; num_tuples are those on which predictions are compared."""

    def ranges(self) -> tuple[str, float | None]:
        """The prediction difference, which has no parameter."""
        return "prediction", None
