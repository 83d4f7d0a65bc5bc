"""A model on which the rows of compare_gradptq.py are measured, its truth and its calibrations."""

from __future__ import annotations

import copy
import time
from pathlib import Path
from typing import Any

import torch
from conditions import calibration_folder, free_memory, made_on, stores_of, watched
from gradptq_recipes import calibration, recipe
from paired import held_out
from trials import Trial

import ptq4dm
from ptq4dm.calibration.evidence import calibration_batches
from ptq4dm.pipelines.denoiser import denoiser

LONG = 10_000  # steps of a row that is kept block by block


class Bench:
    """One model, its truth, and the calibration of one law and seed at a time."""

    def __init__(self, model: str, args, pipe=None):
        """pipe: the model's pipeline, where it is there already."""
        self.model, self.args = model, args
        self.pipe = pipe or ptq4dm.load_reference(model, device=args.device)
        if torch.device(args.device).type == "cuda":
            denoiser(self.pipe).to(memory_format=torch.channels_last)
        self.truth = held_out(self.pipe, args.num_paired, args.sampling_steps, args.batch_size)
        self.calibrated: tuple[Any, Any] = (None, None)  # (law, seed) and its store

    def store(self, law: str, seed: int):
        if self.calibrated[0] != (law, seed):
            self.calibrated = (None, None)  # its memory first
            config = calibration(law, seed, self.args)
            folder = calibration_folder(self.args, self.model, law, config)
            self.calibrated = (law, seed), ptq4dm.collect(self.pipe, config, folder)  # one process makes it
        return self.calibrated[1]

    def measure(self, trial: Trial, bits: str, seed: int, rate: float | None = None) -> dict:
        """The row with its figures and their conditions, as JSON holds them."""
        free_memory(self.args.device)
        args, exact = self.args, self.truth.exact
        config = recipe(trial, bits, args.options, seed, rate)
        store = self.store(trial.law or args.law, seed)
        start = time.perf_counter()  # stores are waited for, and shared
        model = copy.deepcopy(exact)
        kept = self._kept(trial, bits, seed)
        resumed = kept is not None and kept.exists()
        with watched(args.device) as cost:
            report = ptq4dm.quantize(model, config, store, checkpoint=kept)
        if trial.control is not None:
            trial.control(model, exact, store, seed)
        figures = self.truth.compare(model) if args.eval == "all" else self.truth.predicted(model)
        return {
            "model": self.model, "bits": bits, "stage": trial.stage, "row": trial.name, "seed": seed,
            "options": trial.options, "learning_rate": getattr(config, "rate", None),
            "recipe": config.summary(), **figures, "calibration_error": self._seen(model, store),
            "flips": flips(report.layers, exact), "seconds_to_quantize": None if resumed else cost["seconds"],
            "memory_to_quantize": cost["peak_memory"], **made_on(args.device),
            "seconds": round(time.perf_counter() - start, 1),
        }  # fmt: skip

    def _kept(self, trial: Trial, bits: str, seed: int) -> Path | None:
        """Where the blocks of a row are kept that takes long, so that the same command goes on with it."""
        steps = trial.options.get("steps", self.args.whole["steps"])
        if trial.rounding or steps < LONG:
            return None
        return stores_of(self.args) / f"{self.model}-{bits}-{trial.name}-seed-{seed}-blocks".replace(" ", "-")

    def _seen(self, model, store) -> float:
        """The error on the calibration tuples that training looked at."""
        noise = signal = 0.0
        for calls in calibration_batches(store.recorded(), self.args.whole["num_tuples"]):
            error = self.truth.error(model, calls, self.truth.predict(self.truth.exact, calls))
            noise += float(sum(one for one, _, _ in error.sums))
            signal += float(sum(one for _, one, _ in error.sums))
        return noise / signal


def flips(layers: list[dict], exact: torch.nn.Module) -> float | None:
    """The share of codes that are off the nearest, of the report's layers that say theirs; None where none does."""
    told = [
        (row["flips"], exact.get_submodule(row["layer"]).weight.numel())
        for row in layers
        if row.get("flips") is not None
    ]
    return sum(share * count for share, count in told) / sum(count for _, count in told) if told else None
