"""Static grids of layers' inputs from a calibration store: the part of a plan that calibration decides."""

from __future__ import annotations

import torch

from ..calibration.store import CalibrationStore
from ..evidence import LayerEvidence
from ..kernels.formats import fp8
from ..layers.view import LayerView
from ..ranges.inputs import activation_grid


def int8_grid(
    view: LayerView,
    store: CalibrationStore,
    bits: int,
    objective: str,
    parameter: float | None,
    symmetric: bool = False,
    evidence: LayerEvidence | None = None,
) -> tuple[float, int] | tuple[None, None]:
    """(scale, zero point) of a layer's input, integers of `bits`; (None, None) if calibration never reached it."""
    histogram, limit, low, high = store.input_of(view.name)
    if low > high:
        return None, None
    device = view.module.weight.device
    histogram = histogram.to("cpu" if device.type == "meta" else device)  # the search is quick on a GPU
    weight = None if evidence is None else view.weight.detach().float()
    return activation_grid(histogram, limit, low, high, bits, objective, parameter, symmetric, evidence, weight)


def fp8_scale(view: LayerView, store: CalibrationStore) -> float | None:
    """The scale of a layer's input in e4m3, which reaches to its largest value; None if calibration never did."""
    _, _, low, high = store.input_of(view.name)
    if low > high:
        return None
    scale = max(-low, high) / fp8.LIMIT
    return scale if scale >= torch.finfo(torch.float32).tiny else 1.0
