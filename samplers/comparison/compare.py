"""Frechet distance against the number of function evaluations, for our samplers and diffusers'.

All samplers start from the same noise (image k from seed k) and run the same loop; a budget is in evaluations of
the model, so a sampler that needs several a step takes fewer steps.
"""

from __future__ import annotations

import inspect
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch

from ...checks import check_fields, check_seeds, named_options
from ...errors import UserError
from ...evaluation.feature_fid import FeatureFID
from ...files.claim import claimed_whole
from ...files.places import make_parent
from ...files.rows import Rows
from ...options import option
from ...pipelines.denoiser import class_count, denoiser, evaluation_mode
from ...pipelines.pixel_dit import guided_prediction
from ...pipelines.sampling import MOST_BATCH, MOST_STEPS
from ...pipelines.stepping import model_input, noise_scale, set_steps
from ...progress import progress_bar
from ..catalog import make_sampler

SAMPLERS = (
    "deis",
    "ddim",
    "diffusers/ddim",
    "diffusers/deis",
    "diffusers/dpm++2m",
    "diffusers/dpm++3m",
    "diffusers/unipc",
    "diffusers/euler",
    "diffusers/heun",
)


ROW: dict[str, type | tuple[type, ...]] = {
    "sampler": str,
    "budget": int,
    "evaluations": int,
    "feature_fid": (int, float),
    "seconds": (int, float),
    "device": str,
}


@named_options
@dataclass
class SamplerBench:
    """Settings of a comparison: samplers, budgets of evaluations, images of each feature-FID (seeds from seed).

    guidance_scale: of classifier-free guidance, for pipelines that take one; 1 is none.
    """

    samplers: Sequence[str] = SAMPLERS
    evaluations: Sequence[int] = option((5, 6, 8, 10, 15, 20, 50), high=MOST_STEPS)
    num_images: int = option(1000, low=0, high=10_000_000)
    batch_size: int = option(100, low=0, high=MOST_BATCH)
    seed: int = option(0, low=0)
    guidance_scale: float = 1.0

    def __post_init__(self) -> None:
        check_fields(self, "SamplerBench")
        check_seeds(self.seed, max(self.num_images, 1))
        self.samplers, self.evaluations = (list(dict.fromkeys(some)) for some in (self.samplers, self.evaluations))

    def check(self, pipe, own: Mapping[str, Any] = MappingProxyType({})) -> None:
        """Raises UserError for a name that is no sampler, budgets that a fitted schedule has no table for, figures
        that measure nothing, and latent or text models.

        own: schedulers by the names that stand for them here; None for one that is still to be fitted.
        """
        if not is_benched(pipe):
            raise UserError(
                "the bench compares samplers on 32x32 pixel models such as unet-cifar10 and dit-cifar10"
                + ("; a schedule for this one is fitted in Python, by ptq4dm.samplers.fit(pipe)." if own else ".")
            )
        if self.guidance_scale != 1 and "guidance_scale" not in inspect.signature(pipe.__call__).parameters:
            raise UserError(f"{type(pipe).__name__} takes no guidance_scale; leave it out.")
        for name in self.samplers:
            scheduler = own[name] if name in own else make_sampler(name, pipe.scheduler.config)
            known = getattr(scheduler, "fitted_for", self.evaluations)
            if lacking := [n for n in self.evaluations if n not in known]:
                raise UserError(
                    f"{name} was fitted for {_listed(known)} evaluations, and not for {_listed(lacking)}."
                )
        if self.num_images < 2 or self.batch_size < 1 or not self.evaluations or min(self.evaluations) < 1:
            raise UserError("the bench needs 2 images or more, a batch size and budgets of 1 or more.")


def _listed(numbers: Sequence[int]) -> str:
    return ", ".join(map(str, numbers))


def is_benched(pipe) -> bool:
    """Whether this is a 32x32 pixel model, which the bench can measure."""
    config = getattr(denoiser(pipe), "config", None)
    small = getattr(config, "in_channels", None) == 3 and getattr(config, "sample_size", None) == 32
    return small and getattr(pipe, "vae", None) is None


def usual_samplers(config) -> list[str]:
    """Those of SAMPLERS that can sample the model of a scheduler's config; all, where none can."""
    found = []
    for name in SAMPLERS:
        with suppress(UserError):
            make_sampler(name, config)
            found.append(name)
    return found or list(SAMPLERS)


def set_budget(scheduler, evaluations: int, device) -> int:
    """set_timesteps with the most steps that need at most so many evaluations; returns how many they need."""
    for steps in range(evaluations, 0, -1):
        set_steps(scheduler, steps, device)
        if len(scheduler.timesteps) <= evaluations:
            return len(scheduler.timesteps)
    return len(scheduler.timesteps)


@torch.no_grad()
def solve(
    model, scheduler, noise: torch.Tensor, labels: torch.Tensor | None, guidance_scale: float = 1.0
) -> torch.Tensor:
    """Noise [B,C,H,W] to images, in the noise's dtype, on the timesteps that are set.

    guidance_scale: read where there are labels.
    """
    x = noise * noise_scale(scheduler)
    for t in scheduler.timesteps:
        inputs = model_input(scheduler, x, t).to(model.dtype)
        times = t.to(torch.float32).expand(len(x))
        if labels is None:
            output = model(inputs, times).sample
        else:
            output = guided_prediction(model, inputs, times, labels, guidance_scale)
        x = scheduler.step(output[:, : x.shape[1]].to(x.dtype), t, x).prev_sample
    return x


def bench_samplers(
    pipe, config: SamplerBench, output: Path, settings: dict, own: Mapping[str, Any] = MappingProxyType({})
) -> list[dict]:
    """Measure what is missing in the JSON file `output`; returns the rows asked for, in the order asked.

    Args:
        own: schedulers by name that are in no catalog, such as fitted ones.
        settings: what else decides a figure (model, dtype); a file made with other settings is refused.

    A second call with the same settings waits for the end of the first.

    Raises:
        UserError: other settings in the file, or of a run that writes it now; an unknown sampler, or figures that
            measure nothing.
    """
    config.check(pipe, own)
    settings = {**settings, "num_images": config.num_images, "seed": config.seed, "metric": "feature-fid"}
    settings |= {} if config.guidance_scale == 1 else {"guidance_scale": config.guidance_scale}

    def looked() -> tuple[Rows, list[tuple[str, int]]]:
        rows = Rows(output, settings, ROW)
        done = {(row["sampler"], row["budget"]) for row in rows}
        return rows, [(s, b) for s in config.samplers for b in config.evaluations if (s, b) not in done]

    rows, todo = looked()
    if todo:
        make_parent(output)
        with claimed_whole(output, settings):
            rows, todo = looked()  # another run may have added some
            if todo:
                _measure(pipe, config, todo, rows, own)
    found = {(row["sampler"], row["budget"]): row for row in rows}
    return [found[s, b] for s in config.samplers for b in config.evaluations]


def _measure(pipe, config: SamplerBench, todo: list[tuple[str, int]], rows: Rows, own: Mapping[str, Any]) -> None:
    """Add a row for each (sampler, budget)."""
    model = denoiser(pipe)
    device = model.device
    measure = FeatureFID(device)
    seeds = range(config.seed, config.seed + config.num_images)
    noise = torch.cat([torch.randn(1, 3, 32, 32, generator=_generator(s)) for s in seeds])
    classes = class_count(pipe)
    labels = None if classes is None else torch.tensor(list(seeds)) % classes
    run = torch.compile(model, dynamic=False) if device.type == "cuda" else model

    def batches(scheduler, budget):
        for part in torch.arange(len(noise)).split(config.batch_size):
            set_budget(scheduler, budget, device)  # anew: some solvers remember their last steps
            given = None if labels is None else labels[part].to(device)
            images = solve(run, scheduler, noise[part].to(device), given, config.guidance_scale)
            yield (images / 2 + 0.5).clamp(0, 1)

    tuned = torch.backends.cudnn.flags(enabled=True, benchmark=True, allow_tf32=torch.backends.cudnn.allow_tf32)
    with evaluation_mode(model), tuned, progress_bar(todo, desc="samplers", unit="row") as bar:
        for name, budget in bar:
            bar.set_postfix_str(f"{name} {budget}")
            scheduler = own[name] if name in own else make_sampler(name, pipe.scheduler.config)
            start = time.time()
            used = set_budget(scheduler, budget, device)
            rows.add(
                {
                    "sampler": name,
                    "budget": budget,
                    "evaluations": used,
                    "feature_fid": measure(batches(scheduler, budget)),
                    "seconds": round(time.time() - start, 1),
                    "device": torch.cuda.get_device_name() if device.type == "cuda" else "CPU",
                }
            )


def _generator(seed: int) -> torch.Generator:
    return torch.Generator("cpu").manual_seed(seed)
