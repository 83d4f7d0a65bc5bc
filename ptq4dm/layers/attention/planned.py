"""Attention in 8 bits as a plan says: processors are put into a model, and taken out again."""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

from ...errors import UserError
from ..plan import AttentionPlan
from .processors import in_8_bits, plain_processor
from .state import Attention8


def attention_modules(model: nn.Module) -> dict[str, nn.Module]:
    """Name -> attention of diffusers, known by a processor that computes it."""
    return {name: part for name, part in model.named_modules() if callable(getattr(part, "processor", None))}


def check_attention(model: nn.Module, plans: Mapping[str, AttentionPlan]) -> None:
    """Raises UserError where a plan names what is no attention of the model, or one whose processor has weights."""
    there = attention_modules(model) if plans else {}
    for name in plans:
        if name not in there:
            raise UserError(f"the plan is of another model: it names '{name}' as attention, which is not there.")
        if isinstance(there[name].processor, nn.Module):
            raise UserError(f"attention '{name}' has a processor with weights of its own, and cannot be in 8 bits.")


def follow_attention(model: nn.Module, plans: Mapping[str, AttentionPlan]) -> Attention8 | None:
    """Put attention in 8 bits where the plans have it, and as it was everywhere else; None where that is everywhere.

    The state is kept by the processors, and found again by `attention_of`. Raises as check_attention does.
    """
    check_attention(model, plans)
    there = attention_modules(model)
    for part in there.values():
        part.processor = plain_processor(part.processor)
    if not plans:
        return None
    state = Attention8(next(iter(plans.values())).kind, plans)
    state.kinds = {name: plan.kind for name, plan in plans.items()}
    for name in plans:
        there[name].processor = in_8_bits(there[name].processor, state, name)
    return state


def attention_of(model: nn.Module) -> Attention8 | None:
    """What attention in 8 bits has done in a model so far; None where it has none."""
    for part in attention_modules(model).values():
        if hasattr(part.processor, "_attention8"):
            return part.processor._attention8[0]
    return None
