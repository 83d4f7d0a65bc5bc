"""Attention of a model with operands of 8 bits, for as long as a `with` block.

    with ptq4dm.attention_in_8_bits(pipe) as attention:
        pipe("a red barn")
    print(attention)

Queries and keys are rounded to int8 or e4m3 with scales of their own for each token and each 128 keys, the mean of
the keys taken out; P and the values to e4m3 (kernels/formats/attention8.py). Scales are made in every call, from what
is multiplied: there is nothing to calibrate. Where no kernel serves, the same formula is computed in torch, and the
report says so: then it is slower than attention as it was.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from torch import nn

from ..annotations import plain_number
from ..calibration.calls import timestep_of
from ..checks import checked, shown
from ..errors import UserError
from ..interrupts import uninterrupted
from ..kernels.formats.attention8 import TYPES
from ..layers.attention.planned import attention_modules
from ..layers.attention.processors import in_8_bits, plain_processor
from ..layers.attention.state import Attention8
from ..pipelines.denoiser import denoisers_by_prefix, turn_at

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline


@checked
@contextmanager
def attention_in_8_bits(
    target: DiffusionPipeline | nn.Module,
    kind: str = "int8",
    layers: Collection[str] | None = None,
    timesteps: tuple[float, float] | None = None,
) -> Iterator[Attention8]:
    """An `Attention8`: in the `with` block attention of a pipeline's denoisers, or of a model, has 8-bit operands.

    kind: of queries and keys: "int8", more exact, or "e4m3".
    layers: names of the attention modules; by default all with self-attention or joint attention. Cross-attention
        has few keys: 16 bits are as fast there.
    timesteps: from the first up to, and without, the second, calls are in 8 bits; outside of them, as they were. By
        default everywhere. `attention_errors` measures where it matters.

    Masks, dropout, gradients and heads that share keys are left to torch; the report counts them.

    Raises:
        UserError: another kind, names that are no attention modules, timesteps that hold none, or no layer to serve.
    """
    if kind not in TYPES:
        raise UserError(f"attention_in_8_bits: kind must be {' or '.join(map(repr, TYPES))}; got {shown(kind)}.")
    span = _span(timesteps)
    models = denoisers_by_prefix(target, "what is sampled with attention in 8 bits")
    with turn_at(target):
        state, found = _prepared(models, kind, layers)
        hooks: list[Any] = []
        try:
            with uninterrupted():
                for name, attn in found.items():
                    attn.processor = in_8_bits(attn.processor, state, name)
                if span is not None:
                    for model in models.values():
                        hooks.append(model.register_forward_pre_hook(_gate(state, span, model), with_kwargs=True))
            yield state
        finally:
            with uninterrupted():
                for hook in hooks:
                    hook.remove()
                for attn in found.values():
                    attn.processor = plain_processor(attn.processor)


def _prepared(
    models: dict[str, nn.Module], kind: str, layers: Collection[str] | None
) -> tuple[Attention8, dict[str, nn.Module]]:
    there = {
        prefix + name: part for prefix, model in models.items() for name, part in attention_modules(model).items()
    }
    state, found = Attention8(kind), {}
    if layers is not None and (unknown := [name for name in layers if name not in there]):
        known = f", e.g. '{next(iter(there))}'" if there else "; it has none"
        raise UserError(f"attention_in_8_bits: '{unknown[0]}' is no attention of this model{known}.")
    for name, part in there.items():
        if layers is not None and name not in layers:
            state.left[name] = "not asked for"
        elif why := why_left(part, layers is not None):
            state.left[name] = why
        else:
            found[name] = part
    if not found:
        what = ", ".join(type(getattr(model, "_orig_mod", model)).__name__ for model in models.values())
        name, why = next(iter(state.left.items()), ("", ""))
        raise UserError(
            f"{what} has no attention to compute in 8 bits" + (f": '{name}' is left, for {why}." if name else ".")
        )
    state.layers = list(found)
    return state, found


def why_left(attn: nn.Module, asked: bool) -> str:
    """Why a layer stays as it is; "" for none. asked: it was named."""
    if isinstance(attn.processor, nn.Module):
        return "its processor has weights of its own"
    if hasattr(attn.processor, "_attention8"):
        return "it is in 8 bits already"
    if not asked and getattr(attn, "is_cross_attention", False):
        return "it looks at a text, whose keys are few"
    return ""


def _span(timesteps: Any) -> tuple[float, float] | None:
    if timesteps is None:
        return None
    ends = [plain_number(end) for end in timesteps] if isinstance(timesteps, (tuple, list)) else []
    if len(ends) != 2 or not all(isinstance(end, (int, float)) for end in ends) or not ends[0] < ends[1]:
        raise UserError(
            "attention_in_8_bits: timesteps are two numbers, the first and the one after the last, (0, 900) "
            f"for one; got {shown(timesteps)}."
        )
    return float(ends[0]), float(ends[1])


def time_of(model: nn.Module) -> Callable[[tuple, dict], float | None]:
    """The timestep in a denoiser's arguments, by position and by name."""
    plain = type(getattr(model, "_orig_mod", model))
    names = [name for name in inspect.signature(plain.forward).parameters if name != "self"]
    return lambda args, kwargs: timestep_of(dict(zip(names, args, strict=False)) | kwargs)


def _gate(state: Attention8, span: tuple[float, float], model: nn.Module) -> Any:
    """A hook before a denoiser's calls: whether the timestep is one of 8 bits."""
    time_in = time_of(model)

    def before(module: nn.Module, args: tuple, kwargs: dict) -> None:
        time = time_in(args, kwargs)
        if time is None:
            raise UserError(f"{type(module).__name__} is called without a timestep: timesteps cannot be told apart.")
        state.active = span[0] <= time < span[1]

    return before
