"""A model on the device of a measurement, its calls, and its quantized layers."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

import ptq4dm
from ptq4dm.budgets.candidates import Candidate, packed, planned, recipes_of
from ptq4dm.calibration.calls import Calls
from ptq4dm.calibration.store import CalibrationStore
from ptq4dm.layers.view import LayerView, find_layers
from ptq4dm.pipelines.denoiser import denoiser

OTHER_SEEDS = 10_000


@dataclass
class Subject:
    """model: in full precision. calls: of calibration; other: of other seeds. candidates: packed for this device."""

    model: nn.Module
    calls: Calls
    other: Calls
    views: list[LayerView]
    candidates: list[Candidate]

    @property
    def names(self) -> list[str]:
        return [view.name for view in self.views]

    @property
    def formats(self) -> dict[str, dict[str, nn.Module]]:
        """Label -> quantized layers."""
        return {one.label: one.layers for one in self.candidates}


def subject_of(args, device: str, dtype: str, tuples: int, steps: int) -> Subject:
    """The model of the arguments on a device, with as many calls of each of two sets of seeds."""
    pipe = ptq4dm.load_pipeline(args.model, dtype, device)
    model = denoiser(pipe)
    store, other = (collected(pipe, args, seed, tuples, steps) for seed in (args.seed, args.seed + OTHER_SEEDS))
    candidates = packed(model, planned(model, recipes_of(args.candidates), store), store)
    return Subject(model, store.recorded(), other.recorded(), find_layers(model), candidates)


def collected(pipe, args, seed: int, tuples: int, steps: int) -> CalibrationStore:
    return ptq4dm.collect(
        pipe, ptq4dm.CalibrationConfig("uniform", tuples, steps, batch_size=args.error_batch, seed=seed)
    )


def name_of(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
