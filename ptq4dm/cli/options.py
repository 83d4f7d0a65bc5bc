"""What verbs share: groups of options, and what they stand for (a device, a pipeline, a calibration)."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace
from pathlib import Path

import torch
from accelerate import PartialState

from ..calibration.collect import CalibrationConfig
from ..calibration.store import CalibrationStore
from ..errors import UserError
from ..evaluation.evaluate import EvaluateConfig
from ..pipelines.devices import DTYPES, check_device
from ..pipelines.load import EMBEDDED, load_pipeline
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
        "unipc3, euler, heun, some with -karras; fitted, or a folder that `bench samplers --fit` wrote; the model's "
        "own otherwise",
    )
    group.add_argument("--order", type=int, choices=range(4), help="of a DEIS solver; 0 is DDIM")
    group.add_argument("--grid", help="timesteps: linear, quad, cubic, log, edm, beta, linspace, leading or trailing")


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


def check_metric(args, metric: str) -> None:
    """Raises UserError where an option of a Frechet distance was given, and this metric has no use for it."""
    if metric != "fid":
        check_idle(args, ("inception_weights", "resize"), f"metric {metric} does not use Inception")
    if metric == "none":
        check_idle(args, ("reference",), "metric none measures no Frechet distance")
