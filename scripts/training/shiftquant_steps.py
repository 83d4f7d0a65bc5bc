"""The steps of a row, and its checkpoint: now and then, when time is over, at an interrupt, and at the end."""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import torch
from fast_steps import Trainer
from shiftquant_measure import finite
from shiftquant_rows import Row

from ptq4dm.files import checkpoint
from ptq4dm.interrupts import terminated_as_interrupted, uninterrupted

FIRST = 10  # steps until the first look at the loss: the first ones compile, and are not timed
LOOK = 250  # steps between two looks
WAIT = 10  # steps that the host may be ahead of the device, whose clock is looked at
AT_RISK = 120.0  # seconds of work that may be lost


class Steps:
    """A trainer taken to its last step, from a checkpoint of an earlier call where there is one.

    deadline: of time.monotonic(), after which a checkpoint is left; None: no limit.
    """

    def __init__(self, trainer: Trainer, row: Row, seed: int, output: Path, deadline: float | None) -> None:
        self.trainer, self.seed, self.deadline = trainer, seed, deadline
        steps = trainer.recipe.steps
        self.recipe = {"row": row.name, "seed": seed, "steps": steps, "batch_size": trainer.recipe.batch_size}
        name = row.name.replace("/", "-").replace(" ", "_")
        self.path = output.with_name(f"{output.stem}.{name}.{seed}.safetensors")
        self.losses: list[float | None] = []
        self.looked, self.before, self.timed, self.timed_steps = 0, 0.0, 0.0, 0
        self._resume()
        self.first, self.began, self.kept = trainer.step, time.monotonic(), time.monotonic()

    @property
    def seconds(self) -> float:
        """Of training, those of earlier calls too."""
        return self.before + time.monotonic() - self.began

    @property
    def milliseconds(self) -> float | None:
        """Of a step of this call, without the first ones and without writing."""
        return round(self.timed * 1e3 / self.timed_steps, 3) if self.timed_steps else None

    def go(self) -> bool:
        """Take all steps that time allows; whether the row can be measured. At least one step, so that calls end.

        SIGTERM and Ctrl-C leave a checkpoint, too: never in the middle of a step.
        """
        last = self.trainer.recipe.steps
        if self.trainer.step == last:
            return True
        with terminated_as_interrupted():
            try:
                while self.trainer.step < last:
                    self._some()
                    if self._over():
                        break
                    if time.monotonic() - self.kept > AT_RISK:
                        self.save()
            except KeyboardInterrupt:
                with uninterrupted():
                    self.save()
                raise
            with uninterrupted():
                self.save()  # measuring takes minutes, and may be interrupted
        return self.trainer.step == last and not self._over()

    def save(self) -> None:
        """Write the checkpoint."""
        trainer = self.trainer
        nets, optimizers = {"net": trainer.net, "average": trainer.average}, {"optimizer": trainer.optimizer}
        progress = {"step": trainer.step, "seconds": self.seconds, "losses": self.losses}
        progress |= {"looked": self.looked, "total": float(trainer.total)}
        checkpoint.save_checkpoint(self.path, nets, optimizers, progress, self.recipe)
        self.kept = time.monotonic()

    def _some(self) -> None:
        """Steps up to the next wait or look, timed."""
        trainer, start, clock = self.trainer, self.trainer.step, time.monotonic()
        look = FIRST if start < FIRST else start + LOOK - (start - FIRST) % LOOK
        until = min(trainer.recipe.steps, look, start + WAIT)
        while trainer.step < until and not (trainer.step > start and self._over()):
            with uninterrupted():
                trainer.run(trainer.step + 1)
        if trainer.device.type == "cuda":
            torch.cuda.synchronize(trainer.device)
        if start - self.first >= FIRST:
            self.timed += time.monotonic() - clock
            self.timed_steps += trainer.step - start
        if trainer.step in (look, trainer.recipe.steps):
            with uninterrupted():
                self.losses.append(finite(trainer.lost() / (trainer.step - self.looked)))
                self.looked = trainer.step

    def _over(self) -> bool:
        return self.deadline is not None and time.monotonic() > self.deadline

    def _resume(self) -> None:
        """Noise and data go on from another seed than a run in one piece: the steps before are not drawn again."""
        if not self.path.exists():
            return
        trainer = self.trainer
        nets, scratch = {"net": trainer.net, "average": trainer.average}, trainer.new_optimizer()
        progress, _ = checkpoint.load_checkpoint(self.path, nets, {"optimizer": scratch}, self.recipe)
        trainer.take(scratch)
        trainer.step, self.before, self.losses = progress["step"], progress["seconds"], progress["losses"]
        self.looked = progress["looked"]
        trainer.total.fill_(progress["total"])
        torch.manual_seed(self.seed + 10**6 * trainer.step)


def deadline_of(args: argparse.Namespace) -> float | None:
    """When a command that begins now is over, of time.monotonic()."""
    return None if args.minutes is None else time.monotonic() + 60 * args.minutes
