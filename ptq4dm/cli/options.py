"""What the arguments of a command stand for: a device, a pipeline, a calibration, a recipe."""

from __future__ import annotations

from dataclasses import fields, replace
from pathlib import Path

import torch
from accelerate import PartialState

from ..calibration.collect import CalibrationConfig
from ..errors import UserError
from ..layers.plan import Plan
from ..pipelines.load import check_device, load_pipeline
from ..pipelines.sampling import default_steps
from ..quantization.recipe import METHODS, QuantConfig
from ..quantization.saving import RECORD

QUANTIZED = "out/quantized"  # where `quantize` writes and the others look first
CALIBRATION_STEPS = 20
STEPS = 50  # of `generate` and `evaluate`, but for models that were distilled to one


def say(text: str) -> None:
    if PartialState().is_main_process:
        print(text)


def device_of(args) -> torch.device:
    """The device asked for; else this process's own GPU, else the CPU."""
    if args.device is not None:
        device = check_device(args.device)
        PartialState(cpu=device.type == "cpu")
        return device
    return PartialState(cpu=not torch.cuda.is_available()).device


def one_process(args) -> None:
    device_of(args)
    if PartialState().num_processes > 1:
        raise UserError("this command runs as one process; launch only generate and evaluate with accelerate.")


def load(args, model):
    device = device_of(args)
    dtype = args.dtype or ("bfloat16" if device.type == "cuda" else "float32")
    pipe = load_pipeline(model, getattr(torch, dtype), device)
    name, order, grid = (getattr(args, key, None) for key in ("sampler", "order", "grid"))
    if name is not None:
        from ..samplers.catalog import make_sampler

        pipe.scheduler = make_sampler(name, pipe.scheduler.config, order, grid)
    elif order is not None or grid is not None:
        raise UserError("--order and --grid belong to a sampler; name one with --sampler.")
    return pipe


def default_model(args) -> str:
    if args.model is not None:
        return args.model
    return QUANTIZED if (Path(QUANTIZED) / RECORD).is_file() else "unet-cifar10"


def calibration_of(args) -> CalibrationConfig:
    return CalibrationConfig(
        args.collector,
        args.num_samples,
        CALIBRATION_STEPS if args.calibration_steps is None else args.calibration_steps,
        args.mu,
        args.sigma,
        args.num_bins,
        args.batch_size,
        args.seed,
    )


def steps_of(args, pipe) -> int:
    """Of the sampler: as the user says, or what the model takes."""
    return default_steps(pipe, STEPS) if args.num_inference_steps is None else args.num_inference_steps


def fitting(config: CalibrationConfig, args, pipe) -> CalibrationConfig:
    """The same with the steps of a model that was distilled to one, unless the user says how many."""
    if args.calibration_steps is not None:
        return config
    return replace(config, num_inference_steps=default_steps(pipe, config.num_inference_steps))


def conditioning_of(args) -> dict:
    conditioning = {"prompt": args.prompt, "class_labels": args.class_labels}
    conditioning = {name: values for name, values in conditioning.items() if values}
    kwargs = {} if args.guidance_scale is None else {"guidance_scale": args.guidance_scale}
    return {"conditioning": conditioning or None, "pipeline_kwargs": kwargs or None}


def recipe_of(args) -> QuantConfig:
    others = {"calibration", "plan", "seed"}  # no options of a method on the command line
    names = {f.name for method in METHODS.values() for f in fields(method)} - others
    options = {name: getattr(args, name) for name in sorted(names) if hasattr(args, name)}
    if args.plan is not None:
        if options:
            flags = ", ".join(f"--{name.replace('_', '-')}" for name in options)
            raise UserError(f"--plan has settled every choice of the method; leave out {flags}.")
        plan = Plan.load(args.plan)
        return QuantConfig.from_dict({"method": plan.method, "plan": plan})
    return QuantConfig.from_dict({"method": args.method, **options})
