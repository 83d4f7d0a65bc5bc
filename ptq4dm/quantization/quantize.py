"""The verb `quantize`: recipe and calibration -> plan -> packed layers in place -> report."""

from __future__ import annotations

import os
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from ..awaited.wait import Wait, check_awaitable, rows_of
from ..calibration.calls import Calls
from ..calibration.measure import store_of
from ..calibration.record import decoding
from ..calibration.store import CalibrationStore
from ..checks import check
from ..errors import UserError
from ..hooks import check_settled
from ..interrupts import Gate
from ..layers.attention.planned import follow_attention
from ..layers.base import holds_quantized, replace_module
from ..layers.plan import Plan
from ..layers.shift.norms import norms_of
from ..layers.sizes import bytes_in_16_bits, stored_bytes
from ..layers.view import find_layers
from ..pipelines.denoiser import turn_at
from ..pipelines.parts import DENOISER, kind_of
from ..reconstruction.layer_errors import Ratio, output_errors, weight_errors
from ..undo import whole_or_not
from .checkpoint import folder_of
from .components import Components, left_out, networks_to_quantize, recipes_of
from .diffusers_bridge import mark_quantized, resolved
from .packing import link_layers
from .planning import check_plan, make_plan
from .recipe import QuantConfig
from .refusals import check_model
from .report import QuantizationReport, badness, memory_of
from .transforming import transformed

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline


def quantize(
    target: DiffusionPipeline | nn.Module,
    config: QuantConfig | None = None,
    store: CalibrationStore | Calls | None = None,
    *,
    component: str | None = None,
    components: Components | None = None,
    checkpoint: str | os.PathLike | None = None,
) -> QuantizationReport:
    """Quantize a pipeline's denoisers, a model, or what `components` names of a pipeline, in place.

    Where it fails or is interrupted, all networks are as they were. Other threads wait at them.

    Args:
        target: a diffusers pipeline or an nn.Module in full precision. Of a pipeline all networks are quantized that
            the store covers; without a store, all its denoisers (unet or transformer, transformer_2, prior, ...).
        config: a recipe (PTQ4DMConfig, RTNConfig, ...). With `config.plan` set, that plan is followed and the
            same plan gives the same codes, bit for bit. May be left out beside `components` alone.
        store: from `collect`, or calls from `record`; needed for static activations, for roundings and objectives
            that look at what layers are fed, and for layer errors measured on outputs. Without it a recipe with
            evidence="calls" lets networks wait: each is quantized at the end of as many calls of its own use, inside
            of that use, as from `record` of these calls.
        component: the name of the one network of the pipeline to quantize ("transformer_2", "controlnet").
        components: the names of the networks to quantize ("text_encoder", "vae", "transformer"), or name -> recipe.
            Where none is named, denoisers get `config`; text encoders weights of 4 bits in groups of 64, under inputs
            as they are; autoencoders 8 and 8 bits but at their ends; denoisers 8 and 8 bits where there is no config.
            A store is used where it covers a network.
        checkpoint: a folder that keeps each block of the model as it is packed; the same call with it goes on where
            it was interrupted, with the same codes.

    Returns:
        A report: bytes, kernels, the SQNR of each layer's output on calibration tuples (of its weight when
        there is no store), worst first, the networks left in full precision, and the bytes of every network of the
        pipeline before and after. `print(report.table())`. While a network waits it says so, and `report.cancel()`
        ends that; it is completed when they are quantized.
    """
    _check_types(config, store, component, components, checkpoint)
    if store is None and config is not None and config.calibration is not None:
        store = CalibrationStore.load(config.calibration)
    calibrated = tuple(store.components) if isinstance(store, CalibrationStore) else ()
    networks = networks_to_quantize(target, component, calibrated, components)
    if store is None:
        recipes = recipes_of(target, networks, config, components)
        if any(recipe.awaited_calls for recipe in recipes.values()):
            return _await(target, networks, recipes, components is not None, checkpoint)
    own = list(components.values()) if isinstance(components, Mapping) else []
    changed = any(map(_changes_weights, [config, *own]))

    def work(gate: Gate) -> QuantizationReport:
        _check_float(networks)
        recipes = recipes_of(target, networks, config, components)
        _check_networks(networks, recipes, store)
        stores = {
            name: _store_for(store, name, model, recipes[name], idle=_is_beside(target, name, components))
            for name, model in networks.items()
        }
        held = memory_of(target)
        made = {
            name: _pack(model, recipes[name], stores[name], folder_of(checkpoint, name, networks))
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
            rows += rows_of_layers(layers, errors, basis, f"{name}." if len(networks) > 1 else "")
        rows.sort(key=badness)
        kept = sum(len(find_layers(model)) for model in networks.values())
        found = {name: told for name, recipe in recipes.items() if (told := recipe.found())}
        names = [name for name in networks if name]
        method = (config or next(iter(recipes.values()))).summary()
        was, after, now, whole = sizes
        left = left_out(target)
        report = QuantizationReport(method, was, after, rows, names, left, found, kept, now, whole)
        holds = memory_of(target)
        report.memory = {name: [count, holds[name]] for name, count in held.items()}
        if isinstance(store, Calls):
            report.calls = {name: [len(store), rows_of(store)] for name in networks}
        report.recipes = {} if components is None else {name: one.summary() for name, one in recipes.items()}
        return report

    with ExitStack() as stack:
        stack.enter_context(turn_at(target, *networks.values()))
        if isinstance(store, Calls):
            for model in networks.values():
                stack.enter_context(decoding(model))
        return whole_or_not(networks.values(), work, values=changed)


def _await(
    target: Any, networks: dict[str, nn.Module], recipes: dict[str, QuantConfig], named: bool, checkpoint: Any
) -> QuantizationReport:
    """Quantize the networks whose recipes wait for no calls, and let the others wait.

    named: whether `components` names them; else they are denoisers, or a model by itself.
    """

    def one(name: str, store: Calls | None) -> QuantizationReport:
        place = folder_of(checkpoint, name, networks)
        if named:
            return quantize(target, None, store, components={name: recipes[name]}, checkpoint=place)
        return quantize(target, recipes[name], store, component=name or None, checkpoint=place)

    with turn_at(target, *networks.values()):
        _check_float(networks)
        _check_networks(networks, recipes, None)
        later = {name: model for name, model in networks.items() if recipes[name].awaited_calls}
        for name, model in later.items():
            check_awaitable(model, name)
        done = [one(name, None) for name in networks if name not in later]
        before, full = (sum(map(size, networks.values())) for size in (stored_bytes, bytes_in_16_bits))
        method = next(iter(recipes.values())).summary()
        report = QuantizationReport(
            method, before, before, left=left_out(target), in_16_bits=full, full_in_16_bits=full
        )
        if done:
            report = QuantizationReport.together(done)
        for name, model in later.items():

            def finish(wait: Wait) -> None:
                report.take(wait.name, one(wait.name, wait.calls))

            report.waiting[name] = Wait(target, model, name, recipes[name].awaited_calls, finish)
        return report


def _pack(
    model: nn.Module, config: QuantConfig, store: CalibrationStore | None, checkpoint: Path | None
) -> tuple[dict[str, nn.Module], Plan, dict[str, Ratio], str]:
    """(quantized layers, completed plan, errors of the layers, what they were measured on)."""
    kinds, plans = config.changes, None if config.plan is None else config.plan.transforms
    transforms, store = transformed(model, kinds, plans, store)
    plan = config.plan or make_plan(model, config, store, transforms)
    check_plan(model, plan)
    if config.plan is not None and plan.norms.keys() != norms_of(model).keys():
        raise UserError("the plan is of a model with other norms: L1 normalization is in one of them alone.")
    layers, plan = config.pack(model, plan, store, checkpoint)
    plan.transforms = transforms
    if store is None:
        return layers, plan, weight_errors(model, layers), "weight"
    return layers, plan, output_errors(model, layers, store), "output"


def _put(model: nn.Module, layers: dict[str, nn.Module], plan: Plan, config: QuantConfig) -> None:
    """Put quantized layers into a model and tell diffusers."""
    for name, layer in layers.items():
        replace_module(model, name, layer)
    link_layers(model.get_submodule, plan.layers)
    plan.norms = norms_of(model)
    if plan.attention:
        follow_attention(model, plan.attention)
    mark_quantized(model, resolved(config, plan))


def rows_of_layers(layers: dict[str, nn.Module], errors: dict[str, Ratio], basis: str, prefix: str) -> list[dict]:
    """The report's rows of one network's layers."""
    return [
        {
            "layer": prefix + name,
            "format": str(layer.plan),
            "kernel": layer.kernels_text(),
            "bytes": stored_bytes(layer),
            "sqnr": errors[name].decibel,
            "basis": basis,
            **({"rank": layer.plan.rank} if getattr(layer.plan, "rank", 0) else {}),
            **({"parts": layer.plan.input_parts} if hasattr(layer.plan, "input_parts") else {}),
            **getattr(layer, "stages", {}),
        }
        for name, layer in layers.items()
    ]


def _changes_weights(config: QuantConfig | None) -> bool:
    """Whether a recipe changes the float weights in place."""
    return config is not None and bool(config.changes or (config.plan is not None and config.plan.transforms))


def _called(name: str) -> str:
    """A network's name in a sentence; a model by itself has none."""
    return f"'{name}'" if name else "the model"


def _check_float(networks: dict[str, nn.Module]) -> None:
    check_settled(*networks.values())
    for name, model in networks.items():
        if holds_quantized(model):
            raise UserError(f"{_called(name)} is quantized already; load it in full precision to quantize it again.")


def _check_networks(networks: dict[str, nn.Module], recipes: dict[str, QuantConfig], store: object) -> None:
    """Raises UserError where a network cannot be quantized, or a plan, or recorded calls, would be for several."""
    for name, model in networks.items():
        check_model(model, recipes[name])
        if not find_layers(model):
            raise UserError(f"{_called(name)} has no Linear or Conv2d that can be quantized; leave it out.")
    plans = [id(one.plan) for one in recipes.values() if one.plan is not None]
    one = "a plan is" if len(plans) > len(set(plans)) else "recorded calls are" if isinstance(store, Calls) else ""
    if one and len(networks) > 1:
        raise UserError(f"{one} of one network, and there are {', '.join(networks)}; name it with component=.")


def _is_beside(target: object, name: str, components: Components | None) -> bool:
    """Whether a store of a pipeline's denoisers need not know a network: encoders and autoencoders, named as such."""
    return components is not None and kind_of(target, name) != DENOISER


def _store_for(
    store: CalibrationStore | Calls | None, name: str, model: nn.Module, config: QuantConfig, idle: bool
) -> CalibrationStore | None:
    """The store of one network. idle: whether one that does not know it counts as none."""
    if config.calibration is not None and (store is None or idle):
        store = CalibrationStore.load(config.calibration)
    if isinstance(store, Calls):
        return store_of(model, store)
    if store is None or (idle and not any(one.fits(model) for one in store.components.values())):
        return None
    return store.of(model, name)


def _check_types(config: object, store: object, component: object, components: object, checkpoint: object) -> None:
    if not (isinstance(config, QuantConfig) or (config is None and components is not None)):
        raise UserError(f"config is a recipe, such as PTQ4DMConfig(); got {type(config).__name__}.")
    if not (store is None or isinstance(store, (CalibrationStore, Calls))):
        raise UserError(
            "store is a CalibrationStore, from collect or CalibrationStore.load(folder), or calls from record; "
            f"got {type(store).__name__}."
        )
    check(component, str | None, "quantize: component")
    check(checkpoint, str | os.PathLike | None, "quantize: checkpoint")
