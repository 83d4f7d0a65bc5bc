"""QoQ: "QServe: W4A8KV4 Quantization and System Co-design for Efficient LLM Serving", Lin et al., arXiv 2405.04532.

1. Transforms that keep the function (section 4.3): inputs of the layers in the middle of a block are smoothed by
   s = max|X|^0.3 / max|W|^0.7, and rotated by a Hadamard matrix; channels are put into the order of their inputs'
   largest values, so that those of a group are alike.
2. Weights in 4 bits (4.1): progressively, 8 bits a row and of those 4 bits in groups of 128 by whole-number steps
   ("group"), or with one scale and one zero point a row ("channel"). Clipping is searched.
3. Codes by Hessian rounding (GPTQ). Inputs in 8 bits, by token, found in each call.

The paper rotates the inputs of blocks through the norm before them, at no cost. That is exact only where nothing
affine lies between norm and layer; diffusion models have adaLN's scale and shift or a GroupNorm there. So here inputs
of layers are turned in every call, where calibration says that this lowers the error: our assumption, and it takes
time. SmoothAttention is the transform "smooth-attention", and serves no weight.

With rounding="nearest" and every pass off this is round to nearest in the same format. Defaults are our measurement
on the embedded models (scripts/comparisons/rows/progressive.py).
"""

from __future__ import annotations

from dataclasses import dataclass

from ..errors import UserError
from ..options import number_or_word, option
from ..quantization.recipe import register
from .choices import ACTIVATIONS, GROUP_SIZES
from .eight_bit import IntegerConfig

VARIANTS = ("group", "channel")
CLIPS = ("none", "mse", "output")
ROTATIONS = (None, "inputs", "values", "none")
GROUP = 128


@register("qoq")
@dataclass(repr=False)
class QoQConfig(IntegerConfig):
    """QoQ. Options of IntegerConfig, and:

    variant: "group" (progressive; group_size 128 where it is left out), or "channel" (one scale and zero point
        a row).
    rounding: "gptq", "nearest" or another.
    rotation: "inputs": of each layer in every call, where that lowers the error of its output (rotate_inputs);
        "values": those of attention, in the weights around them, at no cost; "none". Left out, it is "inputs" where
        that can be: in "group", with "dynamic" activations.
    smoothing: alpha of the transform "smooth", or "none".
    reorder: put channels into groups of their like.
    clip: how far a group or a row reaches: "none" to the largest weight; "mse", the least error of the weight;
        "output", that of the layer's output on calibration inputs.
    """

    variant: str = option("group", "progressive in groups, or a scale and a zero point a row", choices=VARIANTS)
    format: str = option("int8", fixed=True)
    weight_bits: int = option(4, fixed=True)
    average_bits: float | None = option(None, fixed=True)
    importance: str = option("integrated", fixed=True)
    group_size: int | None = option(
        None, "of 4-bit weights: 32, 64 or 128; without, 128, or by --variant one an output", parse=int,
        choices=GROUP_SIZES,
    )  # fmt: skip
    affine: bool = option(False, flag=False)
    weight_grid: str = option("progressive", flag=False)
    rotate_inputs: bool = option(False, flag=False)
    codebook_of: str = option("tensor", fixed=True)
    activations: str = option("dynamic", "input grids from calibration, or dynamic", choices=ACTIVATIONS)
    rounding: str = option("gptq", "how weights are rounded: nearest, or gptq by calibration inputs")
    rotation: str | None = option(
        None, "of layers' inputs in every call, of attention's values, or none", choices=ROTATIONS
    )
    smoothing: float | str = option(0.3, "alpha of the smoothing, or none", parse=number_or_word)
    reorder: bool = option(True, "put channels of like inputs into one group")
    clip: str = option("none", "how far groups of weights reach", choices=CLIPS)

    def settle(self) -> None:
        number = not isinstance(self.smoothing, str) and 0 <= self.smoothing <= 1
        if not number and self.smoothing != "none":
            raise UserError(f"smoothing must be none or a number in [0, 1]; got {self.smoothing!r}.")
        rows = self.variant == "channel"
        if rows and self.group_size is not None:
            raise UserError(
                "variant='channel' has one scale an output; leave group_size out, or take variant='group'."
            )
        grids = ("progressive", "uniform") if rows else ("progressive",)
        wrong = ["weight_grid"] * (self.weight_grid not in grids) + ["affine"] * (self.affine and not rows)
        if wrong:
            raise UserError(f"the grid of QoQ's weights follows from variant; leave {' and '.join(wrong)} out.")
        if self.rotate_inputs and self.rotation not in (None, "inputs"):
            raise UserError("whether inputs are turned follows from rotation; leave rotate_inputs out.")
        turns = not rows and self.activations == "dynamic"
        if self.rotation == "inputs" and not turns:
            raise UserError("rotation='inputs' goes with variant='group' and activations='dynamic'.")
        self.rotation = self.rotation or ("inputs" if turns else "none")
        self.rotate_inputs = self.rotation == "inputs"
        self.weight_grid, self.affine = ("uniform", True) if rows else ("progressive", False)
        self.group_size = None if rows else self.group_size or GROUP

    @property
    def changes(self) -> tuple[str, ...]:
        """QoQ's own transforms, then those that are named beside it."""
        smooth = () if self.smoothing == "none" else (f"smooth:alpha={self.smoothing}",)
        rotate, reorder = ("rotate",) if self.rotation == "values" else (), ("reorder",) if self.reorder else ()
        return (*smooth, *rotate, *reorder, *self.transforms)

    def ranges(self) -> tuple[str, float | None]:
        """The range objective of the weights, which has no parameter."""
        return "max" if self.clip == "none" else self.clip, None
