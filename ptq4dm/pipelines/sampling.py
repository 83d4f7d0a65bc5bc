"""Seeds in, images out: one call of any diffusers pipeline in which image k depends on seeds[k] alone."""

from __future__ import annotations

import inspect
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from functools import partial
from typing import Any

import torch

from ..checks import MOST, check, checked, seeds_of, shown, whole
from ..errors import UserError
from ..files.outside import reason
from ..hooks import is_unwatched, unwatched
from ..interrupts import one_interrupt, uninterrupted
from ..progress import shown as bars_shown
from .denoiser import check_sampled, class_count, denoiser, denoiser_names, device_of, evaluation_mode, turn_at
from .guidance import check_interval, guided_within, way_of
from .loading import not_while_loading
from .noise import float32_noise
from .prompt_embeds import lacks_encoders
from .stepping import scheduler_fit

MOST_STEPS, MOST_BATCH = 100_000, 1_000_000  # beyond which nobody means what they say
OWNED = ("generator", "num_inference_steps", "batch_size", "output_type", "return_dict")


def default_steps(pipe, otherwise: int) -> int:
    """The steps to take where nobody says how many: 1 for a model that was distilled to one, of a fitted schedule
    the most that it was fitted for."""
    scheduler = getattr(pipe, "scheduler", None)
    fitted = getattr(scheduler, "fitted_for", None)
    return getattr(scheduler, "fixed_steps", None) or (max(fitted) if fitted else otherwise)


def check_steps(pipe, num_inference_steps: int) -> int:
    """The steps. Raises UserError for none, for more than the model was trained with, or other than its one."""
    num_inference_steps = whole(num_inference_steps, "num_inference_steps", -MOST, MOST_STEPS)
    if num_inference_steps < 1:
        raise UserError(f"sampling needs at least one step, not {num_inference_steps}.")
    if default_steps(pipe, num_inference_steps) != num_inference_steps:
        pipe.scheduler.set_timesteps(num_inference_steps)  # says which it takes
    scheduler = getattr(pipe, "scheduler", None)
    limit = None if scheduler is None else scheduler.config.get("num_train_timesteps")
    if limit is not None and 1 < limit < num_inference_steps:  # 1: times are shares, not counted
        raise UserError(f"{num_inference_steps} steps are more than the {limit} that the model was trained with.")
    return num_inference_steps


def check_arguments(conditioning: Any, pipeline_kwargs: Any) -> None:
    """Raises UserError unless both are dicts by the names of arguments, and a pipeline's numbers are finite."""
    check(conditioning, dict[str, Any] | None, "conditioning")
    check(pipeline_kwargs, dict[str, Any] | None, "pipeline_kwargs")
    for name, value in (pipeline_kwargs or {}).items():
        if isinstance(value, (int, float)):
            check(value, bool | int | float, name)


@contextmanager
def refusals(pipe, conditioning: dict | None, pipeline_kwargs: dict | None) -> Iterator[None]:
    """What a pipeline raises in this block when it is called with arguments of the user's becomes a UserError.

    Whether an argument has the right type and shape the pipeline alone knows, and some notice deep in a network.
    """
    try:
        yield
    except (UserError, torch.OutOfMemoryError):
        raise
    except (ArithmeticError, AssertionError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as e:
        if not (conditioning or pipeline_kwargs):
            raise
        names = ", ".join([*(conditioning or ()), *(pipeline_kwargs or ())])
        raise UserError(f"{type(pipe).__name__} cannot be called with this {names}: {reason(e)}.") from e


@contextmanager
def scheduler_refusals(alone: bool) -> Iterator[None]:
    """What one of diffusers' schedulers fails with in this block becomes a UserError that names its file.

    diffusers takes any value in a scheduler's configuration, and notices when it counts. alone: False where the user
    gave arguments, of which `refusals` tells.
    """
    try:
        yield
    except (UserError, torch.OutOfMemoryError):
        raise
    except (ArithmeticError, LookupError, NotImplementedError, TypeError, ValueError) as error:
        frame = error.__traceback__
        while frame is not None and not frame.tb_frame.f_globals["__name__"].startswith("diffusers.schedulers."):
            frame = frame.tb_next
        if frame is None or not alone:
            raise
        raise UserError(
            f"the scheduler cannot sample as it is configured (scheduler_config.json): {reason(error)}."
        ) from error


def choose_conditioning(
    pipe, seeds: Sequence[int], conditioning: dict[str, Sequence] | None, given: Collection[str] = ()
) -> dict:
    """The pipeline arguments that differ between images: {name: one value per seed}; see `sample`.

    given: names of the arguments that all images share.
    """
    parameters = inspect.signature(pipe.__call__).parameters
    conditioning = dict(conditioning or {})
    name = type(pipe).__name__
    if "class_labels" in parameters and "class_labels" not in conditioning:
        conditioning["class_labels"] = range(class_count(pipe) or 1)
    embedded = any(key.startswith("prompt_embed") for key in [*conditioning, *given])
    if "prompt" in parameters and not embedded:
        if lacks_encoders(pipe):
            raise UserError(
                f"this {name} has no text encoder: give prompts as embeddings, "
                "conditioning={'prompt_embeds': tensor, ...} (--prompt-embeds)."
            )
        if "prompt" not in conditioning:
            raise UserError(f"{name} needs a prompt: pass conditioning={{'prompt': [...]}} (--prompt).")
    chosen = {}
    for key, values in conditioning.items():
        if key not in parameters:
            raise UserError(f"{name} takes no '{key}'; leave it out of the conditioning.")
        values = [values] if isinstance(values, str) else values
        if not hasattr(values, "__getitem__") or isinstance(values, (bytes, Mapping)) or _dimensionless(values):
            raise UserError(f"the conditioning '{key}' must be a list, or a tensor of rows; got {shown(values)}.")
        if len(values) == 0:
            raise UserError(f"the conditioning '{key}' is empty; give at least one value.")
        rows = [s % len(values) for s in seeds]
        # Embeddings come as one tensor [K, ...]; prompts and labels as sequences.
        if isinstance(values, torch.Tensor):
            chosen[key] = _placed(values[rows], pipe)
        else:
            chosen[key] = [values[r] for r in rows]
    return chosen


def _placed(values: torch.Tensor, pipe) -> torch.Tensor:
    """Embeddings where a pipeline computes and in its dtype, as those are that it makes itself; a mask as it is."""
    dtype = denoiser(pipe).dtype if values.is_floating_point() else values.dtype
    return values.to(device_of(pipe), dtype)


def _dimensionless(values: Any) -> bool:
    return not hasattr(values, "__len__") or getattr(values, "shape", None) == ()


@contextmanager
def _quiet(pipe, progress: bool) -> Iterator[None]:
    """Evaluation mode (dropout draws from the global generator), no inner progress bar; restores both."""
    with ExitStack() as stack:
        for name in denoiser_names(pipe):
            stack.enter_context(evaluation_mode(getattr(pipe, name)))
        had, before = "_progress_bar_config" in vars(pipe), getattr(pipe, "_progress_bar_config", {})
        try:
            if not (progress and bars_shown()):
                pipe._progress_bar_config = {**before, "disable": True}
            yield
        finally:
            with uninterrupted():
                vars(pipe).pop("_progress_bar_config", None)
                if had:
                    pipe._progress_bar_config = before


@contextmanager
def _ready(pipe, progress: bool) -> Iterator[None]:
    with _quiet(pipe, progress), float32_noise(pipe), scheduler_fit(pipe), torch.no_grad():
        yield


def call_pipeline(
    pipe,
    seeds: Sequence[int],
    *,
    num_inference_steps: int,
    conditioning: dict[str, Sequence] | None = None,
    pipeline_kwargs: dict | None = None,
    progress: bool = False,
    bare: bool = False,
) -> Any:
    """Run the pipeline once, for len(seeds) images, videos or sounds; returns what it returns. See `sample`.

    bare: one generator and one text instead of lists of one, for pipelines that take no lists.
    """
    check_sampled(pipe, use=True)
    seeds = seeds_of(seeds)
    check_arguments(conditioning, pipeline_kwargs)
    num_inference_steps = check_steps(pipe, num_inference_steps)
    pipeline_kwargs = dict(pipeline_kwargs or {})
    compare = getattr(getattr(pipe, "scheduler", None), "compare_arguments", None)
    if compare is not None and not is_unwatched():  # a schedule that was fitted with others says so
        compare(pipe, pipeline_kwargs)
    interval = pipeline_kwargs.pop("guidance_interval", None)
    parameters = inspect.signature(pipe.__call__).parameters
    arguments = choose_conditioning(pipe, seeds, conditioning, pipeline_kwargs)
    for key, value in pipeline_kwargs.items():
        if key in OWNED or key in arguments or key in ("prompt", "class_labels"):
            raise UserError(f"'{key}' cannot be set through pipeline_kwargs; sample has its own way to set it.")
        if key not in parameters:
            raise UserError(f"{type(pipe).__name__} takes no argument '{key}'.")
        arguments[key] = value
    if "batch_size" in parameters:
        arguments["batch_size"] = len(seeds)
    if "num_inference_steps" in parameters:
        arguments["num_inference_steps"] = num_inference_steps
    else:  # pipelines of several stages name each
        arguments |= {key: num_inference_steps for key in parameters if key.endswith("num_inference_steps")}
    if "output_type" in parameters:
        arguments["output_type"] = "pt"
    generators = [torch.Generator("cpu").manual_seed(s) for s in seeds]
    if "generator" in parameters:
        arguments["generator"] = generators[0] if bare else generators
    if bare:
        strings = [key for key in arguments if key in (conditioning or ()) and isinstance(arguments[key][0], str)]
        arguments |= {key: arguments[key][0] for key in strings}
    within: AbstractContextManager = nullcontext()
    if interval is not None:
        interval, few = check_interval(interval), seeds[:2]
        run = partial(call_pipeline, pipe, few, num_inference_steps=num_inference_steps, conditioning=conditioning)
        run = partial(run, pipeline_kwargs=pipeline_kwargs, bare=bare)
        with turn_at(pipe), unwatched():
            way = way_of(pipe, run, num_inference_steps, sorted(conditioning or ()), pipeline_kwargs, bare)
        within = guided_within(pipe, way, interval)
    with turn_at(pipe), not_while_loading(), one_interrupt(opened=False) as gate, _ready(pipe, progress), within:
        try:
            gate.open = True  # while the pipeline is made ready, and put back, an interrupt waits
            with scheduler_refusals(not pipeline_kwargs):
                return pipe(**arguments)
        finally:
            gate.open = False


@checked
def sample(
    pipe,
    seeds: Iterable[int],
    *,
    num_inference_steps: int,
    conditioning: dict[str, Any] | None = None,
    pipeline_kwargs: dict[str, Any] | None = None,
    progress: bool = False,
) -> torch.Tensor:
    """Run the pipeline once, for len(seeds) images: float32 [B,3,H,W] in [0,1], on the CPU.

    Every seed has its own CPU generator, handed to the pipeline as a list, and noise is drawn in float32: the
    noise of image k depends on seeds[k] only, not on the batch, its order, the process, device or dtype. Threads may
    sample at the same time; those that share a network, a scheduler or the pipeline wait for each other.

    Args:
        conditioning: for seed s, values[s % len(values)] of every entry, e.g. {"prompt": [...]} or
            {"class_labels": [...]} or {"prompt_embeds": tensor [K,L,D]}. A pipeline that takes class_labels
            gets s % (number of classes) by default.
        pipeline_kwargs: further arguments of the pipeline's call, the same for all, e.g. guidance_scale. Beside that
            one may stand guidance_interval, two shares of the schedule (0 is data, 1 noise): guidance from the lower
            to the higher of them alone, and one forward pass of half the rows elsewhere (guidance.py).
        progress: show the pipeline's own bar over the steps.

    Raises:
        UserError: a pipeline of videos, no seeds, steps below 1, a missing prompt, an argument that the pipeline does
            not take, a way to guide that guidance_interval does not know, a scheduler the pipeline cannot drive, or
            NaN or infinity in an image (names the seeds).
    """
    seeds = seeds_of(seeds)
    if hasattr(pipe, "video_processor") and not hasattr(pipe, "image_processor"):
        raise UserError(f"{type(pipe).__name__} makes videos, and ptq4dm samples pictures; call the pipeline itself.")
    with refusals(pipe, conditioning, pipeline_kwargs):
        result = call_pipeline(
            pipe,
            seeds,
            num_inference_steps=num_inference_steps,
            conditioning=conditioning,
            pipeline_kwargs=pipeline_kwargs,
            progress=progress,
        )
    images = getattr(result, "images", None)
    if not isinstance(images, torch.Tensor) or images.ndim != 4 or len(images) != len(seeds):
        raise UserError(f"{type(pipe).__name__} did not give one picture per seed; ptq4dm cannot sample it.")
    images = images.detach().float().cpu()
    bad = [s for s, finite in zip(seeds, images.isfinite().flatten(1).all(1).tolist(), strict=True) if not finite]
    if bad:
        raise UserError(
            f"{len(bad)} of {len(seeds)} images hold NaN or infinity (first seed {bad[0]}): "
            "the model overflowed; try a wider dtype or a gentler quantization."
        )
    # Grey models (MNIST) become three equal channels, so that everything downstream sees RGB.
    return images.expand(-1, 3, -1, -1).clamp(0, 1)
