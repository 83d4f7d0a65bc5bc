"""PTQ4DM: "Post-training Quantization on Diffusion Models", Shang et al., CVPR 2023 (arXiv 2211.15736).

1. Calibrate on what the model sees while it denoises, with timesteps drawn from a chosen law: `collect`.
2. For each layer, find the range whose rounding and clipping error  E |x - Q(x)|^p  is least (section 3.4).
3. Round weights and inputs to nearest in 8 bits; the first and last layers never get fewer than 8.

The paper quantizes layer outputs; here the inputs are, so that the product itself runs on integers. The law of
step 1 is the paper's NDTC when the store was collected with it; whether it beats uniform timesteps is measured in
the README, not assumed.
"""

from __future__ import annotations

from dataclasses import dataclass

from ..errors import UserError
from ..options import option
from ..quantization.recipe import register
from ..ranges.registry import OBJECTIVES, objective_parameter
from .eight_bit import IntegerConfig


@register("ptq4dm")
@dataclass(repr=False)
class PTQ4DMConfig(IntegerConfig):
    """PTQ4DM. Options of IntegerConfig, and:

    objective: "max", "percentile", "mse", "lp", "output" (the error of the layer's output on calibration inputs), for
        inputs and weights; or "prediction" (the error of the model's prediction), for inputs, with "mse" for weights.
    objective_parameter: percent of "percentile" (99.99), exponent of "lp" (2.4); refused with objectives that have
        none.
    """

    objective: str = option("lp", "range objective: max, percentile, mse, lp, output or prediction")
    objective_parameter: float | None = option(
        None, "percent of percentile, exponent of lp", parse=float, finite=False
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if "model" in OBJECTIVES.find(self.objective).needs and self.plan is None and not self._asks_model:
            raise UserError(
                f"objective '{self.objective}' chooses static int8 ranges of inputs, and this recipe has none, so "
                "that it would change nothing; take objective='mse', which weights have with it."
            )
        given, found = self.objective_parameter, objective_parameter(self.objective, self.objective_parameter)
        if given is None:
            return  # and stay so: the default is another one with another objective
        if given != found:
            raise UserError(
                f"objective '{self.objective}' has no parameter, so that objective_parameter={given} would change "
                "nothing; leave it out."
            )
        self.objective_parameter = found

    def ranges(self) -> tuple[str, float | None]:
        """The range objective and its parameter."""
        return self.objective, objective_parameter(self.objective, self.objective_parameter)
