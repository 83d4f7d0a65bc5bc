"""PD-Quant: "Post-Training Quantization based on Prediction Difference Metric", Liu et al., CVPR 2023.

arXiv 2212.07048. The prediction of a diffusion model is what it gives: noise, velocity or image.

1. Layers are quantized in the order of their calls; what comes later is in full precision. For each layer, take the
   input scale under which the model's prediction is off the least, through all that runs after it:
   `ranges/prediction.py`.
2. rounding="nearest" stops here. rounding="learned" then trains block by block: the error of the block's outputs,
   and `prediction` times the error that it makes in the model's prediction.
3. `correction`: the calibration inputs of blocks are given the distribution of all recorded ones first.

The paper's classifiers compare predictions by KL divergence of softmax; for a Gaussian step of a sampler that
divergence is the squared error, which stands here. Their released code trains scales and chooses none; step 1 is the
paper's text. Both errors are measured in those of nearest rounding, so that `prediction` means the same everywhere.
"""

from __future__ import annotations

from dataclasses import dataclass

from ..errors import UserError
from ..options import option
from ..quantization.recipe import register
from .trained import TrainedConfig

WEIGHT_GRIDS = ("uniform", "progressive")  # those of "power" have scales of which the prediction knows nothing


@register("pdquant")
@dataclass(repr=False)
class PDQuantConfig(TrainedConfig):
    """PD-Quant. Options: IntegerConfig and, with rounding="learned", Learning.

    num_tuples: on which predictions are compared, and blocks trained. Weights get grids of least squared error, which
    are uniform or progressive. Where inputs have no static grids (activations="dynamic") training alone is left;
    without it such a recipe is refused.
    """

    format: str = option("int8", fixed=True)
    weight_grid: str = option("uniform", "of weights: uniform; or progressive, 4 bits in 8", choices=WEIGHT_GRIDS)
    rotate_inputs: bool = option(False, fixed=True)
    codebook_of: str = option("tensor", fixed=True)
    rounding: str = option("nearest", "nearest, or gptq, chooses scales only; learned trains blocks")
    prefix: str = option("quantized", "what blocks are fed: by quantized blocks before them, or exact")
    prediction: float = option(1.0, "weight of the error in the model's prediction", low=0.0)

    def _check_used(self) -> None:
        super()._check_used()
        if self.rounding != "learned" and not self._asks_model:
            raise UserError(
                "activations='dynamic' leaves no input range for PD-Quant to choose, and "
                f"rounding='{self.rounding}' trains no block; take rounding='learned', or activations='static'."
            )

    def ranges(self) -> tuple[str, float | None]:
        """The prediction difference, which has no parameter."""
        return "prediction", None

    def otherwise(self, loading: bool = False) -> str:
        if not self._asks_model or self.learning() is not None:
            return super().otherwise(loading)
        return "; input ranges are what it chooses, so that activations='dynamic' would leave nothing of it"
