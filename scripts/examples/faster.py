"""A saved 4-bit model made fast: optimized, in few steps of DEIS, measured beside full precision.

    python scripts/examples/four_bits.py --tiny && python scripts/examples/faster.py --tiny
    python scripts/examples/faster.py --model qwen-image --device cuda --quantized out/examples/four-bits --steps 12

`optimize` fuses, compiles and captures CUDA graphs, and says what it did. Both models are sampled alike, so what is
measured is what quantization costs in these steps; few_steps.py measures the steps. A model distilled to few steps,
such as Z-Image-Turbo, wants its own sampler: --sampler own.
"""

import argparse
from dataclasses import replace
from pathlib import Path

import large_models

import ptq4dm
from ptq4dm.errors import run
from ptq4dm.evaluation.report import format_report
from ptq4dm.files.places import output_folder
from ptq4dm.samplers import DEISScheduler


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="flux", choices=large_models.MODELS)
    parser.add_argument("--tiny", action="store_true", help="a random model of the same class, nothing is downloaded")
    parser.add_argument("--quantized", type=Path, default=Path("out/examples/four-bits"), help="of four_bits.py")
    parser.add_argument("--prompt", nargs="+", default=["a red bicycle", "a bowl of oranges"])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--sampler", choices=("deis", "own"), default="deis")
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--num-heldout", type=int, default=2, help="recorded calls for the error; 16 or more for one")
    parser.add_argument("--output", type=Path, default=Path("out/examples/faster"))
    args = parser.parse_args(argv)
    config = ptq4dm.EvaluateConfig(
        metric="none", num_paired=0, num_heldout=args.num_heldout, num_inference_steps=args.steps, batch_size=1,
        warmup_steps=1, timed_steps=3,
    )  # fmt: skip
    with output_folder(args.output):  # refused before the work
        quantized, inputs = large_models.opened(args.model, args.prompt, args.tiny, args.device, args.quantized)
        exact, _ = large_models.opened(args.model, args.prompt, args.tiny, args.device)
        for pipe in (quantized, exact):
            if args.sampler == "deis":
                pipe.scheduler = DEISScheduler.from_config(pipe.scheduler.config)
            print(ptq4dm.optimize(pipe, compiled=not args.tiny))  # tiny ones compile for longer than they run
        report = ptq4dm.evaluate(quantized, exact, replace(config, **inputs), args.output)
    print(format_report(report))
    return report


if __name__ == "__main__":
    run(main)
