"""FLUX in 4 bits with SVDQuant: a low-rank branch holds what 4 bits cannot.

    python scripts/examples/four_bit_flux.py                                        # a tiny random FLUX
    python scripts/examples/four_bit_flux.py --model org/flux --device cuda --prompt "a red bicycle" --steps 20

It needs transformers (`pip install ".[text]"`), which diffusers' FLUX pipeline imports. On GPUs with fp8 (Ada,
Hopper, Blackwell) take `--activations fp8`, on Ampere int8 (the default here).
"""

import argparse
from pathlib import Path

import tiny
import torch

import ptq4dm
from ptq4dm.errors import run


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="diffusers folder or hub id of a FLUX; a tiny random one otherwise")
    parser.add_argument("--prompt", nargs="+", default=["a lighthouse at dusk", "two cats on a sofa"])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--activations", default="int8", choices=("int4", "int8", "fp8"))
    parser.add_argument("--rank", type=int, default=32)
    parser.add_argument("--num-samples", type=int, default=8, help="calibration trajectories; 32 for a real model")
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--output", type=Path, default=Path("out/examples/flux"))
    args = parser.parse_args(argv)

    if args.model:
        pipe = ptq4dm.load_pipeline(args.model, torch.bfloat16, args.device)
        conditioning, size = {"prompt": args.prompt}, {}
    else:
        (pipe, conditioning), size = tiny.flux(), {"height": 16, "width": 16}

    calibration = ptq4dm.CalibrationConfig(num_samples=args.num_samples, num_inference_steps=args.steps, batch_size=4)
    store = ptq4dm.collect(pipe, calibration, conditioning=conditioning, pipeline_kwargs=size)
    report = ptq4dm.quantize(pipe, ptq4dm.SVDQuantConfig(rank=args.rank, activations=args.activations), store)
    print(report.table(worst=5))

    ptq4dm.fuse(pipe)  # on a GPU: norms, GELU and quantization inside the kernels; changes nothing on a CPU
    ptq4dm.generate(
        pipe, range(2), args.output / "images", num_inference_steps=args.steps, batch_size=1,
        conditioning=conditioning, pipeline_kwargs=size,
    )  # fmt: skip
    pipe.transformer.save_pretrained(args.output / "transformer")
    print(f"images and the 4-bit transformer are in {args.output}")
    return report


if __name__ == "__main__":
    run(main)
