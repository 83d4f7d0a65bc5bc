"""Add a format: a layer that stores codes, a class of choices, and one line that makes the format known.

    python scripts/examples/add_a_format.py

This one, "sign", is weight-only and has one bit for each weight, eight to a byte: w = s_n b_nk with b = +-1, and the
scale s_n = mean_k |w_nk| that makes the squared error least. It computes by the formula in torch, and says so.
"""

import argparse
from dataclasses import dataclass

import tiny
import torch
from torch import nn

import ptq4dm
from ptq4dm.errors import run
from ptq4dm.layers.base import QuantizedLinear, frozen
from ptq4dm.layers.registry import finite, register_format
from ptq4dm.quantization.recipe import QuantConfig, register

PLACES = 2 ** torch.arange(8)


@dataclass
class SignPlan:
    format: str = "sign"
    simulated = False  # bits in memory and on disk are those of the format

    def __str__(self) -> str:
        return "W1A16"


class SignLinear(QuantizedLinear):
    """bias [N] or None; qweight [N, K / 8] uint8, bit k % 8 of byte k // 8; weight_scale [N] float32."""

    kept = ("weight_scale",)  # stays float32 whatever the model is converted to

    def _allocate(self, shape, device):
        rows, columns = shape
        self.qweight = frozen(rows, columns // 8, dtype=torch.uint8, device=device)
        self.weight_scale = frozen(rows, dtype=torch.float32, device=device)

    @torch.no_grad()
    def pack(self, weight, name, evidence=None):
        """Fill codes and scales from a float weight [N, K]."""
        weight = finite(weight, name)
        bits = (weight >= 0).view(len(weight), -1, 8)
        packed = (bits * PLACES.to(weight.device)).sum(-1).to(torch.uint8)
        self.put(qweight=packed, weight_scale=weight.abs().mean(1))

    def dequantized_weight(self):
        bits = self.qweight[..., None].bitwise_and(PLACES.to(self.qweight)).ne(0).flatten(1)
        return torch.where(bits, 1.0, -1.0) * self.weight_scale[:, None]

    def kernel_name(self) -> str:
        return "reference"

    def forward(self, input):
        return nn.functional.linear(input, self.dequantized_weight().to(input.dtype), self.bias)


register_format("sign", plan=SignPlan, layers={nn.Linear: SignLinear})


@register("sign-rtn")
@dataclass(repr=False)
class SignConfig(QuantConfig):
    """Every inner Linear whose inputs come in eights."""

    def resolve(self, model, views, store):
        fits = [v for v in views if type(v.module) is nn.Linear and v.role == "inner" and v.weight.shape[1] % 8 == 0]
        return {view.name: SignPlan() for view in fits}


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="dit-cifar10", help="embedded name, diffusers folder or hub id")
    parser.add_argument("--tiny", action="store_true", help="a random UNet instead")
    args = parser.parse_args(argv)

    pipe = tiny.unet() if args.tiny else ptq4dm.load_pipeline(args.model)
    report = ptq4dm.quantize(pipe, SignConfig())
    print(report.table(worst=5))
    return report


if __name__ == "__main__":
    run(main)
