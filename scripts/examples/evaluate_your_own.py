"""Measure what quantization cost and gained: your model beside its own full precision.

    python scripts/examples/evaluate_your_own.py                                    # the embedded UNet, W8A8
    python scripts/examples/evaluate_your_own.py --model org/model --prompt "a lighthouse at dusk"
    python scripts/examples/evaluate_your_own.py --images real_images/              # and FID against your own images

Same-seed PSNR and the error of noise predictions are paired: 16 images are evidence. A Frechet distance needs
thousands, and is left out here unless a folder of real images is given.
"""

import argparse
import copy
from pathlib import Path

import tiny

import ptq4dm
from ptq4dm.errors import run
from ptq4dm.evaluation.evaluate import EvaluateConfig, evaluate
from ptq4dm.evaluation.report import format_report


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="unet-cifar10", help="embedded name, diffusers folder or hub id")
    parser.add_argument("--tiny", action="store_true", help="a random UNet instead")
    parser.add_argument("--prompt", nargs="+", help="for text-to-image models")
    parser.add_argument("--images", type=Path, help="folder of real images: adds feature-FID over 1000 samples")
    parser.add_argument("--num-paired", type=int, default=16, help="same-seed images, and held-out noise predictions")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--output", type=Path, default=Path("out/examples/evaluation"))
    args = parser.parse_args(argv)

    original = tiny.unet() if args.tiny else ptq4dm.load_pipeline(args.model)
    conditioning = {"prompt": args.prompt} if args.prompt else None
    quantized = copy.deepcopy(original)
    calibration = ptq4dm.CalibrationConfig(num_samples=args.num_paired, num_inference_steps=args.steps)
    store = ptq4dm.collect(quantized, calibration, conditioning=conditioning)
    ptq4dm.quantize(quantized, ptq4dm.PTQ4DMConfig(), store)

    config = EvaluateConfig(
        metric="feature-fid" if args.images else "none",
        reference=args.images,
        num_paired=args.num_paired,
        num_heldout=args.num_paired,  # seeds that calibration never saw
        num_inference_steps=args.steps,
        batch_size=8,
        conditioning=conditioning,
    )
    report = evaluate(quantized, original, config, args.output)
    print(format_report(report))
    return report


if __name__ == "__main__":
    run(main)
