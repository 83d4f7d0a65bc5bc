"""Add a method: a dataclass that turns layers and calibration into a plan.

    python scripts/examples/add_a_method.py [--target 30]

This one, "thrifty", gives each layer the narrowest weight grid that keeps its weights' signal-to-noise ratio above a
target in decibels. A plan names choices only; packing, kernels, reports, saving and loading are those of the library.
In the library a method is a file like this in ptq4dm/methods/; fields declared with `option(...)` (see
ptq4dm/options.py) become flags of `ptq4dm quantize --method thrifty`.
"""

import argparse
from dataclasses import dataclass

import tiny

import ptq4dm
from ptq4dm.errors import UserError, run
from ptq4dm.kernels.formats.int8 import dequantize_weight, quantize_weight
from ptq4dm.layers.plan import LayerPlan
from ptq4dm.options import option
from ptq4dm.quantization.recipe import QuantConfig, register
from ptq4dm.ranges.weights import weight_scale
from ptq4dm.reconstruction.layer_errors import Ratio


@register("thrifty")
@dataclass(repr=False)
class ThriftyConfig(QuantConfig):
    """target: decibels that each layer's weights must keep; inputs are int8 per token, without calibration."""

    target: float = option(30.0, "decibels that each layer's weights keep")

    def __post_init__(self):
        super().__post_init__()
        if not self.target > 0:
            raise UserError(f"target must be positive; got {self.target}.")

    def resolve(self, model, views, store):
        return {view.name: LayerPlan("int8", weight_bits=self.width(view.weight.float())) for view in views}

    def width(self, weight) -> int:
        for bits in range(2, 8):  # widths below 8 are simulated in int8 containers, and reports say so
            scale = weight_scale(weight, bits, "max", None)
            rounded = dequantize_weight(quantize_weight(weight, scale, bits), scale)
            if Ratio.between(weight, rounded).decibel >= self.target:
                return bits
        return 8


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="unet-cifar10", help="embedded name, diffusers folder or hub id")
    parser.add_argument("--tiny", action="store_true", help="a random UNet instead")
    parser.add_argument("--target", type=float, default=30.0)
    args = parser.parse_args(argv)

    pipe = tiny.unet() if args.tiny else ptq4dm.load_pipeline(args.model)
    report = ptq4dm.quantize(pipe, ThriftyConfig(target=args.target))
    print(report.table(worst=5))
    return report


if __name__ == "__main__":
    run(main)
