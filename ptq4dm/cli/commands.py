"""What each command does: parse-free functions of the parsed arguments, a page each at most."""

from __future__ import annotations

import json
from dataclasses import fields
from pathlib import Path

import torch
from accelerate import PartialState

from ..calibration.collect import collect as collect_store
from ..calibration.store import CalibrationStore
from ..errors import UserError
from ..evaluation.evaluate import EvaluateConfig, evaluate_images, write_reference
from ..evaluation.evaluate import evaluate as evaluate_model
from ..evaluation.report import format_report
from ..layers.view import find_layers
from ..pipelines.denoiser import denoiser
from ..pipelines.generate import generate as generate_images
from ..pipelines.generate import save_grid
from ..pipelines.load import EMBEDDED, load_pipeline
from ..quantization.diffusers_bridge import quantization_config
from ..quantization.quantize import quantize as quantize_model
from ..quantization.report import kernel_report, stored_bytes
from ..quantization.saving import RECORD, check_output, make_parent, original_of, save_quantized
from .options import (
    calibration_of,
    conditioning_of,
    default_model,
    device_of,
    fitting,
    load,
    one_process,
    recipe_of,
    say,
    steps_of,
)


def collect(args) -> None:
    config = calibration_of(args)
    one_process(args)
    if args.plot_layer and not args.plot:
        raise UserError("--plot-layer names the layer of a picture; give --plot PNG too.")
    if args.plot:
        make_parent(Path(args.plot))
    pipe = load(args, args.model)
    if args.plot_layer and args.plot_layer not in {view.name for view in find_layers(denoiser(pipe))}:
        raise UserError(f"the model has no layer '{args.plot_layer}' to draw; `ptq4dm info` lists them.")
    config = fitting(config, args, pipe)
    store = collect_store(pipe, config, args.output, **conditioning_of(args))
    print(f"calibration store of {len(store.calls)} tuples, {len(store.fingerprint)} layers: {args.output}")
    if args.plot:
        from ..calibration.plot import plot_ranges

        plot_ranges(store, args.plot_layer or next(iter(store.fingerprint)), args.plot)
        print(f"picture: {args.plot}")


def quantize(args) -> None:
    config, calibration = recipe_of(args), calibration_of(args)
    one_process(args)
    output = Path(args.output)
    check_output(output)
    if args.plot:
        if args.method != "svdquant":
            raise UserError("--plot draws a low-rank branch, which only --method svdquant makes.")
        make_parent(Path(args.plot))
    store = CalibrationStore.load(args.calibration) if args.calibration else None
    pipe = load(args, args.model)
    find_layers(denoiser(pipe), config.modules_to_not_convert)  # a pattern that names nothing is told at once
    if store is None and config.needs_calibration and config.plan is None:
        store = collect_store(pipe, fitting(calibration, args, pipe), **conditioning_of(args))
    weights = dict(denoiser(pipe).named_parameters()) if args.plot else {}
    report = quantize_model(pipe, config, store)
    if args.plot:
        _plot_branch(args, denoiser(pipe), report, weights)
    save_quantized(pipe, {"model": args.model, "dtype": str(denoiser(pipe).dtype), **report.to_dict()}, output)
    print(report.table())
    print(f"all {len(report.layers)} layers: {output / RECORD}")
    print(f"quantized pipeline: {output}")
    if args.plot:
        print(f"picture: {args.plot}")


def generate(args) -> None:
    model = default_model(args)
    if args.num_images < 1:
        raise UserError(f"{args.num_images} images asked for; --num-images must be at least 1.")
    picture = Path(args.picture or f"{args.output}.png")
    if args.picture:
        make_parent(picture)
    pipe = load(args, model)
    paths = generate_images(
        pipe,
        range(args.seed, args.seed + args.num_images),
        args.output,
        num_inference_steps=steps_of(args, pipe),
        batch_size=args.batch_size,
        metadata={"model": str(model)},
        **conditioning_of(args),
    )
    if PartialState().is_main_process:
        save_grid(paths, picture, columns=min(8, len(paths)), scale=max(1, 128 // _width(paths[0])))
        print(f"{len(paths)} images of {model}: {args.output}")
        print(f"picture: {picture}")


def evaluate(args) -> None:
    config = EvaluateConfig(
        **{f.name: v for f in fields(EvaluateConfig) if (v := getattr(args, f.name, None)) is not None},
        **conditioning_of(args),
    )
    config.check()
    if args.write_reference and not args.images:
        raise UserError("--write-reference takes the statistics of a folder of images; give it with --images.")
    if args.images:
        device = device_of(args)
        if args.write_reference:
            make_parent(Path(args.write_reference))
            count = write_reference(args.images, args.write_reference, config, device)
            say(f"statistics of {count} images: {args.write_reference}")
        else:
            say(format_report(evaluate_images(args.images, config, device)))
        return
    model = default_model(args)
    pipe = load(args, model)
    config.num_inference_steps = steps_of(args, pipe)
    original = args.full_precision or original_of(model)
    try:
        full_precision = load(args, original) if original else None
    except UserError as error:
        if args.full_precision:
            raise
        raise UserError(
            f"{model} was quantized from another model: {error} Name it with --full-precision."
        ) from error
    if full_precision is not None:  # the models are compared, not two samplers
        full_precision.scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config)
    report = evaluate_model(pipe, full_precision, config, args.output)
    sampler = f"{type(pipe.scheduler).__name__}" + (f" ({args.sampler})" if args.sampler else "")
    say(f"{model}" + (f" against {original}" if original else "") + f", {sampler}")
    say(format_report(report))
    say(f"report:  {Path(args.output) / 'report.json'}")
    if (Path(args.output) / "samples.png").is_file():
        say(f"picture: {Path(args.output) / 'samples.png'}")


def bench(args) -> None:
    {"samplers": _bench_samplers, "tune": _bench_tune}[args.subject](args)


def _bench_samplers(args) -> None:
    from ..samplers.comparison.compare import SamplerBench, bench_samplers
    from ..samplers.comparison.table import plot_rows, table

    one_process(args)
    given = {name: getattr(args, name) for name in ("samplers", "evaluations") if getattr(args, name)}
    config = SamplerBench(num_images=args.num_images, batch_size=args.batch_size, seed=args.seed, **given)
    output = Path(args.output) / "samplers.json"
    make_parent(output)
    pipe = load(args, args.model)
    settings = {"model": str(args.model), "dtype": str(denoiser(pipe).dtype).removeprefix("torch.")}
    rows = bench_samplers(pipe, config, output, settings)
    print(f"feature-FID of {args.model}, {args.num_images} images, by evaluations of the model")
    print(table(rows))
    print(f"figures: {output}")
    if plot_rows(str(args.model), rows, output.with_suffix(".png")):
        print(f"picture: {output.with_suffix('.png')}")


def _bench_tune(args) -> None:
    from . import tune

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
    if shapes:
        cases = tune.linear_cases(shapes)
    elif args.model or not args.kernels or tune.W8A8 in args.kernels:
        model = args.model or "unet-cifar10"
        batch = args.batch_size or (256 if model in EMBEDDED else 1)
        cases = tune.cases_of_pipeline(load(args, model), batch, **conditioning_of(args))
        shapes = tune.linear_shapes(cases) if args.model else tune.known_shapes()
        torch.cuda.empty_cache()
    else:
        shapes, cases = tune.known_shapes(), []
    output = Path(args.output) if args.output else None
    tune.tune(tune.plan(args.kernels, shapes, cases), output, args.minutes and 60 * args.minutes)
    if output is not None:
        from ..kernels.runtime.settings import tuned_file

        print(f"the kernels do not look there; to use it, copy it to {tuned_file()}")


def distill(args) -> None:
    from ..samplers.distillation.config import DisBackConfig
    from ..samplers.distillation.disback import distill as distill_model
    from ..samplers.distillation.log import read_log
    from ..samplers.distillation.student import RECORD, save_student

    given = {f.name: getattr(args, f.name) for f in fields(DisBackConfig) if hasattr(args, f.name)}
    dtype = args.dtype or ("bfloat16" if device_of(args).type == "cuda" else "float32")
    precision = {"float32": "no", "bfloat16": "bf16"}.get(dtype, dtype)
    config = DisBackConfig(**given, precision=precision)
    output = Path(args.output)
    check_output(output, RECORD, "distill")
    pipe = load_pipeline(args.model, torch.float32, device_of(args))
    run = output.with_name(f"{output.name}.run")
    student = distill_model(pipe, config, run, args.resume)
    if PartialState().is_main_process:
        save_student(student, {"model": str(args.model), **config.identity()}, output)
        evaluations = (line for line in read_log(run / "log.jsonl") if line["stage"] == "evaluation")
        learnt = max((line["images"] for line in evaluations), default=0)
        more = "" if learnt >= config.images else " (--resume goes on)"
        print(f"one-step student after {learnt} of {config.images} images{more}: {output}")
        print(f"log, sample grids, checkpoint: {run}")


def info(args) -> None:
    model = default_model(args)
    pipe = load(args, model)
    network = denoiser(pipe)
    rows = kernel_report(network)
    config = quantization_config(network)
    facts = {
        "model": str(model),
        "pipeline": type(pipe).__name__,
        "denoiser": type(network).__name__,
        "scheduler": type(pipe.scheduler).__name__,
        "quantization": None if config is None else config.summary(),
        "bytes": stored_bytes(network),
        "layers": rows,
    }
    if args.json:
        print(json.dumps(facts, indent=1))
        return
    for name in ("model", "pipeline", "denoiser", "scheduler"):
        print(f"{name:<13} {facts[name]}")
    options = ", ".join(f"{name} {value}" for name, value in (facts["quantization"] or {}).items()) or "none"
    print(f"{'quantization':<13} {options}")
    print(f"{'bytes':<13} {facts['bytes']:,} in all tensors of the denoiser")
    print(f"\n{'bytes':>12}  {'format':<24} {'kernel':<13} {'shape':<20} layer")
    for row in rows:
        shape = "x".join(map(str, row["shape"]))
        print(f"{row['bytes']:>12,}  {row['format']:<24} {row['kernel']:<13} {shape:<20} {row['layer']}")


def leave_process_group() -> None:
    """Processes that end without this may die at exit after all their work is done."""
    if PartialState._shared_state:
        PartialState().destroy_process_group()


def _plot_branch(args, model, report, weights: dict) -> None:
    from ..svdquant.plot import plot_branch

    branched = [
        row["layer"] for row in report.layers if getattr(model.get_submodule(row["layer"]), "up", None) is not None
    ]
    name = args.plot_layer or (branched[0] if branched else "")
    if name not in branched:
        raise UserError(
            f"--plot: '{name}' has no low-rank branch" if name else "--plot: no layer has a low-rank branch."
        )
    plot_branch(weights[f"{name}.weight"], model.get_submodule(name), name, args.plot)


def _width(path: Path) -> int:
    from PIL import Image

    with Image.open(path) as image:
        return image.width
