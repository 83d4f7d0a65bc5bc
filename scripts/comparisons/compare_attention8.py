"""What attention in 8 bits costs: pictures beside those of attention as it was, same seeds, same steps.

    python scripts/comparisons/compare_attention8.py [--model dit-cifar10] [--seeds 64] [--steps 10] [--output FILE]

    pictures      PSNR of int8 and e4m3, with its interval
    planted       every key is given a large common mean, which softmax does not see: int8 as it is, and the control
                  with that mean left in the keys
    by timestep   error of attention at each timestep (attention_errors), and PSNR where only that one is in 8 bits

A line of JSON for each row goes to --output as it comes. Attention is computed by the formula in torch on a CPU.
"""

from __future__ import annotations

import argparse
import json
import sys
from contextlib import contextmanager
from pathlib import Path

import torch

import ptq4dm
from ptq4dm.attention.eight_bits import attention_in_8_bits
from ptq4dm.attention.measure import attention_errors
from ptq4dm.evaluation.paired import image_errors, paired_psnr
from ptq4dm.kernels.attention import reference8
from ptq4dm.kernels.formats.attention8 import TYPES, quantize8
from ptq4dm.layers.attention.planned import attention_modules
from ptq4dm.layers.attention.processors import Redirected
from ptq4dm.pipelines.denoiser import denoiser

MEAN = 100.0  # planted into one channel of each head's keys, whose deviations are of the order of 1
BATCH = 16


def pictures(pipe, seeds: int, steps: int) -> torch.Tensor:
    first = range(0, seeds, BATCH)
    parts = [range(start, min(seeds, start + BATCH)) for start in first]
    return torch.cat([ptq4dm.sample(pipe, part, num_inference_steps=steps) for part in parts])


class WithMean(Redirected):
    """The control: 8 bits without the mean of the keys taken out."""

    def _attend(self, function, query, key, value, *args, **kwargs):
        scale = kwargs.get("scale") or query.shape[-1] ** -0.5
        codes = quantize8(query, key, value, scale, TYPES[self.state.kind], centered=False)
        return reference8.attention(codes, query.shape[2], key.shape[2], query.shape[3], query.dtype)


@contextmanager
def planted(model: torch.nn.Module):
    """A common mean in the keys of every attention: to_k's bias is moved in the third channel of each head."""
    biases = [attn.to_k.bias for attn in attention_modules(model).values()]
    widths = [attn.inner_dim // attn.heads for attn in attention_modules(model).values()]
    before = [bias.detach().clone() for bias in biases]
    try:
        with torch.no_grad():
            for bias, width in zip(biases, widths, strict=True):
                bias[2::width] += MEAN
        yield
    finally:
        with torch.no_grad():
            for bias, old in zip(biases, before, strict=True):
                bias.copy_(old)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", default="dit-cifar10")
    parser.add_argument("--seeds", type=int, default=64)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--output", help="file of lines of JSON; by default they are only printed")
    args = parser.parse_args()
    if args.output:
        Path(args.output).write_text("")

    def say(**row):
        print(json.dumps(row), flush=True)
        if args.output:
            with open(args.output, "a") as file:
                print(json.dumps(row), file=file)

    pipe = ptq4dm.load_pipeline(args.model)
    model = denoiser(pipe)
    right = pictures(pipe, args.seeds, args.steps)

    def compared(what: str, images: torch.Tensor, beside: torch.Tensor, **more):
        found = paired_psnr(image_errors(images, beside))
        say(case=what, seeds=len(images), psnr_db=found["psnr_db"], interval=found["psnr_interval"], **more)

    for kind in TYPES:
        with attention_in_8_bits(pipe, kind) as attention:
            compared(kind, pictures(pipe, args.seeds, args.steps), right, kernels=dict(attention.kernels))
    few = min(args.seeds, BATCH)
    with planted(model):
        same = pictures(pipe, few, args.steps)
        compared("planted mean, attention as it was", same, right[:few])
        for control in (False, True):
            with attention_in_8_bits(pipe, "int8") as attention:
                if control:
                    attention.redirected = lambda name, state=attention: WithMean(state, name)
                compared(
                    "planted mean, " + ("left in: control" if control else "int8"),
                    pictures(pipe, few, args.steps),
                    same,
                )
    errors = attention_errors(pipe, lambda: pictures(pipe, few, args.steps))
    print(errors, file=sys.stderr)
    for time in errors.timesteps:
        with attention_in_8_bits(pipe, "int8", timesteps=(time, time + 1)):
            compared(
                "only one timestep",
                pictures(pipe, few, args.steps),
                right[:few],
                timestep=time,
                error=errors.error(None, time),
            )
    for layer in errors.squares:
        with attention_in_8_bits(pipe, "int8", layers=[layer]):
            compared(
                "only one layer", pictures(pipe, few, args.steps), right[:few], layer=layer, error=errors.error(layer)
            )


if __name__ == "__main__":
    main()
