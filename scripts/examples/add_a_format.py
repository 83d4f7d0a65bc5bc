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
from ptq4dm.layers.modules import FORMATS, QuantizedLayer, frozen
from ptq4dm.layers.plan import PLANS
from ptq4dm.quantization.recipe import QuantConfig, register

PLACES = 2 ** torch.arange(8)


@dataclass
class SignPlan:
    format: str = "sign"
    simulated = False  # bits in memory and on disk are those of the format

    def __str__(self) -> str:
        return "W1A16"


class SignLinear(QuantizedLayer, nn.Linear):
    """bias [N] or None; qweight [N, K / 8] uint8, bit k % 8 of byte k // 8; weight_scale [N] float32."""

    kept = ("weight_scale",)  # stays float32 whatever the model is converted to

    def __init__(self, linear: nn.Linear, plan: SignPlan, device=None):
        nn.Module.__init__(self)
        self.in_features, self.out_features, self.plan = linear.in_features, linear.out_features, plan
        rows, bias = self.out_features, linear.bias
        self.bias = None if bias is None else frozen(rows, dtype=bias.dtype, device=device)
        self.qweight = frozen(rows, self.in_features // 8, dtype=torch.uint8, device=device)
        self.weight_scale = frozen(rows, dtype=torch.float32, device=device)

    @torch.no_grad()
    def pack(self, weight, name):
        """Fill codes and scales from a float weight [N, K]."""
        bits = (weight >= 0).view(len(weight), -1, 8)
        packed = (bits * PLACES.to(weight.device)).sum(-1).to(torch.uint8)
        self.qweight = nn.Parameter(packed, requires_grad=False)
        self.weight_scale = nn.Parameter(weight.float().abs().mean(1), requires_grad=False)

    def dequantized_weight(self):
        bits = self.qweight[..., None].bitwise_and(PLACES.to(self.qweight)).ne(0).flatten(1)
        return torch.where(bits, 1.0, -1.0) * self.weight_scale[:, None]

    def kernel_name(self) -> str:
        return "reference"

    def forward(self, x):
        return nn.functional.linear(x, self.dequantized_weight().to(x.dtype), self.bias)

    def _float_layer(self):
        return nn.Linear(self.in_features, self.out_features, bias=False, device="meta")


PLANS["sign"] = SignPlan
FORMATS["sign"] = {nn.Linear: SignLinear}


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
