"""Distil a model to one step with DisBack. No images are needed, only the teacher.

    python scripts/examples/distil.py                                     # tries the way: teaches the student nothing
    python scripts/examples/distil.py --device cuda --images 500000       # trains it: minutes on one large GPU

The student is a plain diffusers folder; generate, quantize and evaluate take its one step without being told.
"""

import argparse
from pathlib import Path

import tiny

import ptq4dm
from ptq4dm.errors import run
from ptq4dm.samplers import DisBackConfig, distill


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="unet-cifar10", help="a pixel model that predicts epsilon")
    parser.add_argument("--tiny", action="store_true", help="a random UNet instead")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--images", type=int, default=16, help="generated images that the student learns from")
    parser.add_argument("--output", type=Path, default=Path("out/examples/student"))
    args = parser.parse_args(argv)

    teacher = tiny.unet() if args.tiny else ptq4dm.load_pipeline(args.model, device=args.device)
    trial = args.images < 10_000
    config = DisBackConfig(
        images=args.images,
        batch_size=8 if trial else 256,
        degradation_steps=2 if trial else 100,  # stage 1: what the untrained student's images look like
        path_points=1 if trial else 5,  # stage 2: targets on the way back to the teacher
        precision="bf16" if args.device.startswith("cuda") else "no",
        num_fid=0 if trial else None,
    )
    student = distill(teacher, config, args.output / "run")  # resume=True goes on with what is there
    student.save_pretrained(args.output / "model")
    ptq4dm.generate(student, range(4), args.output / "images", num_inference_steps=1)
    print(f"the student, its log and four images are in {args.output}")
    return student


if __name__ == "__main__":
    run(main)
