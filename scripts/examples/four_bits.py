"""A large model in 4 bits: calibrate, quantize, save, load, paint.

    python scripts/examples/four_bits.py --tiny                                     # a random FLUX of two blocks
    python scripts/examples/four_bits.py --model qwen-image --device cuda --num-samples 16 --steps 20

--model is a name in large_models.py: FLUX, FLUX.2, Qwen-Image, Z-Image, SDXL, SD3, Wan, LTX; another is a row there.
--no-data quantizes from weights alone, in seconds where calibration takes minutes: less exact. faster.py goes on from
the folder. Their text encoders come from transformers (`pip install ".[text]"`).
"""

import argparse
from pathlib import Path

import large_models

import ptq4dm
from ptq4dm.errors import run
from ptq4dm.files.places import output_folder


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="flux", choices=large_models.MODELS)
    parser.add_argument("--tiny", action="store_true", help="a random model of the same class, nothing is downloaded")
    parser.add_argument("--prompt", nargs="+", default=["a lighthouse at dusk", "two cats on a sofa"])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--no-data", action="store_true", help="SVDQuant from weights alone")
    parser.add_argument("--num-samples", type=int, default=4, help="calibration trajectories; 16 for a real model")
    parser.add_argument("--steps", type=int, help="of a trajectory and of the picture; those of the model's card")
    parser.add_argument("--output", type=Path, default=Path("out/examples/four-bits"))
    args = parser.parse_args(argv)
    steps = large_models.steps_of(args.model, args.tiny, args.steps)

    with output_folder(args.output):  # refused before the work where it cannot be made, or holds a model
        pipe, inputs = large_models.opened(args.model, args.prompt, args.tiny, args.device)
        if args.no_data:
            report = ptq4dm.quantize(pipe, large_models.recipe(args.model, args.device, evidence="none"))
        else:
            config = ptq4dm.CalibrationConfig(
                num_samples=args.num_samples, num_inference_steps=steps, batch_size=len(args.prompt)
            )
            store = ptq4dm.collect(pipe, config, **inputs)
            report = ptq4dm.quantize(pipe, large_models.recipe(args.model, args.device), store)
        print(report.table(worst=5))
        pipe.save_pretrained(args.output)  # a plain diffusers folder, safetensors only

    pipe, inputs = large_models.opened(args.model, args.prompt, args.tiny, args.device, args.output)
    made = large_models.paint(pipe, inputs, steps)
    if isinstance(made, list):  # the frames of a video
        made[0].save(args.output / "first.gif", save_all=True, append_images=made[1:])
    else:
        made.save(args.output / "first.png")
    print(f"the 4-bit pipeline and what it painted are in {args.output}")
    return report


if __name__ == "__main__":
    run(main)
