"""A run of personalization: its folder, checkpoint, log and result, so that a stopped one goes on to the same bits.

checkpoint.safetensors        the embedding, Adam's moments, the subspace's buffer, how far it came, the log so far
log.jsonl                     the loss on the fixed rows, now and then
learned_embeds.safetensors    the result (class_row.safetensors): written with each checkpoint
"""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from ...errors import UserError
from ...files.atomic import replacing
from ...files.checkpoint import ANEW, load_checkpoint, save_checkpoint
from ...files.claim import claimed
from ...files.outside import checked_object, outside
from ...files.places import lying_in, output_folder
from ...pipelines.generate import fingerprint
from ...progress import progress_bar
from .config import PersonalizeConfig
from .embedding_file import NAMES, save_embedding
from .problem import Problem
from .targets import Target
from .zeroth_order import Tuned, change, gradient, take

CHECKPOINT, LOG = "checkpoint.safetensors", "log.jsonl"
AT_RISK = 300.0  # seconds of work that an interruption may cost


@dataclass(frozen=True)
class Personalized:
    """path: of the embedding's file. log: {"step", "loss"} from step 0 on, on the fixed rows."""

    path: Path
    log: list[dict]


def identity_of(pipe, target: Target, pictures: Sequence[Tensor], config: PersonalizeConfig) -> dict:
    """All that has to be the same for a run to go on, as plain JSON values."""
    images = hashlib.sha256()
    for picture in pictures:
        images.update(repr(tuple(picture.shape)).encode() + picture.contiguous().numpy().tobytes())
    settings = {"images": images.hexdigest()[:16], "model": fingerprint(pipe), **target.facts}
    return json.loads(json.dumps({**config.identity(), **settings}))


@contextmanager
def alone_in(folder: Path, identity: dict, resume: bool) -> Iterator[None]:
    """The folder of a run, made and claimed for as long as the block lasts.

    Raises UserError where there is nothing to resume, something lies in a folder that should be new, or another run
    with other settings writes there.
    """
    if resume and not folder.exists():  # a name that was mistyped
        raise UserError(f"there is no checkpoint in {folder} to resume; leave --resume out to start a new run.")
    with output_folder(folder) as place, claimed(place, identity):
        there = [path.name for path in lying_in(place)]
        if there and not resume:
            raise UserError(f"{folder} is not empty; go on with the run in it (--resume) or choose another --output.")
        yield


def tune(problem: Problem, folder: Path, identity: dict, resume: bool) -> Personalized:
    """Take the steps that are left. No gradient is computed in it.

    Raises UserError where losses came to NaN or infinity (the last good checkpoint is kept).
    """
    config, target = problem.config, problem.target
    state = Tuned.start(target.start)
    log: list[dict] = []
    if resume and lying_in(folder):  # one that was stopped before its first checkpoint starts anew
        state, log = _resumed(problem, folder / CHECKPOINT, identity)
    fixed, result = problem.fixed(), folder / NAMES[target.facts["kind"]]

    def note() -> float:
        loss = float(problem.fixed_loss(chosen(state, config), fixed))
        _check(math.isfinite(loss), state)
        log.append({"step": state.step, "loss": loss})
        return loss

    def save() -> None:
        _check(bool(state.u.isfinite().all()), state)
        progress = {"step": state.step, "log": log}
        save_checkpoint(folder / CHECKPOINT, {}, {}, progress, identity, state.tensors())
        save_embedding(result, target, chosen(state, config))
        with replacing(folder / LOG) as temporary:
            temporary.write_text("".join(json.dumps(line, sort_keys=True) + "\n" for line in log), encoding="utf-8")

    if not log:
        note()
        save()  # whenever it is interrupted, there is something to resume
    saved, kept, first = None, time.monotonic(), log[0]["loss"]
    with progress_bar(
        initial=state.step, total=max(config.steps, state.step), desc="personalize", unit="step"
    ) as bar:
        while state.step < config.steps:
            step_once(problem, state)
            bar.update()
            if state.step % config.log_every == 0 or state.step == config.steps:
                bar.set_postfix(loss=f"{note():.5f}", start=f"{first:.5f}")
            if state.step % config.checkpoint_every == 0 or time.monotonic() - kept > AT_RISK:
                save()
                saved, kept = state.step, time.monotonic()
    if saved != state.step:  # a run killed between two files of a checkpoint writes both again
        save()
    return Personalized(result, log)


def step_once(problem: Problem, state: Tuned) -> None:
    """One update of the embedding; its random choices depend on the number of the step alone."""
    losses, directions = problem.pairs(state.u, problem.draw("step", state.step))
    g = gradient(losses, directions, problem.config)
    take(state, change(state, g, problem.config), problem.config)


def _check(finite: bool, state: Tuned) -> None:
    if not finite:
        raise UserError(
            f"losses came to NaN or infinity by step {state.step}; start anew with a smaller learning_rate or "
            "perturbation, or load the model in a wider dtype."
        )


def chosen(state: Tuned, config: PersonalizeConfig) -> Tensor:
    """The embedding [d] that a run has come to: the moving average, or the last where there is none."""
    return state.average if config.average else state.u


def _resumed(problem: Problem, path: Path, identity: dict) -> tuple[Tuned, list[dict]]:
    start = problem.target.start
    names = Tuned.start(start).tensors()
    progress, tensors = load_checkpoint(path, {}, {}, identity, names)
    with outside(path, ANEW):
        checked_object(progress, {"step": int, "log": list})
        log = [checked_object(line, {"step": int, "loss": float}) for line in progress["log"]]
        if progress["step"] < 0 or not log:
            raise ValueError("its progress is of no run")
        for name, wanted in names.items():
            found = tensors.get(name)
            if found is None or found.shape[-1:] != wanted.shape[-1:] or found.ndim != wanted.ndim:
                raise ValueError(f"'{name}' does not fit this embedding")
        return Tuned.of(tensors, progress["step"], start.device), log
