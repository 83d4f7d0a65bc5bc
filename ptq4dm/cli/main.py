"""The command line: ptq4dm collect | quantize | generate | evaluate | distill | bench | info.

Only the parser is here; what a command does is in commands.py.
"""

from __future__ import annotations

import argparse
import sys

from ..version import __version__

STEPS = "50, or what the model was distilled to"
DTYPES = ("float32", "bfloat16", "float16")
TUNED = ("w4a8-fp8", "w4a8-int8", "w4a4", "w4a16", "w8a8")


class Parser(argparse.ArgumentParser):
    """One plain line and exit status 2 for wrong input."""

    def error(self, message):
        print(f"{self.prog}: {message}", file=sys.stderr)
        raise SystemExit(2)


class Help(argparse.ArgumentDefaultsHelpFormatter):
    """Help with defaults, where there are any."""

    def _get_help_string(self, action):
        return action.help if action.default is None else super()._get_help_string(action)


def build_parser() -> argparse.ArgumentParser:
    parser = Parser(prog="ptq4dm", description="Quantize, sample and measure diffusion models.")
    parser.add_argument("--version", action="version", version=f"ptq4dm {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="command", parser_class=Parser)

    def command(name: str, text: str) -> argparse.ArgumentParser:
        return commands.add_parser(name, help=text, description=text, formatter_class=Help)

    collect = command("collect", "Record what a model sees while it samples, and measure its layers' inputs.")
    _model(collect, "unet-cifar10")
    _calibration(collect)
    _sampler(collect)
    _conditioning(collect)
    collect.add_argument("--output", default="out/calibration", help="folder of the store; resumed if unfinished")
    collect.add_argument("--plot", metavar="PNG", help="draw a layer's input range over timesteps (needs matplotlib)")
    collect.add_argument(
        "--plot-layer", metavar="NAME", help="which layer; the first convolution or linear otherwise"
    )

    quantize = command("quantize", "Quantize a model and save it as a diffusers pipeline.")
    _model(quantize, "unet-cifar10")
    quantize.add_argument("--method", default="ptq4dm", help="ptq4dm, rtn or svdquant")
    quantize.add_argument("--calibration", metavar="DIR", help="store from `collect`; made on the fly otherwise")
    quantize.add_argument("--plan", metavar="JSON", help="follow a saved plan instead of a method's options")
    quantize.add_argument("--output", default="out/quantized", help="folder of the quantized pipeline")
    quantize.add_argument(
        "--plot", metavar="PNG", help="svdquant: draw what a layer's branch takes off 4 bits (needs matplotlib)"
    )
    quantize.add_argument("--plot-layer", metavar="NAME", help="which layer; the worst otherwise")
    method = quantize.add_argument_group("method", "left out: the method's own default")
    none = dict(default=argparse.SUPPRESS)
    method.add_argument("--format", **none, help="int8 or fp8 (ptq4dm and rtn: int8)")
    method.add_argument("--weight-bits", type=int, **none, help="8; 2..7 are simulated in int8 containers")
    method.add_argument("--activation-bits", type=int, **none, help="8; 2..7 are simulated")
    method.add_argument("--activations", **none, help="static or dynamic; svdquant: int4, int8 or fp8 (int4)")
    method.add_argument("--objective", **none, help="range objective: max, percentile, mse or lp (ptq4dm: lp)")
    method.add_argument("--objective-parameter", type=float, **none, help="percent, or exponent (2.4)")
    method.add_argument("--symmetric", action="store_true", **none, help="static inputs without a zero point")
    method.add_argument("--first-last", choices=["int8", "same", "keep"], **none, help="edge layers: int8")
    method.add_argument("--rank", type=int, **none, help="svdquant: of the low-rank branch (32)")
    method.add_argument("--group-size", type=int, **none, help="svdquant: inputs per scale (64)")
    method.add_argument(
        "--smoothing", type=_number_or_word, **none, help="svdquant: search, exhaustive, none, or alpha (search)"
    )
    method.add_argument("--rounding", **none, help="svdquant: gptq or nearest (gptq)")
    method.add_argument(
        "--modules-to-not-convert", nargs="+", metavar="NAME", **none, help="layers to leave alone (patterns)"
    )
    _calibration(quantize)
    _sampler(quantize)
    _conditioning(quantize)

    generate = command("generate", "Make images: one PNG per seed.")
    _model(generate, None, "out/quantized if `quantize` made it, else unet-cifar10")
    generate.add_argument("--num-images", type=int, default=16)
    generate.add_argument("--seed", type=int, default=0, help="seed of the first image; the next has seed + 1")
    generate.add_argument("--num-inference-steps", "--steps", type=int, help=STEPS)
    generate.add_argument("--batch-size", type=int, default=16)
    generate.add_argument("--output", default="out/images", help="folder of the PNGs; only missing ones are made")
    generate.add_argument("--picture", metavar="PNG", help="all images on one picture; OUTPUT.png unless given")
    _sampler(generate)
    _conditioning(generate)

    evaluate = command("evaluate", "Measure a model: Frechet distance, errors against full precision, speed, bytes.")
    _model(evaluate, None, "out/quantized if `quantize` made it, else unet-cifar10")
    evaluate.add_argument(
        "--full-precision", metavar="MODEL", help="what to compare with; a quantized model knows its original"
    )
    evaluate.add_argument("--images", metavar="DIR", help="measure a folder of images instead of a model")
    evaluate.add_argument("--write-reference", metavar="NPZ", help="write the statistics of --images and stop")
    evaluate.add_argument("--metric", choices=["feature-fid", "fid", "none"], default="feature-fid")
    evaluate.add_argument("--reference", metavar="DIR|NPZ", help="real images, or their mu and sigma")
    evaluate.add_argument("--inception-weights", metavar="PATH", help="for --metric fid; downloaded otherwise")
    evaluate.add_argument("--resize", choices=["torch-fidelity", "clean"], default="torch-fidelity")
    evaluate.add_argument("--num-images", type=int, default=1000, help="samples for the Frechet distance")
    evaluate.add_argument("--num-paired", type=int, default=64, help="same-seed pairs")
    evaluate.add_argument("--num-heldout", type=int, default=64, help="recorded calls for the epsilon error")
    evaluate.add_argument("--num-inference-steps", "--steps", type=int, help=STEPS)
    evaluate.add_argument("--batch-size", type=int, default=16)
    evaluate.add_argument("--seed", type=int, default=0)
    evaluate.add_argument("--output", default="out/evaluation", help="folder of report.json and samples.png")
    _sampler(evaluate)
    _conditioning(evaluate)

    distill = command("distill", "Distil a model to one step (DisBack), and save it as a diffusers pipeline.")
    _model(distill, "unet-cifar10")
    distill.add_argument("--output", default="out/student", help="folder of the student; its run is in OUTPUT.run")
    distill.add_argument("--resume", action="store_true", help="go on with the run in OUTPUT.run")
    budget = distill.add_argument_group("budget")
    budget.add_argument("--images", type=int, **none, help="that the student learns from, in all (500000)")
    budget.add_argument("--minutes", type=float, **none, help="stop this call after so many; resume it with --resume")
    training = distill.add_argument_group("training")
    training.add_argument(
        "--backtracking",
        action=argparse.BooleanOptionalAction,
        **none,
        help="DisBack; without: plain score distillation, the teacher as target from the start",
    )
    training.add_argument("--batch-size", type=int, **none, help="over all processes and accumulation steps (256)")
    training.add_argument("--gradient-accumulation-steps", type=int, **none, help="parts of a batch (1)")
    training.add_argument("--student-lr", type=float, **none, help="(3e-5)")
    training.add_argument("--fake-lr", type=float, **none, help="of the fake score (1e-4)")
    training.add_argument("--fake-steps", type=int, **none, help="its updates for each of the student (1)")
    training.add_argument("--generator-sigma", type=float, **none, help="noise level of the generator's input (2.5)")
    training.add_argument("--degradation-steps", type=int, **none, help="iterations of stage 1 (100)")
    training.add_argument("--path-points", type=int, **none, help="targets on the way back to the teacher (5)")
    training.add_argument("--switch-every", type=int, **none, help="iterations from one to the next (25)")
    training.add_argument("--ema-decay", type=float, **none, help="moving average of the student (0.999)")
    training.add_argument(
        "--compile", action="store_true", **none, help="torch.compile: pays in runs of many minutes"
    )
    training.add_argument("--seed", type=int, **none, help="of all noise (0)")
    training.add_argument("--evaluate-every", type=int, **none, help="images between checkpoints and grids (50000)")
    training.add_argument("--num-fid", type=int, **none, help="images of a feature-FID; 0: none (5000 at 32x32)")

    bench = command("bench", "Compare samplers; find the fastest settings of the kernels on a GPU.")
    subjects = bench.add_subparsers(dest="subject", required=True, metavar="subject", parser_class=Parser)

    def subject(name: str, text: str) -> argparse.ArgumentParser:
        return subjects.add_parser(name, help=text, description=text, formatter_class=Help)

    samplers = subject("samplers", "Compare samplers: Frechet distance against evaluations of the model.")
    _model(samplers, "unet-cifar10")
    samplers.add_argument(
        "--samplers", nargs="+", metavar="NAME", help="as for --sampler of generate; the usual ones otherwise"
    )
    samplers.add_argument("--evaluations", nargs="+", type=int, metavar="N", help="budgets; 5 6 8 10 15 20 50")
    samplers.add_argument("--num-images", type=int, default=1000)
    samplers.add_argument("--batch-size", type=int, default=100)
    samplers.add_argument("--seed", type=int, default=0)
    samplers.add_argument("--output", default="out/bench", help="folder of samplers.json and samplers.png; resumed")

    tune = subject("tune", "Time the kernels' settings on this GPU, and record the fastest where the kernels look.")
    _model(tune, None, "tune for its layers; the shapes of kernels/README.md and of unet-cifar10 otherwise")
    tune.add_argument(
        "--kernels",
        nargs="+",
        choices=TUNED,
        metavar="NAME",
        help=f"{', '.join(TUNED)}; what serves a shape otherwise: w4a16 up to 32 rows, above w4a8 and w4a4; and w8a8",
    )
    tune.add_argument(
        "--shapes", nargs="+", metavar="M,N,K", help="of Linear layers (rows, outputs, inputs) instead of a model's"
    )
    tune.add_argument("--batch-size", type=int, help="images at once; 256 for the embedded models, 1 for others")
    tune.add_argument(
        "--minutes", type=float, help="begin no more launches after so many; the rest keeps what it had"
    )
    tune.add_argument(
        "--output",
        metavar="FILE",
        help="JSON of the settings; otherwise where the kernels look for it: kernels/tuned/ of the package, or if "
        "that is read-only, or $PTQ4DM_TUNED is set, that folder or ~/.cache/ptq4dm/tuned",
    )
    _conditioning(tune)

    info = command("info", "What a model is: layers, formats, kernels, bytes.")
    _model(info, None, "out/quantized if `quantize` made it, else unet-cifar10")
    info.add_argument("--json", action="store_true", help="everything, as JSON")
    return parser


def _model(parser, default, note: str = "") -> None:
    text = "hub id, diffusers folder, or embedded name (unet-cifar10, dit-cifar10, unet-cifar10-onestep)"
    parser.add_argument("--model", default=default, help=f"{text}; {note}" if note else text)
    parser.add_argument("--device", help="cpu, cuda, cuda:1; a GPU if there is one")
    parser.add_argument("--dtype", choices=DTYPES, help="float32 on a CPU, bfloat16 on a GPU")


def _number_or_word(text: str):
    try:
        return float(text)
    except ValueError:
        return text


def _sampler(parser) -> None:
    group = parser.add_argument_group("sampler")
    group.add_argument(
        "--sampler",
        metavar="NAME",
        help="ddim, deis, a solver of it (ipndm, t_ab, rho_ab, log_rho, rho_rk), a setting such as t_ab3/quad, or "
        "rho_rk-3heun/edm, .../clean (ends at clean data), or diffusers/ with ddim, deis, dpm++2m, dpm++3m, unipc, "
        "euler, heun, some with -karras; the model's own otherwise",
    )
    group.add_argument("--order", type=int, choices=range(4), help="of a DEIS solver; 0 is DDIM")
    group.add_argument("--grid", help="timesteps: linear, quad, cubic, log, edm, beta, linspace, leading or trailing")


def _calibration(parser) -> None:
    group = parser.add_argument_group("calibration")
    group.add_argument("--collector", default="uniform", help="law of the timesteps: uniform, ndtc or solver")
    group.add_argument("--num-samples", type=int, default=128, help="sampling trajectories")
    group.add_argument(
        "--calibration-steps",
        type=int,
        help="steps of the sampler they are taken from; 20, or what the model was distilled to",
    )
    group.add_argument("--mu", type=float, default=0.4, help="ndtc: mean, as a fraction of the timesteps")
    group.add_argument("--sigma", type=float, default=0.4, help="ndtc: deviation; 0 is a single timestep")
    group.add_argument("--num-bins", type=int, default=10, help="timestep bins of the statistics")
    group.add_argument("--batch-size", type=int, default=16)
    group.add_argument("--seed", type=int, default=0)


def _conditioning(parser) -> None:
    group = parser.add_argument_group("conditioning")
    group.add_argument("--prompt", nargs="+", metavar="TEXT", help="image k gets prompt k mod their number")
    group.add_argument("--class-labels", nargs="+", type=int, metavar="N", help="likewise; all classes otherwise")
    group.add_argument("--guidance-scale", type=float, help="for pipelines that take one")


def main(arguments: list[str] | None = None) -> int:
    """Run a command; returns the exit status: 0, 130 (interrupted) or 2 (wrong input)."""
    args = build_parser().parse_args(arguments)
    from ..errors import UserError
    from . import commands

    try:
        getattr(commands, args.command)(args)
    except UserError as error:
        print(f"ptq4dm {args.command}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        how = {
            "collect": "the same command",
            "generate": "the same command",
            "distill": "the same command with --resume",
        }
        advice = f"; {how[args.command]} goes on where it stopped" if args.command in how else ""
        print("interrupted" + advice, file=sys.stderr)
        return 130
    finally:
        commands.leave_process_group()
    return 0


if __name__ == "__main__":
    sys.exit(main())
