"""diffusers' own calls on a quantized model: those that would change float weights are refused in one sentence,
before anything is changed, and those that ask only for what is there are answered."""

from __future__ import annotations

import weakref
from typing import Any, NoReturn, cast

from torch import nn

from ..errors import UserError
from ..layers.weight import answer_for_weights
from .refusals import check_parting


def adopt(model: nn.Module) -> None:
    """Put our calls in the place of diffusers' on a quantized model."""
    for name, call in OWN_CALLS.items():
        if hasattr(model, name):
            setattr(model, name, call)
    if answer_for_weights not in model._state_dict_hooks.values():
        model._register_state_dict_hook(answer_for_weights)
    for names, kind in STANDINS.items():
        for name in names:
            if hasattr(model, name) and (name != "to" or hasattr(model, "decode")):
                setattr(model, name, kind(model, name))


def release(model: nn.Module) -> None:
    """Take back what `adopt` did."""
    for name in [*OWN_CALLS, *(name for names in STANDINS for name in names)]:
        own = vars(model).get(name)
        if own is not None and (own is OWN_CALLS.get(name) or isinstance(own, ModelRef)):
            delattr(model, name)
    hooks = model._state_dict_hooks
    for number in [number for number, hook in hooks.items() if hook is answer_for_weights]:
        del hooks[number]


def refuse_fuse_lora(*_: Any, **__: Any) -> NoReturn:
    """Takes the place of a quantized model's `fuse_lora` and `unfuse_lora`."""
    raise UserError(
        "diffusers' fuse_lora adds adapters to float weights, which a quantized model does not have; leave them "
        "beside the layers (set_adapters weights them), or call ptq4dm.svdquant.fuse_lora on an SVDQuant model."
    )


def refuse_fuse_projections(*_: Any, **__: Any) -> NoReturn:
    """Takes the place of a quantized model's `fuse_qkv_projections`."""
    raise UserError(
        "diffusers' fuse_qkv_projections joins float weights, which a quantized model does not have; ptq4dm.fuse "
        "makes query, key and value share what they read."
    )


class ModelRef:
    """A model, without keeping it alive; in a copy of the model it is the copy.

    Only for calls that somebody makes who holds the model: `quantized().call()` would let go of it before the call.
    """

    def __init__(self, model: nn.Module, *rest: Any) -> None:
        self.of, self.rest = weakref.ref(model), rest

    def __deepcopy__(self, memo: dict) -> ModelRef:
        model = self.of()
        return type(self)(memo.get(id(model), model), *self.rest)

    def __reduce__(self) -> tuple:
        return type(self), (self.of(), *self.rest)


class Parting(ModelRef):
    """A call that takes adapters off a quantized model: refused where a part of one is fused and would stay."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        model = cast(Any, self.of())
        check_parting(model, "take it off")
        return getattr(type(model), self.rest[0])(model, *args, **kwargs)


class Converting(ModelRef):
    """A call of a quantized model in which diffusers calls `model.to` with the dtype that the model has, or
    none, and a quantized model would refuse both; of an autoencoder `to` itself, for pipelines decode in float32 what
    overflows in float16. Codes and scales stay what they are."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        model = cast(Any, self.of())
        model.is_quantized = False
        try:
            return getattr(type(model), self.rest[0])(model, *args, **kwargs)
        finally:
            model.is_quantized = True


STANDINS: dict[tuple[str, ...], type[ModelRef]] = {
    ("_load_ip_adapter_weights", "load_attn_procs", "save_lora_adapter", "to"): Converting,
    ("unload_lora", "delete_adapters"): Parting,
}
OWN_CALLS = {
    "fuse_lora": refuse_fuse_lora,
    "unfuse_lora": refuse_fuse_lora,
    "fuse_qkv_projections": refuse_fuse_projections,
}
