"""The verb `quantize`: recipe and calibration -> plan -> packed layers in place -> report."""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from torch import nn

from ..calibration.calls import Calls
from ..calibration.measure import store_of
from ..calibration.record import answers
from ..calibration.store import CalibrationStore
from ..checks import check
from ..errors import UserError
from ..hooks import hooked
from ..interrupts import Gate
from ..layers.attention.planned import follow_attention
from ..layers.base import holds_quantized, replace_module
from ..layers.plan import Plan
from ..layers.shift.norms import norms_of
from ..layers.sizes import bytes_in_16_bits, stored_bytes
from ..layers.view import find_layers
from ..pipelines.denoiser import evaluation_mode, turn_at
from ..undo import whole_or_not
from .checkpoint import folder_of
from .components import left_out, narrowed, networks_to_quantize
from .diffusers_bridge import mark_quantized, resolved
from .packing import link_layers
from .planning import check_plan, make_plan
from .recipe import QuantConfig
from .refusals import check_model
from .report import QuantizationReport, Ratio, badness
from .transforming import transformed

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

ERROR_SAMPLES, ERROR_BATCH = 32, 16  # tuples on which layer errors are measured, so many at a time


def quantize(
    target: DiffusionPipeline | nn.Module,
    config: QuantConfig,
    store: CalibrationStore | Calls | None = None,
    *,
    component: str | None = None,
    checkpoint: str | os.PathLike | None = None,
) -> QuantizationReport:
    """Quantize a pipeline's denoisers, or a model, in place.

    Where it fails or is interrupted, all networks are as they were. Other threads wait at them.

    Args:
        target: a diffusers pipeline or an nn.Module in full precision. Of a pipeline all networks are quantized that
            the store covers; without a store, all its denoisers (unet or transformer, transformer_2, prior, ...).
        config: a recipe (PTQ4DMConfig, RTNConfig, ...). With `config.plan` set, that plan is followed and the
            same plan gives the same codes, bit for bit.
        store: from `collect`, or calls from `record`; needed for static activations, for roundings and objectives
            that look at what layers are fed, and for layer errors measured on outputs.
        component: the name of the one network of the pipeline to quantize ("transformer_2", "controlnet").
        checkpoint: a folder that keeps each block of the model as it is packed; the same call with it goes on where
            it was interrupted, with the same codes.

    Returns:
        A report: bytes, kernels, the SQNR of each layer's output on calibration tuples (of its weight when
        there is no store), worst first, and the networks left in full precision. `print(report.table())`.
    """
    _check_types(config, store, component, checkpoint)
    if store is None and config.calibration is not None:
        store = CalibrationStore.load(config.calibration)
    networks = networks_to_quantize(
        target, component, store.components if isinstance(store, CalibrationStore) else ()
    )
    changed = bool(config.changes or (config.plan is not None and config.plan.transforms))  # weights, in place

    def work(gate: Gate) -> QuantizationReport:
        _check_networks(networks, config, store)
        recipes = narrowed(networks, config)
        made = {
            name: _pack(model, recipes[name], _store_for(store, name, model), folder_of(checkpoint, name, networks))
            for name, model in networks.items()
        }
        gate.open = False  # from here on it is a matter of moments
        rows, sizes = [], [0, 0, 0, 0]
        for name, model in networks.items():
            layers, plan, errors, basis = made[name]
            before, full = stored_bytes(model), bytes_in_16_bits(model)
            _put(model, layers, plan, recipes[name])
            own = before, stored_bytes(model), bytes_in_16_bits(model), full
            sizes = [total + one for total, one in zip(sizes, own, strict=True)]
            rows += _rows(layers, errors, basis, f"{name}." if len(networks) > 1 else "")
        rows.sort(key=badness)
        kept = sum(len(find_layers(model)) for model in networks.values())
        found = {name: told for name, recipe in recipes.items() if (told := recipe.found())}
        names = [name for name in networks if name]
        was, after, now, whole = sizes
        left = left_out(target)
        return QuantizationReport(config.summary(), was, after, rows, names, left, found, kept, now, whole)

    with turn_at(target, *networks.values()):
        return whole_or_not(networks.values(), work, values=changed)


def _pack(
    model: nn.Module, config: QuantConfig, store: CalibrationStore | None, checkpoint: Path | None
) -> tuple[dict[str, nn.Module], Plan, dict[str, Ratio], str]:
    """(quantized layers, completed plan, errors of the layers, what they were measured on)."""
    kinds, plans = config.changes, None if config.plan is None else config.plan.transforms
    transforms, store = transformed(model, kinds, plans, store)
    plan = config.plan or make_plan(model, config, store)
    check_plan(model, plan)
    if config.plan is not None and plan.norms.keys() != norms_of(model).keys():
        raise UserError("the plan is of a model with other norms: L1 normalization is in one of them alone.")
    layers, plan = config.pack(model, plan, store, checkpoint)
    plan.transforms = transforms
    if store is None:
        return layers, plan, _weight_errors(model, layers), "weight"
    return layers, plan, _output_errors(model, layers, store), "output"


def _put(model: nn.Module, layers: dict[str, nn.Module], plan: Plan, config: QuantConfig) -> None:
    """Put quantized layers into a model and tell diffusers."""
    for name, layer in layers.items():
        replace_module(model, name, layer)
    link_layers(model.get_submodule, plan.layers)
    plan.norms = norms_of(model)
    if plan.attention:
        follow_attention(model, plan.attention)
    mark_quantized(model, resolved(config, plan))


def _rows(layers: dict[str, nn.Module], errors: dict[str, Ratio], basis: str, prefix: str) -> list[dict]:
    """The report's rows of one network's layers."""
    return [
        {
            "layer": prefix + name,
            "format": str(layer.plan),
            "kernel": layer.kernels_text(),
            "bytes": stored_bytes(layer),
            "sqnr": errors[name].decibel,
            "basis": basis,
            **({"parts": layer.plan.input_parts} if hasattr(layer.plan, "input_parts") else {}),
            **getattr(layer, "stages", {}),
        }
        for name, layer in layers.items()
    ]


def _check_networks(networks: dict[str, nn.Module], config: QuantConfig, store: object) -> None:
    for name, model in networks.items():
        if holds_quantized(model):
            which = f"'{name}'" if len(networks) > 1 else "the model"
            raise UserError(f"{which} is quantized already; load it in full precision to quantize it again.")
        check_model(model, config)
    one = "a plan is" if config.plan is not None else "recorded calls are" if isinstance(store, Calls) else ""
    if one and len(networks) > 1:
        raise UserError(f"{one} of one network, and there are {', '.join(networks)}; name it with component=.")


def _store_for(store: CalibrationStore | Calls | None, name: str, model: nn.Module) -> CalibrationStore | None:
    if isinstance(store, Calls):
        return store_of(model, store)
    return None if store is None else store.of(model, name)


def _check_types(config: object, store: object, component: object, checkpoint: object) -> None:
    if not isinstance(config, QuantConfig):
        raise UserError(f"config is a recipe, such as PTQ4DMConfig(); got {type(config).__name__}.")
    if not (store is None or isinstance(store, (CalibrationStore, Calls))):
        raise UserError(
            "store is a CalibrationStore, from collect or CalibrationStore.load(folder), or calls from record; "
            f"got {type(store).__name__}."
        )
    check(component, str | None, "quantize: component")
    check(checkpoint, str | os.PathLike | None, "quantize: checkpoint")


def _output_errors(model: nn.Module, layers: dict[str, nn.Module], store: CalibrationStore) -> dict[str, Ratio]:
    """Each quantized layer beside its original, fed the original's inputs, on tuples from every bin."""
    errors = {name: Ratio() for name in layers}

    def compare(name: str) -> Callable:
        return lambda _, args, kwargs, output: errors[name].update(output, layers[name](*args, **kwargs))

    calls = store.recorded()
    calls = calls[slice(None, None, max(1, len(calls) // ERROR_SAMPLES))]  # of all times
    with evaluation_mode(model), hooked(model, after={name: compare(name) for name in layers}):
        for batch in calls.batches(ERROR_BATCH):
            answers(model, batch)
    for name, error in errors.items():
        if not math.isfinite(error.signal):
            raise UserError(
                f"layer '{name}' gives NaN or infinity in full precision on the calibration data, so nothing can be "
                "said of its error; collect again, from a model that gives finite numbers."
            )
    return errors


def _weight_errors(model: nn.Module, layers: dict[str, nn.Module]) -> dict[str, Ratio]:
    return {
        name: Ratio.between(model.get_submodule(name).weight, layer.dequantized_weight())
        for name, layer in layers.items()
    }
