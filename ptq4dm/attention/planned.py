"""Attention in 8 bits as part of a quantized model's plan: from now on, and in what it saves."""

from __future__ import annotations

import math
from collections.abc import Collection
from typing import TYPE_CHECKING, Any

from torch import nn

from ..annotations import plain_number
from ..checks import checked, shown
from ..errors import UserError
from ..layers.attention.planned import attention_modules, check_attention, follow_attention
from ..layers.attention.state import Attention8
from ..layers.plan import ATTENTION_KINDS, AttentionPlan
from ..pipelines.denoiser import model_of, turn_at
from ..quantization.diffusers_bridge import quantization_config
from .measure import AttentionErrors

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline


@checked
def plan_attention(
    target: DiffusionPipeline | nn.Module,
    kind: str | None = "int8",
    layers: Collection[str] | None = None,
    errors: AttentionErrors | None = None,
    bound: float | None = None,
) -> Attention8 | None:
    """The `Attention8` of a quantized model, whose attention is in 8 bits from now on; None where it has none.

    It is written into the model's plan, and so saved and loaded with it. Call it again to change it.

    target: a quantized model, or a pipeline whose denoiser is one.
    kind: of queries and keys, "int8" or "e4m3"; None takes all attention in 8 bits out of the plan.
    layers: names of the attention modules; by default all with self-attention or joint attention.
    errors: from `attention_errors`; they go into the plan. bound: layers whose error is larger stay as they are.

    Raises UserError for a model that is not quantized, another kind, unknown layers, or a bound without errors.
    """
    model = model_of(target)
    config = quantization_config(model)
    if config is None or config.plan is None:
        raise UserError("plan_attention writes into the plan of a quantized model; quantize it first.")
    if kind is not None and kind not in ATTENTION_KINDS:
        known = " or ".join(map(repr, ATTENTION_KINDS))
        raise UserError(f"plan_attention: kind must be {known}, or None; got {shown(kind)}.")
    most = _bound(errors, bound)
    there = attention_modules(model)
    plans: dict[str, AttentionPlan] = {}
    if kind is not None:
        chosen = layers if layers is not None else [name for name, one in there.items() if _by_default(one)]
        for name in chosen:
            error = errors.error(name) if errors is not None and name in errors.squares else None
            if error is None or error <= most:
                plans[name] = AttentionPlan(kind, error)
    check_attention(model, plans)
    with turn_at(target):
        config.plan.attention = plans
        return follow_attention(model, plans)


def _by_default(attn: Any) -> bool:
    return not getattr(attn, "is_cross_attention", False) and not isinstance(attn.processor, nn.Module)


def _bound(errors: AttentionErrors | None, bound: Any) -> float:
    if bound is None:
        return math.inf
    number = plain_number(bound)
    if errors is None or type(number) not in (int, float) or not number >= 0:
        raise UserError(
            "plan_attention: bound is a share from 0 on, and goes with errors, which attention_errors measures."
        )
    return float(number)
