"""A training run: what a step is given, its clock, its checkpoint, its log and its samples.

checkpoint.safetensors   network, moving average, optimizer, and how far it came
log.jsonl, samples/      losses, held-out losses, ranges of gradients by time, bytes kept; grids of samples
"""

from __future__ import annotations

import copy
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import broadcast
from torch import nn

from ..errors import UserError
from ..files.checkpoint import load_checkpoint, progress_as, save_checkpoint
from ..files.log import Log, read_lines
from ..files.places import lying_in
from ..layers.shift.norms import ratios
from ..layers.shift.sensitive import most_sensitive
from ..pipelines.denoiser import denoiser, evaluation_mode
from ..pipelines.generate import fingerprint
from ..progress import progress_bar
from .accelerated import make_accelerator
from .config import ShiftQuantConfig
from .exhibition import Exhibition
from .graphed import GraphedStep
from .networks import Networks
from .pictures import read_pictures, split
from .random_state import own_random_state
from .shelf import Shelf
from .task import Batch, Task, seed_of

CHECKPOINT, LOG = "checkpoint.safetensors", "log.jsonl"
MEASURED = 16  # rows of a batch, on which layers are measured
AT_RISK = 300.0  # seconds of work that an interruption may cost


@dataclass
class Progress:
    """Steps taken, and lines in the log."""

    step: int = 0
    lines: int = 0


def identity_of(pipe: Any, config: ShiftQuantConfig) -> dict:
    """All that has to be the same for a run to go on, and for two calls to be one run, as plain JSON values."""
    return {**config.identity(), "model": fingerprint(pipe)}


class Run:
    """All of a run; `go` trains to its end, or that of the time."""

    def __init__(self, pipe: Any, pictures: Path, config: ShiftQuantConfig, folder: Path, resume: bool) -> None:
        self.pipe, self.config, self.folder, self.task = pipe, config, folder, Task(pipe)
        self.accelerator = make_accelerator(config.precision, config.compile, denoiser(pipe).device)
        self.device, self.main = self.accelerator.device, self.accelerator.is_main_process
        if config.batch_size % self.accelerator.num_processes:
            count = self.accelerator.num_processes
            raise UserError(f"batch_size={config.batch_size} does not divide into {count} equal parts.")
        task = self.task
        if config.graph and (self.device.type != "cuda" or self.accelerator.num_processes > 1 or task.of_text):
            raise UserError("a step is one CUDA graph on one GPU alone, and not for models of text; leave graph out.")
        found = read_pictures(pictures, task.picture_size, task.channels, task.classes, task.of_text)
        if found.texts is not None:
            task.learn(pipe, found.texts)
        self.pictures, held = split(found, config.held_out)
        self.recipe = {**identity_of(pipe, config), "pictures": found.identity()}
        if found.labels is not None and found.texts is not None:
            self.recipe["captions"] = seed_of(*found.texts, *found.labels.tolist())
        self.networks = Networks(denoiser(pipe), config, self.accelerator, *self._measured(denoiser(pipe)))
        self.progress = self._start(resume)
        self.saved = copy.copy(self.progress) if resume else None
        self.log = Log(folder / LOG, self.progress.lines, self.main, read_lines)
        self.exhibition = Exhibition(self, held)
        self.loss, self.since, self.out_of_time = torch.zeros((), device=self.device), 0, False
        self.step: GraphedStep | None = None
        self.began = self.clock = self.kept = time.monotonic()

    def _measured(self, net: nn.Module) -> tuple[dict[str, float], list[str]]:
        """Ratios of norms by the mean magnitude, and names of wide layers, on the first batch of all processes: the
        same in each of them, and whenever the run goes on."""
        config, batch = self.config, self.drawn(0)
        few = batch.rows(slice(MEASURED))
        found, wide = {}, []
        with evaluation_mode(net), self.accelerator.autocast():
            if config.norm == "l1":
                found = ratios(net, lambda: self.task.loss(net, batch))
            if config.widths is not None and config.widens:
                wide = most_sensitive(net, lambda: self.task.prediction(net, few), config.widths)
        return found, wide

    def _start(self, resume: bool) -> Progress:
        """Where the run begins; its folder must be new unless it goes on."""
        path = self.folder / CHECKPOINT
        if resume:
            optimizers = {"optimizer": self.networks.optimizer}
            values, _ = load_checkpoint(path, self.networks.kept, optimizers, self.recipe)
            progress = progress_as(Progress, values, path)
        else:
            there = [one.name for one in lying_in(self.folder) if one.name not in (LOG, "samples")]
            if there:
                raise UserError(
                    f"{self.folder} is not empty; go on with the run in it (--resume) or choose another place."
                )
            progress = Progress()
        self.accelerator.wait_for_everyone()  # nobody writes before everybody has looked
        return progress

    def go(self) -> None:
        """Train until all images are learnt from, or the time is over; then a checkpoint."""
        config, last = self.config, -(-self.config.images // self.config.batch_size)
        rest = max(1, config.evaluate_every // config.batch_size)
        hidden = not self.accelerator.is_local_main_process
        with (
            progress_bar(initial=self.progress.step, total=last, desc="training", unit="step", hidden=hidden) as bar,
            own_random_state(self.device),
        ):
            if self.saved is None:
                self.exhibition.report(self.batch(0))
                self.keep()  # whenever it is interrupted, there is something to resume
            while self.progress.step < last and not self.out_of_time:
                step = self.progress.step
                batch = self.batch(step)
                torch.manual_seed(seed_of(config.seed, step, "rounding", self.accelerator.process_index))
                self.loss += self.learn(step, batch)
                self.since += 1
                self.progress.step += 1
                bar.update()
                if self.progress.step % config.log_every == 0:
                    self.flush(bar)
                if self.progress.step % rest == 0 and self.progress.step < last:
                    self.save()
                elif self.accelerator.num_processes == 1:  # their clocks would differ
                    self.look_at_the_clock()
                    if time.monotonic() - self.kept > AT_RISK and self.progress.step < last:
                        self.flush()
                        self.keep()
            if self.saved is None or self.saved.step != self.progress.step:
                self.save()

    def learn(self, step: int, batch: Batch) -> torch.Tensor:
        """One step; its loss."""
        if self.config.graph:
            if self.step is None:
                self.step = GraphedStep(self.networks, self.loss_of, batch)
                torch.manual_seed(seed_of(self.config.seed, step, "rounding", 0))
            return self.step(step, batch)
        loss = self.loss_of(batch)
        self.networks.descend(step, loss)
        return loss.detach()

    def loss_of(self, batch: Batch) -> torch.Tensor:
        with self.accelerator.autocast():
            return self.task.loss(self.networks.call, batch).mean()

    def batch(self, step: int) -> Batch:
        """This process's share of a step's batch."""
        batch = self.drawn(step)
        part = len(batch.t) // self.accelerator.num_processes
        first = self.accelerator.process_index * part
        return batch.rows(slice(first, first + part))

    def drawn(self, step: int) -> Batch:
        """A step's batch, over all processes. Every process draws all of it, so that a run is the same on any number
        of them; its step alone decides it."""
        config, size = self.config, self.config.batch_size
        rows, g = self.rows_of(step)
        flips = torch.rand(size, generator=g, device=self.device).cpu() < 0.5
        images = self.pictures.images[rows]
        if isinstance(self.pictures.images, Shelf):
            self.pictures.images.expect(self.rows_of(step + 1)[0])
        if config.flip:
            images = torch.where(flips[:, None, None, None], images.flip(3), images)
        labels = None if self.pictures.labels is None else self.pictures.labels[rows]
        if self.pictures.texts is not None:
            empty = torch.rand(size, generator=g, device=self.device).cpu() < config.dropped
            labels = torch.where(empty, 0, labels)
        return self.noisy(images, labels, g)

    def rows_of(self, step: int) -> tuple[torch.Tensor, torch.Generator]:
        """Which pictures a step sees [batch size], and the generator of all else in it."""
        g = torch.Generator(self.device).manual_seed(seed_of(self.config.seed, step))
        number = len(self.pictures)
        return torch.randint(0, number, (self.config.batch_size,), generator=g, device=self.device).cpu(), g

    def noisy(self, images: torch.Tensor, labels: torch.Tensor | None, g: torch.Generator) -> Batch:
        """A batch of images uint8: data, noise and times from a generator."""
        x0 = self.task.data(images, g)
        noise = torch.randn(x0.shape, generator=g, device=self.device)
        t = torch.randint(0, self.task.times, (len(x0),), generator=g, device=self.device)
        return Batch(x0, noise, t, None if labels is None else labels.to(self.device))

    def flush(self, bar: Any = None) -> None:
        """A line of the log with the mean loss since the last one, and a look at the clock.

        Raises UserError for NaN or infinity.
        """
        if self.since:
            mean = self.accelerator.reduce(self.loss / self.since, "mean").item()
            if not torch.tensor(mean).isfinite():
                self.give_up()
            speed = self.since * self.config.batch_size / (time.monotonic() - self.clock)
            images = self.progress.step * self.config.batch_size
            self.log.write(
                stage="training", step=self.progress.step, images=images, loss=mean, images_per_second=round(speed, 1)
            )
            if bar is not None:
                bar.set_postfix(loss=f"{mean:.4f}")
        self.look_at_the_clock()
        self.loss.zero_()
        self.since, self.clock = 0, time.monotonic()

    def look_at_the_clock(self) -> None:
        """See whether the time is over, by one clock for all processes."""
        if self.config.minutes is None:
            return
        minutes = (time.monotonic() - self.began) / 60
        if self.accelerator.num_processes > 1:
            minutes = float(broadcast(torch.tensor(minutes, device=self.device)))
        self.out_of_time = minutes >= self.config.minutes

    def save(self) -> None:
        """Held-out loss, grid and ranges of gradients; then the checkpoint."""
        self.flush()
        if not self.networks.finite():
            self.give_up()
        if self.main:
            self.exhibition.visit()
        self.keep()

    def keep(self) -> None:
        """The checkpoint."""
        self.accelerator.wait_for_everyone()
        self.progress.lines = self.log.lines = int(broadcast(torch.tensor(self.log.lines, device=self.device)))
        if self.main:
            nets, optimizers = self.networks.kept, {"optimizer": self.networks.optimizer}
            save_checkpoint(self.folder / CHECKPOINT, nets, optimizers, asdict(self.progress), self.recipe)
        self.saved = copy.copy(self.progress)
        self.accelerator.wait_for_everyone()
        self.clock = self.kept = time.monotonic()

    def give_up(self) -> None:
        advice = "start anew with a lower --learning-rate or more bits"
        if self.saved is not None and self.saved.step:
            advice = f"the checkpoint of step {self.saved.step} is kept: resume it with a lower --learning-rate"
        raise UserError(f"training came to NaN or infinity by step {self.progress.step}; {advice}.")
