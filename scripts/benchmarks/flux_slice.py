"""How long a method takes on a FLUX-sized transformer (12 B parameters), and how many bytes it leaves.

    python scripts/benchmarks/flux_slice.py --output out/flux-slice.json  # one GPU
    python scripts/benchmarks/flux_slice.py --method gradptq --num-tuples 8 --steps 100

Slices of the model with random weights, of (1, 1), (2, 1) and (1, 2) double and single blocks, are quantized
with default settings on random tuples of 4096 image and 512 text tokens. Their differences are a block's time;
19 double and 38 single blocks make the whole. A first slice warms the GPU up and is not counted. Calls go on from
block to block, so that the inputs of a block cost it alone. Blocks are alike, so bytes are counted from the tensors
of the slices in the same way, against bfloat16.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import torch
from diffusers import FluxTransformer2DModel
from torch import nn

import ptq4dm
from ptq4dm.calibration.calls import calls_of_rows
from ptq4dm.calibration.record import answers
from ptq4dm.calibration.store import CalibrationStore, fingerprint
from ptq4dm.errors import run
from ptq4dm.files.atomic import replacing
from ptq4dm.layers.sizes import stored_bytes

BLOCKS = (19, 38)  # of FLUX.1


def build(blocks: tuple[int, int], args) -> nn.Module:
    """Random weights, some input channels of each layer larger than others, as trained ones have them."""
    torch.manual_seed(0)
    with torch.device("meta"):
        double, single = blocks
        model = FluxTransformer2DModel(
            num_layers=double, num_single_layers=single, num_attention_heads=args.heads, guidance_embeds=True
        )
    model = model.to(torch.bfloat16).to_empty(device=args.device).eval().requires_grad_(False)
    for name, parameter in model.named_parameters():
        if parameter.ndim == 2:
            columns = torch.randn(parameter.shape[1], device=args.device).exp()
            parameter.copy_(torch.randn_like(parameter) * columns * (0.3 / parameter.shape[1] ** 0.5))
        else:
            parameter.fill_(1.0 if name.endswith("weight") else 0.0)
    return model


def tuples(model: nn.Module, args) -> CalibrationStore:
    generator = torch.Generator().manual_seed(0)

    def noise(*size: int) -> torch.Tensor:
        return torch.randn(args.num_tuples, *size, generator=generator).to(torch.bfloat16)

    side = int(args.tokens**0.5)
    place = torch.arange(args.tokens)
    calls = calls_of_rows(
        noise(args.tokens, 64),
        timestep=torch.linspace(1, 0.02, args.num_tuples),
        encoder_hidden_states=noise(args.text_tokens, 4096),
        pooled_projections=noise(768),
        guidance=torch.full((args.num_tuples,), 3.5),
        shared={
            "img_ids": torch.stack([0 * place, place // side, place % side], 1).float(),
            "txt_ids": torch.zeros(args.text_tokens, 3),
            "return_dict": False,
        },
    )
    return CalibrationStore({}, fingerprint(model), 1000, calls)


def measure(blocks: tuple[int, int], args) -> dict:
    model = build(blocks, args)
    store = tuples(model, args)
    rows = torch.arange(args.num_tuples).split(8)
    config = recipe(args)
    answers(model, store.calls[rows[0]])
    start = clock(args)
    for part in rows:
        answers(model, store.calls[part])
    forward = clock(args) - start
    before = stored_bytes(model)
    if args.device.startswith("cuda"):
        torch.cuda.reset_peak_memory_stats()
    start = clock(args)
    ptq4dm.quantize(model, config, store if args.method == "svdquant" else store.calls)  # calls are measured first
    peak = torch.cuda.max_memory_allocated() if args.device.startswith("cuda") else None
    return {
        "blocks": blocks,
        "forward_seconds": forward,
        "quantize_seconds": clock(args) - start,
        "bytes_bfloat16": before,
        "bytes": stored_bytes(model),
        "peak_bytes": peak,
    }


def recipe(args) -> ptq4dm.QuantConfig:
    if args.method == "svdquant":
        return ptq4dm.SVDQuantConfig(num_tuples=args.num_tuples)
    training = {"steps": args.steps, "step_tuples": 1}
    return ptq4dm.GradPTQConfig(activations="dynamic", num_tuples=args.num_tuples, **training)


def clock(args) -> float:
    if args.device.startswith("cuda"):
        torch.cuda.synchronize()
    return time.perf_counter()


def extrapolate(slices: list[dict]) -> dict:
    """The whole model: what (1, 1) takes beyond its blocks, and each block as often as FLUX.1 has it."""

    def whole(key: str) -> float:
        one, two_double, two_single = (float(part[key]) for part in slices)
        double, single = two_double - one, two_single - one
        return one - double - single + BLOCKS[0] * double + BLOCKS[1] * single

    return {
        "minutes": whole("quantize_seconds") / 60,
        "bytes_bfloat16": whole("bytes_bfloat16"),
        "bytes": whole("bytes"),
        "ratio": whole("bytes") / whole("bytes_bfloat16"),
    }


@torch.no_grad()
def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--heads", type=int, default=24, help="of 128 channels")
    parser.add_argument("--tokens", type=int, default=4096, help="of the image, a square number")
    parser.add_argument("--text-tokens", type=int, default=512)
    parser.add_argument("--num-tuples", type=int, default=32)
    parser.add_argument("--method", default="svdquant", choices=("svdquant", "gradptq"))
    parser.add_argument("--steps", type=int, default=300, help="training steps of a block (gradptq)")
    parser.add_argument("--output", type=Path, default=Path("out/flux-slice.json"))
    args = parser.parse_args()
    slices = []
    measure((1, 1), args)
    for blocks in ((1, 1), (2, 1), (1, 2)):
        slices.append(measure(blocks, args))
        print(slices[-1], flush=True)
    device = torch.cuda.get_device_name() if args.device.startswith("cuda") else "CPU"
    settings = {name: getattr(args, name) for name in ("method", "heads", "tokens", "text_tokens", "num_tuples")}
    result = {"settings": settings, "device": device, "slices": slices, "whole": extrapolate(slices)}
    args.output.parent.mkdir(parents=True, exist_ok=True)
    with replacing(args.output) as temporary:
        temporary.write_text(json.dumps(result, indent=1))
    print(json.dumps(result["whole"], indent=1))


if __name__ == "__main__":
    run(main)
