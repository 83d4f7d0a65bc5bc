"""Seeds in, images out: one call of any diffusers pipeline in which image k depends on seeds[k] alone."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Sequence
from contextlib import ExitStack, contextmanager
from unittest import mock

import torch
from torch import nn

from ..errors import UserError

OWNED = ("generator", "num_inference_steps", "batch_size", "output_type", "return_dict")


def denoiser_name(pipe) -> str:
    """ "unet" or "transformer": the attribute of the pipeline that holds the network run at every step.

    Raises:
        UserError: the pipeline has neither.
    """
    for name in ("unet", "transformer"):
        if isinstance(getattr(pipe, name, None), nn.Module):
            return name
    raise UserError(f"{type(pipe).__name__} has neither a unet nor a transformer; ptq4dm needs one of them.")


def denoiser(pipe) -> nn.Module:
    """The pipeline's denoising network: pipe.unet or pipe.transformer (UserError when it has neither)."""
    return getattr(pipe, denoiser_name(pipe))


def model_of(target) -> nn.Module:
    """A model as it is, or the denoiser of a pipeline."""
    return target if isinstance(target, nn.Module) else denoiser(target)


def class_count(pipe) -> int | None:
    """How many class labels the denoiser knows; None when it is not class-conditional."""
    config = denoiser(pipe).config
    # DiTTransformer2DModel and UNet2DModel have their own names for it.
    return getattr(config, "num_embeds_ada_norm", None) or getattr(config, "num_class_embeds", None)


def default_steps(pipe, otherwise: int) -> int:
    """The steps to take where nobody says how many: 1 for a model that was distilled to one."""
    return getattr(pipe.scheduler, "fixed_steps", None) or otherwise


def check_steps(pipe, num_inference_steps: int) -> None:
    """Raises UserError for no steps, for more than the model was trained with, or other than its one."""
    if num_inference_steps < 1:
        raise UserError(f"sampling needs at least one step, not {num_inference_steps}.")
    if default_steps(pipe, num_inference_steps) != num_inference_steps:
        pipe.scheduler.set_timesteps(num_inference_steps)  # says which it takes
    limit = pipe.scheduler.config.get("num_train_timesteps")
    if limit is not None and num_inference_steps > limit:
        raise UserError(f"{num_inference_steps} steps are more than the {limit} that the model was trained with.")


def choose_conditioning(pipe, seeds: Sequence[int], conditioning: dict[str, Sequence] | None) -> dict:
    """The pipeline arguments that differ between images: {name: one value per seed}; see `sample`."""
    parameters = inspect.signature(pipe.__call__).parameters
    conditioning = dict(conditioning or {})
    name = type(pipe).__name__
    if "class_labels" in parameters and "class_labels" not in conditioning:
        conditioning["class_labels"] = range(class_count(pipe) or 1)
    if "prompt" in parameters and not {"prompt", "prompt_embeds"} & conditioning.keys():
        raise UserError(f"{name} needs a prompt: pass conditioning={{'prompt': [...]}} (--prompt).")
    chosen = {}
    for key, values in conditioning.items():
        if key not in parameters:
            raise UserError(f"{name} takes no '{key}'; leave it out of the conditioning.")
        values = [values] if isinstance(values, str) else values
        if len(values) == 0:
            raise UserError(f"the conditioning '{key}' is empty; give at least one value.")
        rows = [s % len(values) for s in seeds]
        # Embeddings come as one tensor [K, ...]; prompts and labels as sequences.
        chosen[key] = values[rows] if isinstance(values, torch.Tensor) else [values[r] for r in rows]
    return chosen


@contextmanager
def _float32_noise(pipe):
    """Draw noise in float32, then round to the model's dtype.

    Older PyTorch (and 2.13 for sizes that are no multiple of 16) draws other numbers from a seeded CPU
    generator in float16 than in float32, so that one seed would start another picture in each dtype and
    same-seed comparisons would mean nothing. diffusers pipelines and schedulers draw through the name
    `randn_tensor` of their own module; it is wrapped there.
    """

    def wrap(randn_tensor):
        def draw(shape, generator=None, device=None, dtype=None, **rest):
            noise = randn_tensor(shape, generator=generator, device=device, dtype=torch.float32, **rest)
            return noise.to(dtype or torch.float32)

        return draw

    modules = {sys.modules.get(c.__module__) for part in (pipe, pipe.scheduler) for c in type(part).__mro__}
    with ExitStack() as stack:
        for module in modules:
            if hasattr(module, "randn_tensor"):
                stack.enter_context(mock.patch.object(module, "randn_tensor", wrap(module.randn_tensor)))
        yield


@contextmanager
def _scheduler_fit(pipe):
    """Let stock DDPMPipeline run with any scheduler that starts from unit noise.

    DDPMPipeline passes generator= to scheduler.step, which deterministic solvers (DEIS, UniPC, ...) do not
    take, and it never calls scale_model_input, so sigma-space schedulers (Euler, Heun, EDM) would silently
    give wrong pictures: those are refused.
    """
    from diffusers import DDPMPipeline

    scheduler = pipe.scheduler
    if not isinstance(pipe, DDPMPipeline):
        yield
        return
    if float(getattr(scheduler, "init_noise_sigma", 1.0)) != 1.0:
        raise UserError(
            f"{type(pipe).__name__} does not scale its input as {type(scheduler).__name__} needs; "
            "use a sampler that starts from unit noise, such as deis, ddim or diffusers/unipc."
        )
    if "generator" in inspect.signature(scheduler.step).parameters:
        yield
        return
    step = scheduler.step
    with mock.patch.object(scheduler, "step", lambda *a, generator=None, **k: step(*a, **k)):
        yield


@contextmanager
def evaluation_mode(model: nn.Module):
    """Dropout and the like off; afterwards every module is in the mode it was in."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


@contextmanager
def _quiet(pipe, progress: bool):
    """Evaluation mode (dropout draws from the global generator), no inner progress bar; restores both."""
    had, before = "_progress_bar_config" in vars(pipe), getattr(pipe, "_progress_bar_config", {})
    if not progress:
        pipe._progress_bar_config = {**before, "disable": True}
    try:
        with evaluation_mode(denoiser(pipe)):
            yield
    finally:
        if had:
            pipe._progress_bar_config = before
        else:
            vars(pipe).pop("_progress_bar_config", None)


def sample(
    pipe,
    seeds: Sequence[int],
    *,
    num_inference_steps: int,
    conditioning: dict[str, Sequence] | None = None,
    pipeline_kwargs: dict | None = None,
    progress: bool = False,
) -> torch.Tensor:
    """Run the pipeline once, for len(seeds) images: float32 [B,3,H,W] in [0,1], on the CPU.

    Every seed has its own CPU generator, handed to the pipeline as a list, and noise is drawn in float32: the
    noise of image k depends on seeds[k] only, not on the batch, its order, the process, device or dtype.

    Args:
        conditioning: for seed s, values[s % len(values)] of every entry, e.g. {"prompt": [...]} or
            {"class_labels": [...]} or {"prompt_embeds": tensor [K,L,D]}. A pipeline that takes class_labels
            gets s % (number of classes) by default.
        pipeline_kwargs: further arguments of the pipeline's call, the same for all, e.g. guidance_scale.
        progress: show the pipeline's own bar over the steps.

    Raises:
        UserError: no seeds, steps below 1, a missing prompt, an argument that the pipeline does not take, a
            scheduler the pipeline cannot drive, or NaN or infinity in an image (names the seeds).
    """
    seeds = [int(s) for s in seeds]
    if not seeds:
        raise UserError("sampling needs at least one seed.")
    check_steps(pipe, num_inference_steps)
    parameters = inspect.signature(pipe.__call__).parameters
    arguments = choose_conditioning(pipe, seeds, conditioning)
    for key, value in (pipeline_kwargs or {}).items():
        if key in OWNED or key in arguments or key in ("prompt", "class_labels"):
            raise UserError(f"'{key}' cannot be set through pipeline_kwargs; sample has its own way to set it.")
        if key not in parameters:
            raise UserError(f"{type(pipe).__name__} takes no argument '{key}'.")
        arguments[key] = value
    if "batch_size" in parameters:
        arguments["batch_size"] = len(seeds)
    generators = [torch.Generator("cpu").manual_seed(s) for s in seeds]
    with _quiet(pipe, progress), _float32_noise(pipe), _scheduler_fit(pipe), torch.no_grad():
        result = pipe(generator=generators, num_inference_steps=num_inference_steps, output_type="pt", **arguments)
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
