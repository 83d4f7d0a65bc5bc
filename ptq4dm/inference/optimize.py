"""`optimize`: a loaded pipeline made as fast as it is known to get on its device, by one call.

On an NVIDIA GPU: fused (layers/fusing), its repeated blocks compiled (blocks.py; some UNets as a whole), and each
denoiser's calls replayed from CUDA graphs (graphs.py). Attention stays PyTorch's, which chooses among cuDNN's kernels
and its own, unless it is asked for in 8 bits where that is faster. On a CPU: fused where it is in static W8A8, what
lies between products in bfloat16 where the processor has it, or in SVDQuant; memory kept for the next call
(kept_memory.py); other transformers have their blocks compiled (README.md).

Modules, parameters and their names stay, so an optimized pipeline saves and takes adapters as before; `unoptimize`
takes all of it back.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ..annotations import plain_number
from ..checks import shown
from ..errors import UserError
from ..hooks import check_settled
from ..pipelines.denoiser import check_pipeline, denoiser_names, turn_at
from ..undo import whole_or_not
from . import engines, kept_memory, steps
from .blocks import why_not_on_cpu
from .graphs import KEPT
from .report import Optimized, OptimizedModel
from .weight_cache import bytes_of, keep_weights

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

MARK = "_ptq4dm_optimized"
"""The attribute of a network that holds what was done to it, and that dies with it: a table of the process, whose
entries know of the network, would keep it alive."""


def optimize(
    target: DiffusionPipeline | nn.Module,
    *,
    fused: bool | None = None,
    compiled: bool | None = None,
    graphs: bool | None = None,
    kept: int = KEPT,
    weight_cache: str | int | None = None,
    attention: str | None = None,
    engine: str | None = None,
    precision: str | None = None,
    cache: str | os.PathLike | None = None,
) -> Optimized:
    """An `Optimized`, which says what was done to a pipeline's denoisers, or to a model, and undoes it (`.undo()`).

    fused, compiled, graphs: True or False; None: what is known to be best on this device. kept: graphs of different
        shapes that a denoiser keeps at most; each holds the memory of a forward pass, which they share.
    precision: on a CPU "float32" or "bfloat16", of what passes from one kernel to the next in fused modules; with an
        engine, of what is not quantized. None: bfloat16 where the processor multiplies in it.
    weight_cache: memory such as "4GB" for weights of 4 bits that are kept in 8, so that calls need not unpack them:
        as many layers as fit, those first that save most for their bytes (weight_cache.py). The same results.
    attention: "auto": self-attention in 8 bits where that is faster on this GPU, as the first call of a size tells;
        pictures change by more than rounding (kernels/attention/README.md). None: as it is.
    engine: "openvino": each denoiser runs through OpenVINO, on a CPU, in place of all that (openvino/engine.py).
        cache: a folder in which converted models are saved, and found again.

    The first calls are slow: the first of a shape compiles, the second captures. Pictures differ from those before by
    rounding. A graph is captured anew when weights, adapters, their scales or attention's processors change, and
    where a call must not come from a graph (hooks, gradients, training) the model runs as it is written.

    Raises UserError for what is no pipeline or model, for graphs that are asked for where there is no GPU, and for a
    model that torch.compile has taken whole; for an engine that is not installed, or cannot serve the model's layers.
    """
    for name, value in (("fused", fused), ("compiled", compiled), ("graphs", graphs)):
        if value is not None and not isinstance(value, bool):
            raise UserError(f"optimize: {name} is True, False or None (what is best here); got {shown(value)}.")
    kept = plain_number(kept)
    if type(kept) is not int or kept < 1:
        raise UserError(f"optimize: kept is a whole number from 1 on; got {shown(kept)}.")
    engines.check(
        engine, precision, cache, fused or compiled or graphs or weight_cache is not None or attention is not None
    )
    budget = None if weight_cache is None else bytes_of(weight_cache)
    if attention is not None and not (isinstance(attention, str) and attention == "auto"):
        raise UserError(f'optimize: attention is "auto", or None for attention as it is; got {shown(attention)}.')
    models = _models(target)
    for name, model in models.items():
        _check(name, model, graphs, None if engine else precision)
        if engine is not None:
            engines.check_model(f"'{name}'" if name else "the model", model)
    with turn_at(target):
        if engine is not None:
            return whole_or_not(models.values(), lambda gate: _through(engine, models, precision, cache, kept))
        return whole_or_not(
            models.values(),
            lambda gate: _optimized(models, fused, compiled, graphs, kept, budget, attention, precision),
        )


def unoptimize(target: DiffusionPipeline | nn.Module) -> None:
    """Take back what `optimize` did, and free its graphs' memory."""
    models = _models(target)
    with turn_at(target):
        for model in models.values():
            _undo(model)


def _note(one: OptimizedModel) -> None:
    """Let a network know what was done to it."""
    one.model.__dict__[MARK] = one


def _undo(model: nn.Module) -> None:
    """Take back what was done to a network, if anything was."""
    if found := model.__dict__.pop(MARK, None):
        found.undo()


def _models(target: Any) -> dict[str, nn.Module]:
    if isinstance(target, nn.Module):
        return {"": target}
    check_pipeline(target, "what is optimized")
    return {name: getattr(target, name) for name in denoiser_names(target)}


def _check(name: str, model: nn.Module, graphs: bool | None, precision: str | None) -> None:
    called = f"'{name}'" if name else "the model"
    check_settled(model)
    if hasattr(model, "_orig_mod"):
        raise UserError(f"{called} is compiled as a whole; load it anew, and optimize it without.")
    if graphs and not steps.has_graphs(_device(model)):
        raise UserError(
            f"{called} is on {_device(model)}, and graphs are CUDA's; leave graphs out, or move it to a GPU."
        )
    if precision is not None and _device(model).type != "cpu":
        raise UserError(f"{called} is on {_device(model)}, and precision is for a CPU; load the model in the dtype.")


def _device(model: nn.Module) -> torch.device:
    return next((one.device for one in model.parameters()), torch.device("cpu"))


def _optimized(
    models: dict[str, nn.Module], fused, compiled, graphs, kept: int, budget: int | None, attention: str | None,
    precision: str | None,
) -> Optimized:  # fmt: skip
    report = Optimized(unoptimize)
    for model in models.values():
        _undo(model)
    caches = {} if budget is None else keep_weights(models, budget)
    for name, model in models.items():
        report.models[name] = one = OptimizedModel(model, _device(model))
        on_gpu = one.device.type == "cuda"
        if fused is not False:
            steps.fuse_modules(one, precision)
        if one.device.type == "cpu" and kept_memory.can_keep():
            kept_memory.keep()
            one.takes_back.append(kept_memory.release)
            one.keeps_memory = True
        if attention is not None:
            steps.choose_attention(one)
        why = "" if on_gpu or compiled is not None else why_not_on_cpu(model)
        if why:
            one.left["blocks"] = why
        elif compiled is not False:
            steps.compile_network(one)
        if budget is not None:
            steps.keep_weights_of(one, caches.get(name))
        if steps.has_graphs(one.device) if graphs is None else graphs:
            steps.replay_calls(one, kept)
        elif graphs is None:
            one.left["graphs"] = f"there are none on {one.device}"
        _note(one)
    return report


def _through(engine: str, models: dict[str, nn.Module], precision: str | None, cache: Any, kept: int) -> Optimized:
    report = Optimized(unoptimize)
    for name, model in models.items():
        _undo(model)
        report.models[name] = one = OptimizedModel(model, _device(model))
        _note(one)
        if steps.forward_is_taken(one, "the engine"):  # engines.check_model has refused all but a copy's own
            continue
        one.through = through = engines.through(engine, model, precision, cache, kept)
        steps.put(one, through)
        one.takes_back.append(through.clear)
    return report
