"""LoRA adapters without quantizing again: an adapter B A of rank q is q more ranks of the low-rank branch,

    y = Q_a(x / s) Q_w(R)^T + x [D; A]^T [U, c B]^T + b,    c the adapter's strength,

so adapters cost what their ranks cost, no layer of their own, and the codes stay as they are.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable
from typing import TypeVar

import torch
from torch import nn

from ..checks import check, checked, shown
from ..errors import UserError
from ..layers.base import replace_module
from ..pipelines.denoiser import model_of, turn_at
from ..pipelines.loading import not_while_loading
from ..undo import whole_or_not
from .layers.svdq import _SVDQLayer

Result = TypeVar("Result")


def fuse_lora(target, scales: dict[str, float] | None = None) -> dict[str, int]:
    """Move the active LoRA adapters that peft has put on SVDQuant layers into their low-rank branches.

    For after `pipe.load_lora_weights(...)` or `model.add_adapter(...)`. Adapters that are switched off
    (`set_adapters`, `disable_adapters`), and those on other layers (8-bit, kept), stay with peft. Fused adapters are
    saved with the model and are there again when it is loaded. May be called again for further adapters.

    Args:
        target: a pipeline or its quantized model.
        scales: strength of each adapter, on top of the weight that `set_adapters` gave it; 1 where not named.

    Returns:
        adapter name -> number of layers it was fused into.

    Raises:
        UserError: no adapter is on any SVDQuant layer, `scales` names one that is not there, or an adapter is no
            plain LoRA (DoRA, biases); nothing is changed then.
    """
    return _whole(target, lambda: _fuse(model_of(target), _named(scales)))


def _fuse(model: nn.Module, scales: dict[str, float]) -> dict[str, int]:
    found = [
        (name, wrapper)
        for name, wrapper in model.named_modules()
        if hasattr(wrapper, "lora_A") and isinstance(getattr(wrapper, "base_layer", None), _SVDQLayer)
    ]
    if not any(len(wrapper.lora_A) for _, wrapper in found):
        raise UserError("no LoRA adapter is on an SVDQuant layer; load one first, e.g. with load_lora_weights.")
    counts: dict[str, int] = {}
    for name, wrapper in found:
        for adapter in _active(wrapper):
            plain = not getattr(wrapper, "lora_variant", {}).get(adapter) and wrapper.lora_B[adapter].bias is None
            if not plain or getattr(wrapper, "use_dora", {}).get(adapter):
                raise UserError(f"adapter '{adapter}' on layer '{name}' is no plain LoRA and cannot be fused.")
            for part in (wrapper.lora_A[adapter].weight, wrapper.lora_B[adapter].weight):
                if not part.isfinite().all():
                    raise UserError(f"adapter '{adapter}' on layer '{name}' holds NaN or infinity.")
            counts[adapter] = counts.get(adapter, 0) + 1
    if unknown := scales.keys() - counts.keys():
        active = ", ".join(sorted(counts)) or "none that is active"
        raise UserError(f"there is no adapter '{min(unknown)}' to scale; there are {active}.")
    for name, wrapper in found:
        layer, adapters = wrapper.base_layer, _adapters(wrapper.base_layer)
        for adapter in _active(wrapper):
            trained = _trained_scale(wrapper, adapter)
            strength = wrapper.scaling[adapter] / trained * scales.get(adapter, 1.0)
            up = trained * wrapper.lora_B[adapter].weight
            adapters[adapter] = (wrapper.lora_A[adapter].weight, up, strength)
        stack(layer, adapters)
        _take_off(model, name, wrapper)
    _forget(model, counts)
    return counts


def _whole(target, change: Callable[[], Result]) -> Result:
    """What is done to the layers of a model: to all or, where something is raised, to none."""
    model = model_of(target)
    with turn_at(target), not_while_loading():
        return whole_or_not([model], lambda gate: change())


def scale_lora(target, scales: dict[str, float]) -> None:
    """Change the strength of fused adapters, {"style": 0.5}; 1 is what they were trained with, as in `fuse_lora`.

    Raises UserError for an adapter that is not fused.
    """

    def change() -> None:
        for layer in _fused(target, set(_named(scales))):
            stack(layer, {name: (a, b, scales.get(name, c)) for name, (a, b, c) in _adapters(layer).items()})

    _whole(target, change)


@checked
def unfuse_lora(target, names: Collection[str] | None = None) -> None:
    """Take fused adapters out again (all, or those named): what the layers compute is then, to the bit, as before.

    Raises UserError for an adapter that is not fused.
    """

    def change() -> None:
        for layer in _fused(target, None if names is None else set(names)):
            kept = {} if names is None else {name: one for name, one in _adapters(layer).items() if name not in names}
            stack(layer, kept)

    _whole(target, change)


def _named(scales: dict[str, float] | None) -> dict[str, float]:
    scales = {} if scales is None else scales
    if not isinstance(scales, dict):
        what = "scales are strengths by the names of adapters, such as {'style': 0.5}"
        raise UserError(f"{what}, not {shown(scales)}.")
    return check(scales, dict[str, float], "scales")


def _fused(target, names: set[str] | None) -> list[_SVDQLayer]:
    """The layers with fused adapters, of which all `names` must be (None: any)."""
    modules = model_of(target).modules()
    layers = [layer for layer in modules if isinstance(layer, _SVDQLayer) and layer.plan.adapters]
    present = {name for layer in layers for name in layer.plan.adapters}
    if names is None and not present:
        raise UserError("no adapter is fused; fuse_lora does that.")
    if missing := (names or set()) - present:
        raise UserError(f"no adapter '{min(missing)}' is fused; fused are: {', '.join(sorted(present)) or 'none'}.")
    return layers


def _active(wrapper: nn.Module) -> list[str]:
    """The adapters that take part in what a layer of peft's gives."""
    if wrapper.disable_adapters:
        return []
    return [name for name in wrapper.active_adapters if name in wrapper.lora_A]


def _trained_scale(wrapper: nn.Module, adapter: str) -> float:
    """alpha / rank of an adapter: what `scaling` is before `set_adapters` gives it another weight."""
    rank = wrapper.r[adapter]
    if getattr(wrapper, "use_rslora", {}).get(adapter):
        rank = math.sqrt(rank)
    return wrapper.lora_alpha[adapter] / rank


def _take_off(model: nn.Module, name: str, wrapper: nn.Module) -> None:
    """Take the active adapters off a layer; one that still has others stays wrapped, with none of them active."""
    active = _active(wrapper)
    if len(active) == len(wrapper.lora_A):
        replace_module(model, name, wrapper.base_layer)
        return
    wrapper.set_adapter([])  # else peft makes another one active in place of one that is deleted
    for adapter in active:
        wrapper.delete_adapter(adapter)


def _forget(model: nn.Module, names: Iterable[str]) -> None:
    """Take adapters that are on no layer any more out of peft's records on the model."""
    left = {name for module in model.modules() for name in getattr(module, "lora_A", ())}
    for name in names:
        if name not in left:
            getattr(model, "peft_config", {}).pop(name, None)
    if getattr(model, "peft_config", None) == {}:
        del model.peft_config
        if hasattr(model, "_hf_peft_config_loaded"):
            model._hf_peft_config_loaded = False


def _adapters(layer: _SVDQLayer) -> dict[str, tuple]:
    """The fused adapters of a layer: name -> (A [q, K], B [N, q] times alpha / rank, strength)."""
    found, start = {}, 0
    for name, (rank, strength) in layer.plan.adapters.items():
        part = slice(start, start + rank)
        found[name] = (layer.lora_down[part], layer.lora_up[:, part], strength)
        start += rank
    return found


@torch.no_grad()
def stack(layer: _SVDQLayer, adapters: dict[str, tuple]) -> None:
    """Put adapters, as `_adapters` has them, on a layer in place of its own."""
    down = up = None
    if adapters:
        place = {"device": layer.wscales.device, "dtype": layer.wscales.dtype}
        down = torch.cat([a.detach().flatten(1).to(**place) for a, _, _ in adapters.values()])
        up = torch.cat([b.detach().flatten(1).to(**place) for _, b, _ in adapters.values()], 1)
    for name, value in (("lora_down", down), ("lora_up", up)):
        setattr(layer, name, None if value is None else nn.Parameter(value, requires_grad=False))
    layer.plan.adapters = {name: [a.shape[0], c] for name, (a, _, c) in adapters.items()}
