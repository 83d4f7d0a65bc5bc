"""What a run shows of itself: held-out loss, samples, gradients' ranges at each time, bytes kept in a step."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn

from ..layers.shift.convert import kernels_of, to_floats
from ..pipelines.denoiser import denoiser, denoiser_name
from ..pipelines.images import image_grid, save_picture, to_uint8
from ..pipelines.sampling import sample
from ..quantization.diffusers_bridge import mark_norms
from .gradients import gradient_ranges
from .memory import kept_bytes
from .pictures import Pictures
from .schedule import even_times
from .task import Batch, seed_of

GRID = 64  # pictures on a grid
RANGES = 64  # samples whose gradients are looked at
MARGIN = 2**32  # between the seeds of samples on grids and those of `generate`


class Exhibition:
    """Looks at a run (run.Run) from outside; nothing here changes what it learns."""

    def __init__(self, run: Any, held: Pictures) -> None:
        self.run, self.held, self.pictures = run, [], len(held)
        g = torch.Generator(run.device).manual_seed(seed_of(run.config.seed, "held out"))
        times = even_times(len(held), run.task.times).to(run.device)
        for rows in torch.arange(len(held)).split(run.config.batch_size) if len(held) else ():
            batch = run.noisy(held.images[rows], None if held.labels is None else held.labels[rows], g)
            batch.t = times[rows.to(run.device)]  # evenly spread, and not by chance
            self.held.append(batch)

    def visit(self) -> None:
        """A line of the log, and a grid of samples."""
        run = self.run
        step, images = run.progress.step, run.progress.step * run.config.batch_size
        found = {} if not self.held else {"held_out": self.loss(run.networks.average), "pictures": self.pictures}
        run.log.write(stage="evaluation", step=step, images=images, **found)
        if self.held and run.config.widths is not None:
            run.log.write(stage="gradients", step=step, bins=self.ranges())
        if run.config.sample_steps:
            self.grid(images)

    @torch.no_grad()
    def loss(self, net: nn.Module) -> float:
        """Mean squared error on held-out pictures, as the network computes."""
        with self.run.accelerator.autocast():
            return torch.cat([self.run.task.loss(net, batch) for batch in self.held]).mean().item()

    def ranges(self) -> list[dict]:
        """How far gradients reach at each time, of the network in training, on held-out pictures."""
        run, whole = self.run, [torch.cat(one) for one in zip(*map(_tensors, self.held), strict=True)]
        rows = torch.linspace(0, len(whole[0]) - 1, min(RANGES, len(whole[0])), device=run.device).long()
        batch = Batch(*(one[rows] for one in whole), *([] if len(whole) == 4 else [None]))

        def loss() -> torch.Tensor:
            with run.accelerator.autocast():
                return run.task.loss(run.networks.net, batch).mean()

        return gradient_ranges(run.networks.net, loss, batch.t, run.task.times)

    def grid(self, images: int) -> None:
        """samples/<images>.png: the average by the pipeline's own sampler, the same seeds at every visit."""
        run = self.run
        pipe = pipeline_with(run.pipe, run.networks.average)
        with run.accelerator.autocast():
            seeds = range(MARGIN, MARGIN + GRID)
            batch = max(1, min(GRID, run.config.batch_size))
            prompts = [] if run.pictures.texts is None else run.pictures.texts[1:] or [""]
            given = {"prompt": prompts} if prompts else None
            parts = [
                sample(pipe, seeds[i : i + batch], num_inference_steps=run.config.sample_steps, conditioning=given)
                for i in range(0, GRID, batch)
            ]
        pictures = to_uint8(torch.cat(parts))
        path = run.folder / "samples" / f"{images:09d}.png"
        path.parent.mkdir(exist_ok=True)
        save_picture(image_grid(pictures, 8, max(1, 64 // pictures.shape[-1])), path)

    def report(self, batch: Batch) -> None:
        """A line of the log with what is on integers, and what a step keeps for its backward pass."""
        run, net = self.run, self.run.networks.net
        plain = copy.deepcopy(net)
        to_floats(plain)
        kept = {}
        for name, one in (("kept_bytes", net), ("kept_bytes_in_floats", plain)):
            own = {parameter.untyped_storage().data_ptr() for parameter in one.parameters()}
            with run.accelerator.autocast():
                kept[name] = kept_bytes(lambda one=one: run.task.loss(one, batch).mean(), own)  # type: ignore[misc]
        layers, wide = run.networks.converted.layers, run.networks.wide
        widths, found = run.config.widths, kernels_of(net)
        groups = None if widths is None else [widths.groups_of(bits) for bits in (widths.weight, widths.input)]
        run.log.write(
            stage="start", layers=len(layers), kernels=found, groups=groups, wide=wide, samples=len(batch.t),
            learning_rate=run.config.learning_rate, **kept,
        )  # fmt: skip


def pipeline_with(pipe, net: nn.Module):
    """A pipeline of the same parts with another denoiser."""
    return type(pipe)(**{**pipe.components, denoiser_name(pipe): net})


def result_of(pipe, average: nn.Module):
    """The pipeline with the average in plain float layers."""
    plain = copy.deepcopy(average)
    to_floats(plain)
    plain.requires_grad_(True)
    mark_norms(plain)
    return pipeline_with(pipe, plain.eval().to(denoiser(pipe).device))


def _tensors(batch: Batch) -> list[torch.Tensor]:
    return [one for one in (batch.x0, batch.noise, batch.t, batch.labels) if one is not None]
