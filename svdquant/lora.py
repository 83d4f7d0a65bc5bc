"""LoRA adapters without quantizing again: an adapter B A of rank q is q more ranks of the low-rank branch,

    y = Q_a(x / s) Q_w(R)^T + x [D; A]^T [U, c B]^T + b,    c the adapter's strength,

so adapters cost what their ranks cost, no layer of their own, and the codes stay as they are.
"""

from __future__ import annotations

import torch

from ..errors import UserError
from ..layers.base import replace_module
from ..pipelines.denoiser import model_of
from .layers.svdq import _SVDQLayer


def fuse_lora(target, scales: dict[str, float] | None = None) -> dict[str, int]:
    """Move the LoRA adapters that peft has put on SVDQuant layers into their low-rank branches.

    For after `pipe.load_lora_weights(...)` or `model.add_adapter(...)`; for FLUX, whose loader in diffusers looks for
    float weights, `pipe.transformer.load_lora_adapter(...)`. Adapters on other layers (8-bit, kept) stay
    with peft. May be called again for further adapters.

    Args:
        target: a pipeline or its quantized model.
        scales: strength of each adapter, on top of its own alpha / rank; 1 where not named.

    Returns:
        adapter name -> number of layers it was fused into.

    Raises:
        UserError: no adapter is on any SVDQuant layer, `scales` names one that is not there, or an adapter is no
            plain LoRA (DoRA, biases); nothing is changed then.
    """
    model, scales = model_of(target), _named(scales)
    found = [
        (name, wrapper)
        for name, wrapper in model.named_modules()
        if hasattr(wrapper, "lora_A") and isinstance(getattr(wrapper, "base_layer", None), _SVDQLayer)
    ]
    counts: dict[str, int] = {}
    for name, wrapper in found:
        for adapter in wrapper.lora_A:
            if getattr(wrapper, "use_dora", {}).get(adapter) or wrapper.lora_B[adapter].bias is not None:
                raise UserError(f"adapter '{adapter}' on layer '{name}' is no plain LoRA and cannot be fused.")
            counts[adapter] = counts.get(adapter, 0) + 1
    if not counts:
        raise UserError("no LoRA adapter is on an SVDQuant layer; load one first, e.g. with load_lora_weights.")
    if unknown := scales.keys() - counts.keys():
        raise UserError(f"there is no adapter '{min(unknown)}' to scale; there are {', '.join(sorted(counts))}.")
    for name, wrapper in found:
        layer = wrapper.base_layer
        adapters = dict(getattr(layer, "adapters", {}))
        for adapter in wrapper.lora_A:
            trained = wrapper.scaling[adapter] * wrapper.lora_B[adapter].weight
            adapters[adapter] = (wrapper.lora_A[adapter].weight, trained, scales.get(adapter, 1.0))
        _stack(layer, adapters)
        replace_module(model, name, layer)
    return counts


def scale_lora(target, scales: dict[str, float]) -> None:
    """Change the strength of fused adapters, {"style": 0.5}; 1 is what they were trained with, as in `fuse_lora`.

    Raises UserError for an adapter that is not fused.
    """
    layers = _fused(target, set(_named(scales)))
    for layer in layers:
        _stack(layer, {name: (a, b, scales.get(name, c)) for name, (a, b, c) in layer.adapters.items()})


def unfuse_lora(target, names: list[str] | None = None) -> None:
    """Take fused adapters out again (all, or those named): what the layers compute is then, to the bit, as before.

    Raises UserError for an adapter that is not fused.
    """
    for layer in _fused(target, None if names is None else set(names)):
        kept = {} if names is None else {name: one for name, one in layer.adapters.items() if name not in names}
        _stack(layer, kept)


def _named(scales: dict[str, float] | None) -> dict[str, float]:
    if not isinstance(scales or {}, dict):
        raise UserError(f"scales are strengths by the names of adapters, such as {{'style': 0.5}}, not {scales!r}.")
    return scales or {}


def _fused(target, names: set[str] | None) -> list[_SVDQLayer]:
    """The layers with fused adapters, of which all `names` must be (None: any)."""
    modules = model_of(target).modules()
    layers = [layer for layer in modules if isinstance(layer, _SVDQLayer) and getattr(layer, "adapters", None)]
    present = {name for layer in layers for name in layer.adapters}
    if names is None and not present:
        raise UserError("no adapter is fused; fuse_lora does that.")
    if missing := (names or set()) - present:
        raise UserError(f"no adapter '{min(missing)}' is fused; fused are: {', '.join(sorted(present)) or 'none'}.")
    return layers


@torch.no_grad()
def _stack(layer: _SVDQLayer, adapters: dict[str, tuple]) -> None:
    """Put adapters, name -> (A [q, K], B [N, q] times alpha / rank, strength), on a layer in place of its own."""
    layer.adapters = adapters
    if not adapters:
        layer.lora_down = layer.lora_up = None
        return
    place = {"device": layer.wscales.device, "dtype": layer.wscales.dtype}
    layer.lora_down = torch.cat([a.detach().flatten(1) for a, _, _ in adapters.values()]).to(**place)
    layer.lora_up = torch.cat([c * b.detach().flatten(1) for _, b, c in adapters.values()], 1).to(**place)
