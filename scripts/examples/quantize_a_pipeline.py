"""Quantize a diffusers pipeline to 8 bits, save it, load it, make images with it.

    python scripts/examples/quantize_a_pipeline.py                                  # the embedded UNet
    python scripts/examples/quantize_a_pipeline.py --model org/model --prompt "a lighthouse at dusk"

What is saved is a plain diffusers folder with safetensors. It loads in every program that imports ptq4dm.
"""

import argparse
from pathlib import Path

import tiny
from diffusers import DiffusionPipeline

import ptq4dm
from ptq4dm.errors import run


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="unet-cifar10", help="embedded name, diffusers folder or hub id")
    parser.add_argument("--tiny", action="store_true", help="a random UNet instead")
    parser.add_argument("--prompt", nargs="+", help="what to calibrate on and to paint, for text-to-image models")
    parser.add_argument("--num-samples", type=int, default=32, help="calibration trajectories; 128 for good ranges")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--output", type=Path, default=Path("out/examples/w8a8"))
    args = parser.parse_args(argv)

    pipe = tiny.unet() if args.tiny else ptq4dm.load_pipeline(args.model)
    conditioning = {"prompt": args.prompt} if args.prompt else None

    # 1. Run the model's own sampler, and record what its layers are fed at which timesteps.
    calibration = ptq4dm.CalibrationConfig(num_samples=args.num_samples, num_inference_steps=args.steps)
    store = ptq4dm.collect(pipe, calibration, conditioning=conditioning)

    # 2. Replace every Linear and Conv2d by int8 codes, scales and bias.
    report = ptq4dm.quantize(pipe, ptq4dm.PTQ4DMConfig(), store)
    print(report.table())

    # 3. Save, load, sample.
    pipe.save_pretrained(args.output / "model")
    loaded = DiffusionPipeline.from_pretrained(args.output / "model")
    images = ptq4dm.generate(
        loaded, range(4), args.output / "images", num_inference_steps=args.steps, conditioning=conditioning
    )
    print(f"{len(images)} images in {args.output / 'images'}")
    return report


if __name__ == "__main__":
    run(main)
