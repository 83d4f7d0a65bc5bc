"""The columns of the table of pipelines: collected, quantized, saved and loaded as a user would.

The catalogue is `pipelines.py` beside: `PIPELINES` holds a function for each that builds the pipeline and what it is
called with, `run` samples from it.
"""

from __future__ import annotations

import dataclasses
import shutil
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pipelines
import torch
from diffusers import DiffusionPipeline

import ptq4dm

from .columns import Column
from .subject import FLOAT, FORMATS, Wrong, distance, must_be_within, must_equal, outputs

BOUNDS = {"W8A8": 0.3, "SVDQuant": 0.6}  # of what is sampled in two steps
STEPS = 2


@dataclass(frozen=True)
class PipelineCase:
    name: str
    build: Callable[[], Any]
    variant: str = ""

    def subject(self, folder: Path, seed: int) -> PipelineSubject:
        return PipelineSubject(self, folder, seed)


class PipelineSubject:
    """A pipeline, its calibration, and the pipeline quantized, each made once."""

    def __init__(self, case: PipelineCase, folder: Path, seed: int = 0) -> None:
        self.case, self.folder, self.seed = case, folder, seed
        self._made: dict[str, Any] = {}

    def once(self, key: str, make: Callable[[], Any]) -> Any:
        """What `make` gives the first time; what it raised is raised again each time."""
        if key not in self._made:
            try:
                self._made[key] = make()
            except Exception as error:
                self._made[key] = error
        if isinstance(self._made[key], Exception):
            raise self._made[key]
        return self._made[key]

    def model(self, kind: str) -> Any:
        """The pipeline as it is or with its denoisers in one of FORMATS."""
        return self.once(kind, lambda: self._pipeline(kind))

    def _pipeline(self, kind: str) -> Any:
        pipe = self.case.build().pipe
        if kind != FLOAT:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                ptq4dm.quantize(pipe, FORMATS[kind](), self.store())
        return pipe

    def store(self) -> Any:
        return self.once("store", self._collected)

    def _collected(self) -> Any:
        case = self.case.build()
        config = ptq4dm.CalibrationConfig(
            num_samples=2, num_inference_steps=STEPS, num_bins=2, batch_size=1 if case.alone else 2, seed=self.seed
        )
        return ptq4dm.collect(case.pipe, config, conditioning=case.conditioning, pipeline_kwargs=case.pipeline_kwargs)

    def sampled(self, pipe: Any) -> list[torch.Tensor]:
        """All arrays of numbers of a sample of one seed."""
        torch.manual_seed(self.seed)
        given = pipelines.run(dataclasses.replace(self.case.build(), pipe=pipe), [0], STEPS)
        return outputs([torch.as_tensor(array).double() for array in pipelines.values(given)])


def sampled(subject: PipelineSubject, kind: str) -> dict[str, float]:
    subject.sampled(subject.model(kind))
    return {}


def collect(subject: PipelineSubject, kind: str) -> dict[str, float]:
    subject.store()
    return {}


def accuracy(subject: PipelineSubject, kind: str) -> dict[str, float]:
    error = distance(subject.sampled(subject.model(kind)), subject.sampled(subject.model(FLOAT)))
    must_be_within(error, BOUNDS[kind])
    return {"error": error}


def save(subject: PipelineSubject, kind: str) -> dict[str, float]:
    folder = subject.folder / kind
    shutil.rmtree(folder, ignore_errors=True)
    subject.model(kind).save_pretrained(folder)
    if not (folder / "model_index.json").is_file():
        raise Wrong("there is no model_index.json in the folder")
    return {"bytes": sum(path.stat().st_size for path in folder.rglob("*.safetensors"))}


def load(subject: PipelineSubject, kind: str) -> dict[str, float]:
    folder = subject.folder / kind
    if not folder.is_dir():
        save(subject, kind)
    loaded = DiffusionPipeline.from_pretrained(folder)
    loaded.set_progress_bar_config(disable=True)
    must_equal(subject.sampled(loaded), subject.sampled(subject.model(kind)), "what the loaded pipeline samples")
    return {}


def columns() -> dict[str, Column]:
    """Name -> column, in the order in which they are run."""
    within, both = "what is sampled differs from float's by at most {:g}", "in both formats"
    return {
        "collect": Column("calls of its denoisers are collected", collect, (FLOAT,), True, sampled),
        "W8A8": Column(within.format(BOUNDS["W8A8"]), accuracy, ("W8A8",), True, sampled),
        "SVDQuant W4A8": Column(within.format(BOUNDS["SVDQuant"]), accuracy, ("SVDQuant",), True, sampled),
        "save": Column(f"`save_pretrained`, {both}", save),
        "load": Column(f"`from_pretrained` samples the same to the bit, {both}", load),
    }


CASES = {name: PipelineCase(name, build) for name, build in pipelines.PIPELINES.items()}
