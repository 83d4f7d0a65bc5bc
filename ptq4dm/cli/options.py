"""What verbs share: groups of options, and what they stand for (a device, a pipeline, a calibration)."""

from __future__ import annotations

import os
from collections.abc import Collection
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState

from ..caching.plan_steps import MOST_REUSE, StepPlanConfig, plan_cached_steps
from ..caching.step_plan import StepPlan
from ..calibration.collect import CalibrationConfig
from ..calibration.store import CalibrationStore
from ..errors import UserError
from ..evaluation.evaluate import EvaluateConfig
from ..inference import engines
from ..inference.optimize import optimize
from ..inference.report import Optimized
from ..pipelines.devices import DTYPES, check_device
from ..pipelines.load import EMBEDDED, folder_of, load_pipeline
from ..pipelines.prompt_embeds import read_prompt_embeds
from ..pipelines.sampling import default_steps
from ..progress import note
from ..quantization.saving import RECORD, original_of
from .flags import add_flags, flag_of, given

EXAMPLE = EMBEDDED[0]  # the model where none is named
QUANTIZED = "out/quantized"  # where `quantize` writes and the others look first
QUANTIZED_FIRST = f"{QUANTIZED} if `quantize` made it, else {EXAMPLE}"
STEPS = EvaluateConfig.num_inference_steps  # but for models that were distilled to one
BATCH_SIZE = 16
SAMPLER = ("sampler", "order", "grid")
SIZES = ("height", "width", "num_frames")
CONDITIONING = ("prompt", "prompt_embeds", "class_labels", "guidance_scale", "guidance_interval", *SIZES)
MOST_SIZE = 1_000_000  # beyond which nobody means what they say
WITHOUT_EFFECT = ("batch_size",)  # on which calls a store holds


def add_model(parser, default: str | None = EXAMPLE, note: str = "") -> None:
    text = f"hub id, diffusers folder, or embedded name ({', '.join(EMBEDDED)})"
    text = f"{text}; {note}" if note else text
    parser.add_argument("--model", default=default, help=text).known = EMBEDDED  # for completion
    add_device(parser)


def add_device(parser) -> None:
    parser.add_argument("--device", help="cpu, cuda, cuda:1; a GPU if there is one")
    parser.add_argument("--dtype", type=dtype_name, choices=DTYPES, help="float32 on a CPU, bfloat16 on a GPU")


def dtype_name(text: str) -> str:
    """ "torch.float16", as diffusers writes it, is "float16"."""
    return text.removeprefix("torch.")


def settings_of(args, *besides: str) -> dict[str, str]:
    """All that a command was told, as text, but how it prints and what is named in `besides`: two runs at once with
    the same are one job."""
    return {name: str(value) for name, value in vars(args).items() if name not in ("quiet", "json", *besides)}


def add_component(parser) -> None:
    text = "the one network of the pipeline (transformer_2, controlnet, ...); all denoisers otherwise"
    parser.add_argument("--component", metavar="NAME", help=text)


def add_steps(parser) -> None:
    text = f"{STEPS}, or what the model was distilled to, or the most that its schedule was fitted for"
    parser.add_argument("--num-inference-steps", "--steps", type=int, help=text)


def add_sampler(parser) -> None:
    group = parser.add_argument_group("sampler")
    group.add_argument(
        "--sampler",
        metavar="NAME",
        help="ddim, deis, a solver of it (ipndm, t_ab, rho_ab, log_rho, rho_rk), a setting such as t_ab3/quad, or "
        "rho_rk-3heun/edm, .../clean (ends at clean data), or diffusers/ with ddim, deis, dpm++2m, dpm++3m, unipc, "
        "euler, heun, some with -karras; fitted, or a folder that `bench samplers --fit` wrote; the model's own "
        "otherwise",
    )
    group.add_argument("--order", type=int, choices=range(4), help="of a DEIS solver; 0 is DDIM")
    group.add_argument("--grid", help="timesteps: linear, quad, cubic, log, edm, beta, linspace, leading or trailing")


def add_optimize(parser) -> None:
    text = "what is fastest on this device: fused, blocks compiled, CUDA graphs; the first images take minutes"
    parser.add_argument("--optimize", action="store_true", help=text)
    text = (
        "with --optimize: memory such as 4GB for weights of 4 bits that are kept in 8, so that no call unpacks them"
    )
    parser.add_argument("--weight-cache", metavar="SIZE", help=text)
    text = "with --optimize: auto, self-attention in 8 bits where that is measured to be faster on this GPU"
    parser.add_argument("--attention", choices=("auto",), help=text)
    text = "run the denoiser on the CPU through another library: openvino (pip install 'ptq4dm[openvino]')"
    parser.add_argument("--engine", help=text)


def check_optimize(args) -> None:
    """Before anything is loaded: flags of `add_optimize` and `add_reuse` that do not go together are a UserError."""
    more = {"weight-cache": args.weight_cache, "attention": args.attention}
    if not args.optimize and (name := next((name for name, value in more.items() if value is not None), "")):
        raise UserError(f"--{name} is a part of --optimize; give both.")
    engines.check(args.engine, None, None, {})
    if args.engine and args.optimize:
        raise UserError("--optimize is for PyTorch's own kernels; leave it out with --engine.")
    if args.engine and args.reuse is not None:
        raise UserError(
            "--reuse is for PyTorch's own forward, and --engine computes a network whole; give one of them."
        )
    if args.reuse is not None and (share := _share(args.reuse)) is not None and not 0 <= share <= MOST_REUSE:
        raise UserError(f"--reuse is a share of steps from 0 to {MOST_REUSE}, or a JSON file; got {args.reuse}.")


def optimized(args, model, pipe) -> Optimized | None:
    """What `--optimize` and `--engine` make of a pipeline; None without them. An engine's conversions are saved in
    the model's folder, if it is a user's own."""
    if args.engine is None:
        return optimize(pipe, weight_cache=args.weight_cache, attention=args.attention) if args.optimize else None
    folder = folder_of(model)
    own = str(model) not in EMBEDDED and folder.is_dir() and os.access(folder, os.W_OK)
    return optimize(pipe, engine=args.engine, cache=folder / args.engine if own else None)


def add_reuse(parser) -> None:
    text = (
        "steps that reuse the deep part of the network: the share of them, such as 0.4, planned for this model and "
    )
    text += "sampler first; or the JSON file of a plan"
    parser.add_argument("--reuse", metavar="SHARE|JSON", help=text)


def reused(args, pipe, conditioning: dict) -> StepPlan | None:
    """The plan that `--reuse` names, or one made for this pipeline; None without it. conditioning: of `sample`."""
    if args.reuse is None:
        return None
    if (share := _share(args.reuse)) is None:
        return StepPlan.load(args.reuse)
    config = StepPlanConfig(num_inference_steps=steps_of(args, pipe), reuse=share)
    return plan_cached_steps(pipe, config, **conditioning)


def _share(text: str) -> float | None:
    """The number that a text is; None for the name of a file."""
    try:
        return float(text)
    except ValueError:
        return None


def conditions(args, optimized: bool, plan: StepPlan | None) -> dict[str, Any]:
    """What decides pictures and is in no folder of the model: how it was optimized, and which steps reuse a part."""
    found: dict[str, Any] = {}
    if optimized:  # its pictures differ by rounding, and with another attention by more
        found |= {"engine": args.engine} if args.engine else {"optimized": True}
        found |= {"attention": args.attention} if args.attention else {}
    if plan is not None:
        found["reuse"] = {"weights": [list(row) for row in plan.weights], "depth": plan.depth}
    return found


def add_calibration(parser) -> None:
    group = parser.add_argument_group("calibration")
    add_flags(group, CalibrationConfig)
    text = f"steps of the sampler that calls are taken from; {CalibrationConfig.num_inference_steps}, or what the "
    group.add_argument("--calibration-steps", type=int, help=text + "model was distilled to")


def add_conditioning(parser) -> None:
    group = parser.add_argument_group("conditioning")
    group.add_argument("--prompt", nargs="+", metavar="TEXT", help="image k gets prompt k mod their number")
    text = "safetensors file of prompts that were encoded elsewhere: prompt_embeds [K, L, D] and what else the "
    text += "pipeline takes of its encode_prompt, such as pooled_prompt_embeds [K, D]; image k gets row k mod K"
    group.add_argument("--prompt-embeds", metavar="FILE", help=text)
    group.add_argument("--class-labels", nargs="+", type=int, metavar="N", help="likewise; all classes otherwise")
    group.add_argument("--guidance-scale", type=float, help="for pipelines that take one")
    text = "guidance only here, in shares of the schedule (0 is data, 1 noise); elsewhere half of the work"
    group.add_argument("--guidance-interval", type=float, nargs=2, metavar=("LOW", "HIGH"), help=text)
    group.add_argument("--height", type=int, help="of pictures or frames, in pixels; the pipeline's own otherwise")
    group.add_argument("--width", type=int, help="likewise")
    group.add_argument("--num-frames", type=int, help="of a video; the pipeline's own otherwise")


def device_of(args) -> torch.device:
    """The device asked for; else this process's own GPU, else the CPU."""
    if args.device is not None:
        device = check_device(args.device)
        PartialState(cpu=device.type == "cpu")
        return device
    return PartialState(cpu=not torch.cuda.is_available()).device


def one_process(args) -> None:
    """Raises UserError under a launch of several processes."""
    device_of(args)
    if PartialState().num_processes > 1:
        raise UserError("this command runs as one process; launch only generate and evaluate with accelerate.")


def dtype_of(args) -> str:
    """The dtype asked for; else what is quickest on the device."""
    return args.dtype or ("bfloat16" if device_of(args).type == "cuda" else "float32")


def trained_dtype_of(args) -> str:
    """The same for training. Raises UserError for float16."""
    if args.dtype == "float16":
        raise UserError("float16 overflows where gradients are; give --dtype bfloat16 or float32.")
    return dtype_of(args)


def load(args, model):
    """The pipeline of `model`, with the sampler that the arguments name."""
    pipe = load_pipeline(model, dtype_of(args), device_of(args))
    name, order, grid = (getattr(args, key, None) for key in ("sampler", "order", "grid"))
    if name is not None:
        from ..samplers.catalog import FITTED, check_fixed, make_sampler
        from ..samplers.comparison.compare import is_benched
        from ..samplers.fitting.saved import fitted_beside, fitted_elsewhere

        own = [one for one in (model, original_of(model)) if one is not None]
        if name == FITTED:
            check_fixed(name, order, grid)
            name = str(fitted_beside(own, is_benched(pipe)))
        pipe.scheduler = make_sampler(name, pipe.scheduler.config, order, grid)
        if other := fitted_elsewhere(pipe.scheduler, own):
            note(f"the schedule was fitted to {other}, not to {model}; what it gives here was not looked at.")
    elif order is not None or grid is not None:
        raise UserError("--order and --grid belong to a sampler; name one with --sampler.")
    return pipe


def default_model(args) -> str:
    """The model asked for; else what `quantize` made; else an embedded one."""
    if args.model is not None:
        return args.model
    return QUANTIZED if (Path(QUANTIZED) / RECORD).is_file() else EXAMPLE


def calibration_of(args) -> CalibrationConfig:
    steps = {} if args.calibration_steps is None else {"num_inference_steps": args.calibration_steps}
    config = CalibrationConfig(**given(args, CalibrationConfig), **steps)
    if config.collector != "ndtc":
        check_idle(args, ("mu", "sigma"), f"the collector {config.collector} has no normal law, as ndtc has")
    return config


def check_kept(args, store: CalibrationStore, others: Collection[str] = ()) -> None:
    """Raises UserError where flags ask for calls that a store, which is there already, was not collected with.

    others: options that something else than the calibration has, too.
    """
    asked = {name: value for name, value in given(args, CalibrationConfig).items() if name not in others}
    asked = {flag_of(name): (name, value) for name, value in asked.items() if name not in WITHOUT_EFFECT}
    if args.calibration_steps is not None:
        asked["--calibration-steps"] = "num_inference_steps", args.calibration_steps
    for flag, (name, value) in asked.items():
        if store.config.get(name) != value:
            held = f"with {store.config[name]}" if name in store.config else "in another way"
            raise UserError(
                f"the store {args.calibration} was collected {held}, so that {flag} {value} would change nothing; "
                "leave it out, or collect another store."
            )


def fitting(config: CalibrationConfig, args, pipe) -> CalibrationConfig:
    """The same with the steps of a model that was distilled to one, unless the user says how many."""
    if args.calibration_steps is not None:
        return config
    return replace(config, num_inference_steps=default_steps(pipe, config.num_inference_steps))


def steps_of(args, pipe) -> int:
    """The sampler's steps: as the user says, or what the model takes."""
    return default_steps(pipe, STEPS) if args.num_inference_steps is None else args.num_inference_steps


def conditioning_of(args) -> dict:
    """The arguments `conditioning` and `pipeline_kwargs` of `sample`."""
    conditioning = {"prompt": args.prompt, "class_labels": args.class_labels}
    conditioning = {name: values for name, values in conditioning.items() if values}
    if args.prompt_embeds is not None:
        if "prompt" in conditioning:
            raise UserError("--prompt and --prompt-embeds are two ways to give prompts; give one.")
        conditioning |= read_prompt_embeds(args.prompt_embeds)
    for name in SIZES:
        if (value := getattr(args, name)) is not None and not 1 <= value <= MOST_SIZE:
            raise UserError(f"{flag_of(name)} must be from 1 to {MOST_SIZE}; got {value}.")
    kwargs = {
        name: getattr(args, name)
        for name in ("guidance_scale", "guidance_interval", *SIZES)
        if getattr(args, name) is not None
    }
    return {"conditioning": conditioning or None, "pipeline_kwargs": kwargs or None}


def check_idle(args, names: Collection[str], why: str) -> None:
    """Raises UserError where any of these options was given, which would change nothing."""
    if idle := [flag_of(name) for name in names if getattr(args, name, None) is not None]:
        left = "them" if idle[1:] else "it"
        raise UserError(f"{why}, so that {', '.join(idle)} would change nothing; leave {left} out.")
