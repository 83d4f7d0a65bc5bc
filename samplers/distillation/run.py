"""A distillation run: what an iteration is given, its clock, its checkpoint and its log.

checkpoint.safetensors   networks, optimizers, moving average, and how far it came
path/00001.safetensors   checkpoints of stage 1: the way back to the teacher, which is its point 0
log.jsonl, samples/      losses, feature-FID, sample grids
"""

from __future__ import annotations

import copy
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from itertools import takewhile
from pathlib import Path

import torch
from accelerate import PartialState
from accelerate.utils import broadcast
from torch import Tensor

from ...errors import UserError
from ...files.checkpoint import load_checkpoint, progress_as, save_checkpoint
from ...files.claim import claimed
from ...files.log import Log
from ...files.places import check_room, lying_in, output_folder
from ...kernels.runtime.atomic import sweep
from ...layers.shift.convert import kernels_of
from ...pipelines.denoiser import class_count, denoiser
from ...pipelines.generate import fingerprint
from ...progress import progress_bar
from ...training.accelerated import make_accelerator
from ..one_step import nearest_timestep
from .config import DisBackConfig
from .log import Exhibition, read_log
from .networks import KEPT, TRAINED, Networks
from .scores import Batch, Chance, Diffusion
from .student import check_network, image_shape, one_step_scheduler, student_pipeline

CHECKPOINT, LOG = "checkpoint.safetensors", "log.jsonl"
STAGES = {1: "degradation", 2: "distillation"}


@dataclass
class Progress:
    """Iterations of stage 1 and of stage 2, and lines in the log."""

    degraded: int = 0
    step: int = 0
    lines: int = 0


def identity_of(pipe, config: DisBackConfig) -> dict:
    """All that has to be the same for a run to go on, and for two calls to be one run, as plain JSON values."""
    return {**config.identity(), "teacher": fingerprint(pipe)}


def check_teacher(pipe, config: DisBackConfig) -> None:
    """Raises UserError where a pipeline cannot be distilled, before anything is made."""
    check_network(pipe)
    one_step_scheduler(pipe, config.generator_sigma)


@contextmanager
def alone_in(folder: str | Path, pipe, config: DisBackConfig, resume: bool = False) -> Iterator[None]:
    """Make a run's folder and keep other runs out of it, as long as the block lasts (main process).

    A second call with the same settings waits for the end of the first.

    Raises UserError where there is none to resume, it cannot be written, the disk has no room for a run, or a run
    with other settings writes.
    """
    if resume and not Path(folder).exists():  # a name that was mistyped
        path = Path(folder) / CHECKPOINT
        raise UserError(f"there is no checkpoint at {path} to resume; leave --resume out to start a new run.")
    if not PartialState(cpu=denoiser(pipe).device.type == "cpu").is_main_process:
        yield
        return
    with output_folder(folder) as place, claimed(place, identity_of(pipe, config)):
        for inside in ("path", "samples"):
            sweep(place / inside)
        check_room(place, _bytes_needed(place, pipe, config), "a distillation run")
        yield


def _bytes_needed(folder: Path, pipe, config: DisBackConfig) -> int:
    """What the disk has to hold beside what is there: a checkpoint in the making, and the rest of the path."""
    net = sum(one.numel() * one.element_size() for one in denoiser(pipe).state_dict().values())
    trained = sum(one.numel() * one.element_size() for one in denoiser(pipe).parameters())
    points = config.path_points if config.backtracking else 0
    there = len(list((folder / "path").glob("*.safetensors")))
    optimizers = 1 if config.backtracking and config.minutes is not None else len(TRAINED)  # it may stop in stage 1
    points = 0 if config.minutes is not None else max(0, points - there)
    return len(KEPT) * net + 2 * optimizers * trained + points * net  # AdamW keeps two moments


def strangers(folder: Path) -> list[str]:
    """What lies in a folder besides the leavings of a run that was stopped before its first checkpoint.

    Such a run starts over. Until then it may have left its log, or not even that; the first point of the path, which
    a checkpoint follows at once; and two grids of samples.
    """
    if not folder.is_dir():
        return []
    found = [path.relative_to(folder).as_posix() for path in lying_in(folder) if path.is_file() or path.is_symlink()]
    for place in (path for path in lying_in(folder) if path.is_dir() and not path.is_symlink()):
        inside = [path.relative_to(folder).as_posix() for path in lying_in(place)]
        found += inside or ([] if place.name in ("path", "samples") else [place.name])
    samples = [name for name in found if re.fullmatch(r"samples/\d{9}\.png", name)][:2]
    other = [name for name in found if name not in (LOG, "path/00001.safetensors", *samples)]
    if LOG in found and not other:
        read_log(folder / LOG)  # a file of that name may be somebody's own
    return other if LOG in found else found


class Run:
    """All that the loops in disback.py need besides the algorithm."""

    def __init__(self, pipe, config: DisBackConfig, folder: str | Path, resume: bool) -> None:
        check_network(pipe)
        self.pipe, self.config, self.folder = pipe, config, Path(folder)
        self.scheduler = one_step_scheduler(pipe, config.generator_sigma)
        self.accelerator = make_accelerator(config.precision, config.compile, denoiser(pipe).device)
        device = self.accelerator.device
        self.num_parts = self.accelerator.num_processes * config.gradient_accumulation_steps
        if config.batch_size % self.num_parts:
            raise UserError(f"batch_size={config.batch_size} does not divide into {self.num_parts} equal parts.")
        ours = self.scheduler
        levels = (ours.alphas, ours.sigmas, ours.config.generator_timestep, ours.config.prediction_type)
        self.diffusion = Diffusion(*levels, device)
        shape, classes = image_shape(pipe), class_count(pipe)
        first, last = (nearest_timestep(self.scheduler.shares(), s) for s in config.sigma_range)
        self.chance = Chance(config.seed, shape, classes, (first, last + 1), device)
        self.exhibition = Exhibition(self.diffusion, shape, classes, config, device)
        self.networks = Networks(denoiser(pipe), config, self.accelerator, self.folder)
        self.recipe = identity_of(pipe, config)
        self.progress = self._start(resume)
        self.saved = copy.copy(self.progress) if resume else None
        self.log = Log(self.folder / LOG, self.progress.lines, self.accelerator.is_main_process, read_log)
        self.sums: dict[str, Tensor] = {}
        self.since, self.began, self.out_of_time = 0, time.monotonic(), False
        self.clock = self.began

    def _start(self, resume: bool) -> Progress:
        """Where the run begins, and its folder."""
        if resume and not strangers(self.folder):
            resume = False  # stopped before its first checkpoint: there is nothing to go on from
        if resume:
            path, networks = self.folder / CHECKPOINT, self.networks
            values, _ = load_checkpoint(path, networks.kept, networks.optimizers, self.recipe)
            progress = progress_as(Progress, values, path)
            self.accelerator.wait_for_everyone()  # nobody writes before everybody has read
            return progress
        there = strangers(self.folder)
        self.accelerator.wait_for_everyone()  # nobody writes before everybody has looked
        if there:
            raise UserError(
                f"{self.folder} is not empty; go on with the run in it (--resume) or choose another place."
            )
        return Progress()

    # --------------------------------------------------------------------------------------- iterations

    def parts(self, *key) -> list[Batch]:
        """This process's share of an iteration's batch, in as many parts as gradients are accumulated over.

        Every process draws the whole batch, so that a run is the same on any number of them.
        """
        batch, size = self.chance.draw(self.config.batch_size, *key), self.config.batch_size // self.num_parts
        steps = self.config.gradient_accumulation_steps
        first = self.accelerator.process_index * steps
        return [batch.rows(slice((first + i) * size, (first + i + 1) * size)) for i in range(steps)]

    @contextmanager
    def iterations(self, stage: int, total: int) -> Iterator[Iterator[int]]:
        """The iterations of a stage that are left, until its end or that of the time; then a checkpoint."""
        first = self.step(stage)
        with progress_bar(
            initial=first,
            total=total,
            desc=STAGES[stage],
            unit="step",
            hidden=not self.accelerator.is_local_main_process,
        ) as self.bar:
            yield takewhile(lambda _: not self.out_of_time, range(first, total))
            if self.saved != self.progress:
                if stage == 2:
                    self.show()
                self.save(stage)

    def note(self, stage: int, **losses: Tensor) -> None:
        """After an iteration: add up losses, and now and then look at them (the only time the host waits)."""
        for name, loss in losses.items():
            self.sums[name] = self.sums.get(name, 0) + loss
        self.since += 1
        if self.step(stage) % self.config.log_every == 0:
            self.flush(stage)
        self.bar.update()

    def flush(self, stage: int) -> None:
        """A line of the log with the mean losses since the last one, and a look at the clock.

        Raises:
            UserError: NaN or infinity among the losses.
        """
        if self.since:
            names = sorted(self.sums)
            mean = self.accelerator.reduce(torch.stack([self.sums[n] for n in names]) / self.since, "mean")
            values = dict(zip(names, mean.tolist(), strict=True))
            if not mean.isfinite().all():
                self.give_up(stage)
            speed = self.since * self.config.batch_size / (time.monotonic() - self.clock)
            where = {"step": self.step(stage), "images": self.step(stage) * self.config.batch_size}
            aim = {"target": self.networks.target_index} if stage == 2 else {}
            self.log.write(stage=STAGES[stage], **where, **values, **aim, images_per_second=round(speed, 1))
            self.bar.set_postfix({name: f"{value:.4f}" for name, value in values.items()})
        if self.config.minutes is not None:
            minutes = torch.tensor((time.monotonic() - self.began) / 60, device=self.accelerator.device)
            self.out_of_time = float(broadcast(minutes)) >= self.config.minutes  # one clock for all processes
        self.sums, self.since, self.clock = {}, 0, time.monotonic()

    def show(self) -> None:
        """Sample grid and feature-FID of the student's average."""
        self.check(2)
        images = self.progress.step * self.config.batch_size
        found = {}
        if self.accelerator.is_main_process:
            with self.accelerator.autocast():
                value = self.exhibition.visit(
                    self.networks.nets["average"], self.folder / "samples" / f"{images:09d}.png"
                )
            found = {} if value is None else {"feature_fid": value, "num_images": self.exhibition.num_fid}
            if self.config.bits < 16:
                found["kernels"] = kernels_of(self.networks.nets["student"])
        degraded = self.progress.degraded * self.config.batch_size
        self.log.write(stage="evaluation", step=self.progress.step, images=images, degraded_images=degraded, **found)
        self.accelerator.wait_for_everyone()
        self.clock = time.monotonic()

    def save(self, stage: int) -> None:
        """Write the checkpoint."""
        self.check(stage)
        self.progress.lines = self.log.lines
        if self.accelerator.is_main_process:
            kept, optimizers = self.networks.kept, self.networks.optimizers
            save_checkpoint(self.folder / CHECKPOINT, kept, optimizers, asdict(self.progress), self.recipe)
        self.saved = copy.copy(self.progress)
        self.accelerator.wait_for_everyone()
        self.clock = time.monotonic()

    def check(self, stage: int) -> None:
        """Raises UserError if losses or weights hold NaN or infinity."""
        self.flush(stage)
        if not self.networks.finite():
            self.give_up(stage)

    def give_up(self, stage: int) -> None:
        advice = "start anew with lower learning rates (--student-lr, --fake-lr)"
        if self.saved is not None:
            at = f"iteration {self.saved.step}" if self.saved.step else f"degradation {self.saved.degraded}"
            advice = f"the checkpoint of {at} is kept: resume it with lower learning rates (--student-lr, --fake-lr)"
        raise UserError(f"{STAGES[stage]} came to NaN or infinity by iteration {self.step(stage)}; {advice}.")

    def step(self, stage: int) -> int:
        return self.progress.degraded if stage == 1 else self.progress.step

    def student(self):
        """A pipeline with the average of the student's weights."""
        return student_pipeline(self.pipe, self.networks.result(), self.scheduler)
