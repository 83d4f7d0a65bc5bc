"""The verb `quantize`: recipe and calibration -> plan -> packed layers in place -> report."""

from __future__ import annotations

from torch import nn

from ..calibration.collect import binned_batches
from ..calibration.record import replay
from ..calibration.store import CalibrationStore
from ..errors import UserError
from ..layers.modules import FORMATS, is_quantized, replace_module
from ..layers.plan import Plan
from ..layers.view import find_layers
from ..pipelines.sampling import evaluation_mode, model_of
from .diffusers_bridge import mark_quantized, resolved
from .recipe import QuantConfig
from .report import QuantizationReport, Ratio, stored_bytes

ERROR_SAMPLES = 32  # tuples on which layer errors are measured


def make_plan(model: nn.Module, config: QuantConfig, store: CalibrationStore | None = None) -> Plan:
    """Resolve a recipe against a model in full precision; the caller loads `config.calibration`.

    Raises:
        UserError: the recipe needs calibration that is not there, the store is of another model, or no layer
            is left to quantize.
    """
    if store is None and config.needs_calibration:
        otherwise = ", or choose activations='dynamic'" if getattr(config, "activations", "") == "static" else ""
        raise UserError(
            f"{type(config).__name__} needs calibration: pass a store from ptq4dm.collect(pipe){otherwise}."
        )
    if store is not None:
        store.check_model(model)
    views = find_layers(model, config.modules_to_not_convert)
    plan = Plan(config.method, config.resolve(model, views, store))
    if not plan.layers:
        raise UserError("no layer of the model is left to quantize; check modules_to_not_convert.")
    return plan


def quantize(target, config: QuantConfig, store: CalibrationStore | None = None) -> QuantizationReport:
    """Quantize a pipeline's denoiser, or a model, in place.

    Args:
        target: a diffusers pipeline (its unet or transformer is quantized) or an nn.Module in full precision.
        config: a recipe (PTQ4DMConfig, RTNConfig, ...). With `config.plan` set, that plan is followed and the
            same plan gives the same codes, bit for bit.
        store: from `collect`; needed for static activations, and for layer errors measured on outputs.

    Returns:
        A report: bytes, kernels and the SQNR of each layer's output on calibration tuples (of its weight when
        there is no store), worst first. `print(report.table())`.
    """
    model = model_of(target)
    if any(is_quantized(module) for module in model.modules()):
        raise UserError("the model is quantized already; load it in full precision to quantize it again.")
    if store is None and config.calibration is not None:
        store = CalibrationStore.load(config.calibration)
    plan = config.plan or make_plan(model, config, store)
    check_plan(model, plan)
    layers = config.pack(model, plan, store)
    errors = _output_errors(model, layers, store) if store is not None else _weight_errors(model, layers)
    before = stored_bytes(model)
    for name, layer in layers.items():
        replace_module(model, name, layer)
    config.link(model, plan)
    mark_quantized(model, resolved(config, plan))
    rows = [
        {
            "layer": name,
            "format": str(layer.plan),
            "kernel": layer.kernel_name(),
            "bytes": stored_bytes(layer),
            "sqnr": errors[name].decibel,
            "basis": "weight" if store is None else "output",
            **getattr(layer, "stages", {}),
        }
        for name, layer in layers.items()
    ]
    rows.sort(key=lambda row: row["sqnr"])
    return QuantizationReport(config.summary(), before, stored_bytes(model), rows)


def check_plan(model: nn.Module, plan: Plan) -> None:
    """Raises UserError where a plan names layers that the model does not have, or a format that nobody knows."""
    known = {view.name for view in find_layers(model)}
    missing = [name for name in plan.layers if name not in known]
    if missing:
        raise UserError(
            f"the plan is of another model: it names {len(missing)} layers that are not there (first '{missing[0]}')."
        )
    unknown = {layer.format for layer in plan.layers.values()} - set(FORMATS)
    if unknown:
        raise UserError(f"the plan asks for format {min(unknown)}; known are {', '.join(FORMATS)}.")


def _output_errors(model, layers: dict[str, nn.Module], store: CalibrationStore) -> dict[str, Ratio]:
    """Each quantized layer beside its original, fed the original's inputs, on tuples from every bin."""
    errors = {name: Ratio() for name in layers}

    def compare(name: str):
        return lambda _, args, output: errors[name].update(output, layers[name](*args))

    handles = [model.get_submodule(name).register_forward_hook(compare(name)) for name in layers]
    step = max(1, len(store.calls) // ERROR_SAMPLES)
    calls = store.calls[slice(None, None, step)]
    try:
        with evaluation_mode(model):
            for _, batch in binned_batches(calls, 1, store.num_train_timesteps, 16):
                replay(model, batch)
    finally:
        for handle in handles:
            handle.remove()
    return errors


def _weight_errors(model, layers: dict[str, nn.Module]) -> dict[str, Ratio]:
    return {
        name: Ratio.between(model.get_submodule(name).weight, layer.dequantized_weight())
        for name, layer in layers.items()
    }
