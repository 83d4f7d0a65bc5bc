"""The verb `quantize`: recipe and calibration -> plan -> packed layers in place -> report."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from torch import nn

from ..calibration.measure import binned_batches
from ..calibration.record import replay
from ..calibration.store import CalibrationStore
from ..errors import UserError
from ..hooks import hooked
from ..layers.base import is_quantized, replace_module
from ..pipelines.denoiser import evaluation_mode
from .components import component_of
from .diffusers_bridge import mark_quantized, resolved
from .packing import link_layers
from .planning import check_plan, make_plan
from .recipe import QuantConfig
from .refusals import check_model
from .report import QuantizationReport, Ratio, stored_bytes
from .transforming import transformed

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

ERROR_SAMPLES, ERROR_BATCH = 32, 16  # tuples on which layer errors are measured, so many at a time


def quantize(
    target: DiffusionPipeline | nn.Module,
    config: QuantConfig,
    store: CalibrationStore | None = None,
    *,
    component: str | None = None,
    checkpoint: str | Path | None = None,
) -> QuantizationReport:
    """Quantize a pipeline's denoiser, or a model, in place.

    Args:
        target: a diffusers pipeline (its unet or transformer is quantized) or an nn.Module in full precision.
        config: a recipe (PTQ4DMConfig, RTNConfig, ...). With `config.plan` set, that plan is followed and the
            same plan gives the same codes, bit for bit.
        store: from `collect`; needed for static activations, for roundings and objectives that look at what layers
            are fed, and for layer errors measured on outputs.
        component: the name of another network of the pipeline than its denoiser ("transformer_2", "controlnet").
        checkpoint: a folder that keeps each block of the model as it is packed; the same call with it goes on where
            it was interrupted, with the same codes.

    Returns:
        A report: bytes, kernels and the SQNR of each layer's output on calibration tuples (of its weight when
        there is no store), worst first. `print(report.table())`.
    """
    _check_types(config, store)
    model = component_of(target, component)
    if any(is_quantized(module) for module in model.modules()):
        raise UserError("the model is quantized already; load it in full precision to quantize it again.")
    check_model(model, config)
    if store is None and config.calibration is not None:
        store = CalibrationStore.load(config.calibration)
    kinds, plans = config.transforms, None if config.plan is None else config.plan.transforms
    with transformed(model, kinds, plans, store) as (transforms, store):
        plan = config.plan or make_plan(model, config, store)
        check_plan(model, plan)
        layers, plan = config.pack(model, plan, store, checkpoint)
        plan.transforms = transforms
        errors = _output_errors(model, layers, store) if store is not None else _weight_errors(model, layers)
    before = stored_bytes(model)
    for name, layer in layers.items():
        replace_module(model, name, layer)
    link_layers(model.get_submodule, plan.layers)
    mark_quantized(model, resolved(config, plan))
    rows = [
        {
            "layer": name,
            "format": str(layer.plan),
            "kernel": layer.kernels_text(),
            "bytes": stored_bytes(layer),
            "sqnr": errors[name].decibel,
            "basis": "weight" if store is None else "output",
            **getattr(layer, "stages", {}),
        }
        for name, layer in layers.items()
    ]
    rows.sort(key=lambda row: row["sqnr"])
    return QuantizationReport(config.summary(), before, stored_bytes(model), rows)


def _check_types(config: object, store: object) -> None:
    if not isinstance(config, QuantConfig):
        raise UserError(f"config is a recipe, such as PTQ4DMConfig(); got {type(config).__name__}.")
    if not (store is None or isinstance(store, CalibrationStore)):
        raise UserError(
            f"store is a CalibrationStore, from collect or CalibrationStore.load(folder); got {type(store).__name__}."
        )


def _output_errors(model: nn.Module, layers: dict[str, nn.Module], store: CalibrationStore) -> dict[str, Ratio]:
    """Each quantized layer beside its original, fed the original's inputs, on tuples from every bin."""
    errors = {name: Ratio() for name in layers}

    def compare(name: str) -> Callable:
        return lambda _, args, kwargs, output: errors[name].update(output, layers[name](*args, **kwargs))

    calls = store.recorded()
    calls = calls[slice(None, None, max(1, len(calls) // ERROR_SAMPLES))]
    with evaluation_mode(model), hooked(model, after={name: compare(name) for name in layers}):
        for _, batch in binned_batches(calls, 1, store.num_train_timesteps, ERROR_BATCH):
            replay(model, batch)
    return errors


def _weight_errors(model: nn.Module, layers: dict[str, nn.Module]) -> dict[str, Ratio]:
    return {
        name: Ratio.between(model.get_submodule(name).weight, layer.dequantized_weight())
        for name, layer in layers.items()
    }
