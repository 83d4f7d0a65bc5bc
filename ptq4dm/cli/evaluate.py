"""`ptq4dm evaluate`: what quantization cost and gained, or statistics of a folder of images."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path

from ..caching.cached_steps import cached_steps
from ..errors import UserError
from ..evaluation.evaluate import EvaluateConfig, evaluate, evaluate_images, write_reference
from ..evaluation.report import PICTURE, REPORT, format_report
from ..evaluation.same import check_same
from ..files.places import file_place
from ..pipelines.embedded import check_name
from ..pipelines.picture_files import find_images
from ..quantization.saving import original_of
from .computing import add_optimize, add_reuse, check_optimize, conditions, optimized, reused
from .flags import add_flags, given, options_of
from .options import (
    BATCH_SIZE,
    CONDITIONING,
    QUANTIZED_FIRST,
    SAMPLER,
    add_conditioning,
    add_model,
    add_sampler,
    add_steps,
    check_idle,
    check_metric,
    conditioning_of,
    default_model,
    device_of,
    load,
    steps_of,
)
from .output import result, say

OUTPUT = "out/evaluation"
OF_IMAGES = ("metric", "reference", "inception_weights", "resize")  # the options that a folder's figures have, too


def add(parser) -> None:
    add_model(parser, None, QUANTIZED_FIRST)
    text = "what to compare with; a quantized model knows its original"
    parser.add_argument("--full-precision", metavar="MODEL", help=text)
    parser.add_argument("--images", metavar="DIR", help="measure a folder of images instead of a model")
    parser.add_argument("--write-reference", metavar="NPZ", help="write the statistics of --images and stop")
    add_flags(parser, EvaluateConfig)
    add_steps(parser)
    parser.add_argument("--batch-size", type=int, default=BATCH_SIZE, help="images at once")
    parser.add_argument("--output", help=f"folder of {REPORT} and {PICTURE}; {OUTPUT} unless given")
    add_optimize(parser)
    add_reuse(parser)
    add_sampler(parser)
    add_conditioning(parser)


def run(args) -> None:
    if args.images:
        _run_images(args)
        return
    if args.write_reference:
        raise UserError("--write-reference takes the statistics of a folder of images; give it with --images.")
    options = given(args, EvaluateConfig) | conditioning_of(args)
    if args.num_inference_steps is not None:
        options["num_inference_steps"] = args.num_inference_steps
    config = EvaluateConfig(batch_size=args.batch_size, **options)
    config.check()
    check_metric(args, config.metric)
    if config.metric == "none" and config.num_images and "num_images" in options:  # 0 leaves it out: so it is
        check_idle(args, ("num_images",), "metric none measures no Frechet distance")
    check_optimize(args)
    model = default_model(args)
    if config.metric == "none" and not (args.full_precision or original_of(model)):
        check_name(model)
        raise UserError(
            f"{model} does not say what it was quantized from, and metric none compares with that; name it with "
            "--full-precision."
        )
    _check_compared(args, model)
    pipe = load(args, model)
    config.num_inference_steps = steps_of(args, pipe)
    original, full_precision = _original(args, model)
    if full_precision is not None:  # the models are compared, not two samplers
        check_same(pipe, full_precision, model, str(original))
        full_precision.scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config)
    ways = [
        optimized(args, name, one) for name, one in ((model, pipe), (original, full_precision)) if one is not None
    ]
    sampler = f"{type(pipe.scheduler).__name__}" + (f" ({args.sampler})" if args.sampler else "")
    facts = {"model": model, "full_precision": original, "scheduler": type(pipe.scheduler).__name__}

    def show(report: dict) -> None:
        say(f"{model}" + (f" against {original}" if original else "") + f", {sampler}")
        say(format_report(report))
        result(**report, **facts)

    output = Path(args.output or OUTPUT)
    plan = reused(args, pipe, conditioning_of(args))
    with nullcontext() if plan is None else cached_steps(pipe, plan) as cache:
        evaluate(pipe, full_precision, config, output, show, conditions(args, ways[0] is not None, plan) or None)
    if cache is not None:
        say(f"{model}, with steps cached:\n{cache}")
        result(calls_computed=cache.computed, calls_reused=cache.reused)
    for name, done in zip((model, original), ways, strict=False):
        if done is not None:
            say(f"{name}, optimized:\n{done}")
    path, picture = output / REPORT, output / PICTURE
    say(f"report:  {path}")
    if picture.is_file():
        say(f"picture: {picture}")
    result(report=path, picture=picture if picture.is_file() else None)


def _run_images(args) -> None:
    if args.optimize or args.engine or args.weight_cache or args.attention or args.reuse:
        raise UserError("--optimize, --engine and --reuse are for a model; images are measured as they are.")
    idle = [name for name in options_of(EvaluateConfig) if name not in OF_IMAGES]
    idle = ["model", "full_precision", "dtype", "num_inference_steps", *idle, "output", *SAMPLER, *CONDITIONING]
    check_idle(args, idle, "the images of a folder are measured as they are")
    config = EvaluateConfig(batch_size=args.batch_size, **given(args, EvaluateConfig))
    config.check()
    if config.metric == "none":
        raise UserError("metric none measures nothing of a folder of images; choose another.")
    check_metric(args, config.metric)
    if args.write_reference:
        check_idle(args, ("reference",), "the statistics that are written are of --images alone")
    device = device_of(args)
    if args.write_reference:
        file_place(args.write_reference, ".npz")
        count = write_reference(args.images, args.write_reference, config, device)
        say(f"statistics of {count} images: {args.write_reference}")
        warnings = [passed_over] if (passed_over := find_images(args.images).passed_over) else []
        for warning in warnings:
            say(f"warning: {warning}")
        result(images=args.images, num_images=count, reference=args.write_reference, warnings=warnings)
    else:
        report = evaluate_images(args.images, config, device)
        say(format_report(report))
        result(images=args.images, **report)


def _check_compared(args, model) -> None:
    """Raises UserError where figures of two models were asked for, and nobody knows the other one."""
    if args.full_precision or original_of(model):
        return
    scored = getattr(args, "clip", None) or getattr(args, "image_reward", None)  # pictures of one model, too
    names = ("num_heldout", "lpips_weights") if scored else ("num_paired", "num_heldout", "lpips_weights")
    asked = [name for name in names if getattr(args, name, None)]  # 0 leaves a figure out, and that is done
    check_idle(args, asked, f"{model} is compared with no other model (--full-precision)")


def _original(args, model):
    """The name and the pipeline of the model in full precision; None and None where nobody knows it."""
    original = args.full_precision or original_of(model)
    try:
        return original, load(args, original) if original else None
    except UserError as error:
        if args.full_precision:
            raise
        raise UserError(
            f"{model} was quantized from another model: {error} Name it with --full-precision."
        ) from error
