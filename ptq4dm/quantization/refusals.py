"""What cannot be quantized or saved so that it loads again: one sentence each, before any work.

A model that diffusers or a tool changed after it was built (adapters, fused projections) has tensors that a new model
of its config has not; saved, it could not be loaded again.
"""

from __future__ import annotations

import copy
import itertools
import re
from collections.abc import Container, Iterable
from typing import Any

from torch import nn

from ..errors import UserError
from ..layers.base import is_quantized
from ..layers.view import in_ip_adapter
from ..pipelines.parts import of_transformers

FUSED = re.compile(r"\.(to_qkv|to_kv|to_added_qkv)(?=\.|$)")  # what diffusers' fuse_qkv_projections makes


def check_model(model: nn.Module, config: Any = None) -> None:
    """Raises UserError where a model, or the plan of a recipe, cannot be quantized, saved and loaded again.

    A model with an IP-Adapter can be quantized: the adapter keeps its precision. It cannot be saved (`check_saving`).
    """
    kind = type(model).__name__
    if hasattr(model, "_orig_mod"):
        raise UserError("the model is compiled; quantize it first and compile it then.")
    if of_transformers(model) and not hasattr(model, "all_tied_weights_keys"):
        raise UserError(
            f"{kind} is of a transformers that would not load it again; update transformers to 5 or later."
        )
    _check_adapters(model, "quantize", "load them again afterwards")
    for module in model.modules():
        hooks = getattr(getattr(module, "_diffusers_hook", None), "hooks", {})
        if any("offload" in hook or "casting" in hook for hook in hooks):
            raise UserError("the model is offloaded or cast layer by layer; quantize it first and do that then.")
    if offloaded := [name for name, parameter in model.named_parameters() if parameter.is_meta]:
        raise UserError(f"'{offloaded[0]}' is not in memory (offloaded); load the model without offloading.")
    layers = getattr(getattr(config, "plan", None), "layers", {})
    if fused := next((name for name, one in layers.items() if getattr(one, "adapters", None)), None):
        raise UserError(
            f"the plan is of a model with adapters in '{fused}'; take it from one without (unfuse_lora), and fuse "
            "them when the new model is quantized."
        )


def check_saving(model: nn.Module, names: Iterable[str]) -> None:
    """Raises UserError where a quantized model would lose something when it is saved. names: its quantized layers."""
    check_parting(model, "save the model")
    _check_adapters(
        model,
        "save",
        "load them again afterwards; an SVDQuant model can take them in with ptq4dm.svdquant.fuse_lora",
        allow_empty=True,
    )
    if any(in_ip_adapter(name) for name, _ in model.named_modules()):
        raise UserError(
            "the model holds an IP-Adapter, which diffusers does not load from a model's file; call "
            "pipe.unload_ip_adapter() before you save, and load_ip_adapter again afterwards."
        )
    quantized = {bare(name) for name, module in model.named_modules() if is_quantized(module)}
    if lost := [name for name in names if name not in quantized]:
        raise UserError(
            f"layer '{lost[0]}' was quantized and is not any more, so the model could not be loaded again; call "
            "model.dequantize() and save it in full precision."
        )
    if foreign := _foreign(model):
        raise UserError(
            f"'{foreign}' is not as in a new {type(model).__name__} of the model's config, so the model could not be "
            "loaded again; quantize the model as it was built."
        )


def fuse_as_in(names: Iterable[str], fresh: nn.Module) -> None:
    """Fuse the projections of a new model where the tensors or layers of another one show that its are fused."""
    known = {name for name, _ in fresh.named_modules()}
    found = {name[: match.end()] for name in names if (match := FUSED.search(name))}
    if found - known and hasattr(fresh, "fuse_qkv_projections"):
        fresh.fuse_qkv_projections()


def _check_adapters(model: nn.Module, verb: str, then: str, allow_empty: bool = False) -> None:
    """allow_empty: whether layers may still be wrapped after their last adapter was deleted."""
    for name, module in model.named_modules():
        if hasattr(module, "base_layer") and not (allow_empty and not _adapters_of(module)):
            raise UserError(
                f"adapters are on the model (on '{name}', for one); take them off before you {verb} it "
                f"(pipe.unload_lora_weights(), or model.unload_lora()), and {then}."
            )
    if getattr(model, "peft_config", None):
        raise UserError(f"adapters are on the model; take them off before you {verb} it, and {then}.")


def check_parting(model: nn.Module, verb: str) -> None:
    """Raises UserError where an adapter is fused into some layers and beside others: a part of it would be left."""
    fused = {name for module in model.modules() for name in getattr(getattr(module, "plan", None), "adapters", ())}
    for where, module in model.named_modules():
        if hasattr(module, "base_layer") and (both := sorted(fused & _adapters_of(module))):
            raise UserError(
                f"adapter '{both[0]}' is fused into some layers and beside others ('{where}', for one); call "
                f"ptq4dm.svdquant.unfuse_lora before you {verb}, and load the adapter again afterwards."
            )


def _adapters_of(wrapper: nn.Module) -> set[str]:
    """The adapters in a wrapper of peft's around a layer."""
    names = getattr(wrapper, "adapter_layer_names", ())
    return {adapter for name in names for adapter in getattr(wrapper, name, ())}


def bare(name: str) -> str:
    """The name of a module or a tensor without the wrappers that peft leaves around layers."""
    return ".".join(part for part in name.split(".") if part != "base_layer")


def _foreign(model: nn.Module) -> str | None:
    """The first tensor that is not as in a new model of the same config; None, too, where none can be made."""
    if not (of_transformers(model) or hasattr(model, "register_to_config")):
        return None  # a plain module, which nothing loads
    from accelerate import init_empty_weights

    try:
        with init_empty_weights(include_buffers=False):
            fresh = _as_built(model)
            fuse_as_in(map(bare, model.state_dict()), fresh)
    except Exception:  # whatever a model's constructor raises: it cannot be loaded in full precision either
        return None
    quantized = {bare(name): module for name, module in model.named_modules() if is_quantized(module)}
    have, expected = (_shapes(one, quantized) for one in (model, fresh))
    have |= {f"{name}.weight": tuple(layer.weight_shape) for name, layer in quantized.items()}
    for name in itertools.chain(have, expected):
        if have.get(name) != expected.get(name):
            return name
    return None


def _as_built(model: Any) -> nn.Module:
    """A new model of a model's config."""
    if of_transformers(model):
        return type(model)(copy.deepcopy(model.config))
    return type(model).from_config({key: one for key, one in model.config.items() if key != "_use_default_values"})


def _shapes(model: nn.Module, quantized: Container[str]) -> dict[str, tuple[int, ...]]:
    """The shapes of a model's tensors by name, of the layers that are quantized those of the weights."""
    return {
        name: tuple(tensor.shape)
        for name, tensor in ((bare(name), tensor) for name, tensor in model.state_dict().items())
        if name.rpartition(".")[0] not in quantized or name.endswith(".weight")
    }
