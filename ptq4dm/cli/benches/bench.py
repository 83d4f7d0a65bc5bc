"""`ptq4dm bench samplers | tune | hardware`: samplers compared; settings of kernels searched (tune.py); an
accelerator modelled (hardware.py).
"""

from __future__ import annotations

from pathlib import Path

import torch

from ...errors import UserError
from ...files.places import file_place
from ...kernels.runtime.settings import tuned_file
from ...pipelines.denoiser import denoiser
from ...pipelines.load import EMBEDDED
from ...quantization.saving import original_of
from ...samplers.catalog import FITTED
from ...samplers.comparison.compare import SamplerBench, bench_samplers, is_benched, usual_samplers
from ...samplers.comparison.table import few_images, plot_rows, table
from ...samplers.fitting.fit import FitConfig
from ...samplers.fitting.saved import fitted_beside, fitted_to
from ..flags import add_flags, flag_of, given, options_of
from ..options import EXAMPLE, add_conditioning, add_model, conditioning_of, device_of, load, one_process
from ..output import result, say
from ..parser import Parser, add_command
from . import hardware, tune


def add(parser) -> None:
    subjects = parser.add_subparsers(dest="subject", required=True, metavar="subject", parser_class=Parser)
    text = "Compare samplers: Frechet distance against evaluations of the model."
    _add_samplers(add_command(subjects, "samplers", text))
    text = "Time the kernels' settings on this GPU, and record the fastest where the kernels look."
    _add_tune(add_command(subjects, "tune", text))
    text = "Model time and energy of an image on accelerators for few bits (MixPE and others); nothing is measured."
    hardware.add(add_command(subjects, "hardware", text))


def run(args) -> None:
    {"samplers": _run_samplers, "tune": _run_tune, "hardware": hardware.run}[args.subject](args)


def _add_samplers(parser) -> None:
    add_model(parser)
    text = "as for --sampler of generate; the usual ones that the model takes otherwise. `fitted` is the schedule "
    text += "beside the model, with --fit the one that is fitted here"
    parser.add_argument("--samplers", nargs="+", metavar="NAME", help=text)
    usual = " ".join(map(str, SamplerBench.evaluations))
    few = " ".join(map(str, FitConfig.evaluations))
    parser.add_argument("--evaluations", nargs="+", type=int, metavar="N", help=f"budgets; {usual}; with --fit {few}")
    text = "of each sampler, for the Frechet distance"
    parser.add_argument("--num-images", type=int, default=SamplerBench.num_images, help=text)
    parser.add_argument("--batch-size", type=int, default=SamplerBench.batch_size, help="images at once")
    parser.add_argument("--seed", type=int, default=SamplerBench.seed, help="seed of the first image")
    text = "of classifier-free guidance, of all rows, and with --fit of the fit; for models that take one (1: none)"
    parser.add_argument("--guidance-scale", type=float, default=SamplerBench.guidance_scale, help=text)
    text = "fit a schedule to the model, a row 'fitted', and write it into OUTPUT/fitted, which --sampler takes then"
    parser.add_argument("--fit", action="store_true", help=text)
    text = "of --fit: the model that is followed, such as the full-precision one of a quantized --model; itself"
    parser.add_argument("--teacher", metavar="MODEL", help=text)
    add_flags(parser, FitConfig)
    text = "folder of samplers.json and samplers.png; what is there already is kept, and not measured or fitted again"
    parser.add_argument("--output", default="out/bench", help=text)


def _run_samplers(args) -> None:
    one_process(args)
    named = {name: getattr(args, name) for name in ("samplers", "evaluations") if getattr(args, name)}
    if args.fit:
        named.setdefault("evaluations", FitConfig.evaluations)
    for name in ("num_images", "batch_size", "seed", "guidance_scale"):
        named[name] = getattr(args, name)
    config = SamplerBench(**named)
    output = Path(args.output) / "samplers.json"
    file_place(output, ".json")
    sizes = given(args, FitConfig)
    if not args.fit and (args.teacher or sizes):
        raise UserError(f"{flag_of(next(iter(sizes), 'teacher'))} goes with --fit.")
    fitting = FitConfig(**sizes, **{"evaluations": config.evaluations} if args.fit else {})
    pipe = load(args, args.model)
    settings = {"model": str(args.model), "dtype": str(denoiser(pipe).dtype).removeprefix("torch.")}
    own = {}
    if not args.samplers:
        config.samplers = usual_samplers(pipe.scheduler.config)
    if FITTED in config.samplers and not args.fit:  # by its folder: OUTPUT may have rows of one that was fitted there
        beside = str(
            fitted_beside([name for name in (args.model, original_of(args.model)) if name], is_benched(pipe))
        )
        config.samplers = [beside if name == FITTED else name for name in config.samplers]
    if args.fit:
        config.samplers = list(dict.fromkeys([FITTED, *config.samplers]))
        config.check(pipe, {FITTED: None})
        origin = {**settings, "teacher": str(args.teacher or args.model)}  # of the schedule, not of the other rows
        origin |= {name: getattr(fitting, name) for name in options_of(FitConfig)}
        teacher = load(args, args.teacher) if args.teacher else None
        folder = output.parent / "fitted"
        arguments = None if config.guidance_scale == 1 else {"guidance_scale": config.guidance_scale}
        own[FITTED], before = fitted_to(pipe, teacher, fitting, folder, origin, arguments)
        if before:
            say(f"fitted before, and taken as it is: {folder}")
    if output.is_file():
        say(f"goes on with {output}: the figures it has are not measured again")
    rows = bench_samplers(pipe, config, output, settings, own)
    few = few_images(config.num_images)
    guided = "" if config.guidance_scale == 1 else f", guidance scale {config.guidance_scale:g}"
    say(f"feature-FID of {args.model}, {args.num_images} images{guided}, by evaluations of the model")
    say(table(rows, best=few is None))
    say(f"figures: {output}" if few is None else f"warning: {few}\nfigures: {output}")
    warnings = [] if few is None else [few]
    facts = {"num_images": config.num_images, "guidance_scale": config.guidance_scale, "warnings": warnings}
    result(**settings, **facts, rows=rows, figures=output)
    if plot_rows(str(args.model), rows, output.with_suffix(".png")):
        say(f"picture: {output.with_suffix('.png')}")
        result(picture=output.with_suffix(".png"))


def _add_tune(parser) -> None:
    text = f"tune for its layers; the shapes of kernels/README.md and of {EXAMPLE} otherwise"
    add_model(parser, None, text)
    text = f"{', '.join(tune.KERNELS)}; what serves a shape otherwise: {tune.USUAL}"
    parser.add_argument("--kernels", nargs="+", choices=tuple(tune.KERNELS), metavar="NAME", help=text)
    text = "of Linear layers (rows, outputs, inputs) instead of a model's"
    parser.add_argument("--shapes", nargs="+", metavar="M,N,K", help=text)
    text = f"images at once; {tune.EMBEDDED_BATCH} for the embedded models, 1 for others"
    parser.add_argument("--batch-size", type=int, help=text)
    text = "begin no more launches after so many; the rest keeps what it had"
    parser.add_argument("--minutes", type=float, help=text)
    parser.add_argument(
        "--output",
        metavar="FILE",
        help="JSON of the settings; otherwise where the kernels look for it: kernels/tuned/ of the package, or if "
        "that is read-only, or $PTQ4DM_TUNED is set, that folder or ~/.cache/ptq4dm/tuned",
    )
    add_conditioning(parser)


def _run_tune(args) -> None:
    if args.shapes and args.model:
        raise UserError("--shapes stand for a model's layers; give one of --shapes and --model.")
    if args.minutes is not None and not args.minutes > 0:
        raise UserError(f"--minutes must be above 0; got {args.minutes}.")
    if args.batch_size is not None and args.batch_size < 1:
        raise UserError(f"--batch-size must be at least 1; got {args.batch_size}.")
    shapes = [tune.parse_shape(text) for text in args.shapes or ()]
    tune.check_gpu()
    one_process(args)
    device = device_of(args)
    if device.type != "cuda":
        raise UserError(f"kernels are tuned on a GPU, not on {device}.")
    if device.index is not None:
        torch.cuda.set_device(device)
    shapes, cases = _work(args, shapes)
    output = Path(args.output) if args.output else None
    tune.tune(tune.plan(args.kernels, shapes, cases), output, args.minutes and 60 * args.minutes)
    if output is not None:
        say(f"the kernels do not look there; to use it, copy it to {tuned_file()}")


def _work(args, shapes: list) -> tuple[list, list]:
    """The shapes and the cases to tune for: those given, a model's, or the usual ones."""
    if shapes:
        return shapes, tune.linear_cases(shapes)
    if not args.model and args.kernels and tune.W8A8 not in args.kernels:
        return tune.known_shapes(), []
    model = args.model or EXAMPLE
    batch = args.batch_size or (tune.EMBEDDED_BATCH if model in EMBEDDED else 1)
    cases = tune.cases_of_pipeline(load(args, model), batch, **conditioning_of(args))
    torch.cuda.empty_cache()
    return tune.linear_shapes(cases) if args.model else tune.known_shapes(), cases
