"""Sample in few steps: how far each sampler at N steps is from the same seeds at many steps.

    python scripts/examples/few_steps.py [--model unet-cifar10] [--steps 8]

A solver for few steps is a scheduler of diffusers: one line, for any pipeline. PSNR is of same-seed images; which
sampler gives the better distribution is another question, answered in scripts/results/README.md.
"""

import argparse

import tiny

import ptq4dm
from ptq4dm.errors import run
from ptq4dm.evaluation.paired import image_errors, psnr
from ptq4dm.pipelines.sampling import sample
from ptq4dm.samplers import DDIMScheduler, DEISScheduler


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="unet-cifar10", help="embedded name, diffusers folder or hub id")
    parser.add_argument("--tiny", action="store_true", help="a random UNet instead")
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--many", type=int, default=50, help="steps of the images that count as exact")
    parser.add_argument("--num-images", type=int, default=4)
    args = parser.parse_args(argv)

    pipe = tiny.unet() if args.tiny else ptq4dm.load_pipeline(args.model)
    noise_schedule, seeds = pipe.scheduler.config, range(args.num_images)

    pipe.scheduler = DDIMScheduler.from_config(noise_schedule)
    exact = sample(pipe, seeds, num_inference_steps=args.many)

    samplers = {
        "ddim": DDIMScheduler.from_config(noise_schedule),
        "deis (t_ab, order 3, quadratic grid)": DEISScheduler.from_config(noise_schedule),
        "ipndm (order 2)": DEISScheduler.from_config(noise_schedule, solver="ipndm", order=2, timestep_grid="linear"),
    }
    found = {}
    for name, scheduler in samplers.items():
        pipe.scheduler = scheduler  # this is the line
        images = sample(pipe, seeds, num_inference_steps=args.steps)
        errors = image_errors(images, exact)
        found[name] = sum(map(psnr, errors)) / len(errors)
        print(f"{found[name]:6.2f} dB  {name}, {args.steps} steps against ddim with {args.many}")
    return found


if __name__ == "__main__":
    run(main)
