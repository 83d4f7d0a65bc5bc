"""Candidates: recipes that each would quantize the whole model. Of every layer one of their plans is taken, or none.

A candidate is a line of text, a method and its options:

    rtn weight_bits=4 group_size=64 activations=dynamic
    ptq4dm weight_bits=4 rounding=gptq
"""

from __future__ import annotations

import ast
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, nn

from ..calibration.store import CalibrationStore
from ..errors import UserError
from ..layers.plan import LayerPlan
from ..quantization.planning import make_plan
from ..quantization.recipe import METHODS, QuantConfig


@dataclass
class Candidate:
    """A recipe that was followed. plans: layer -> its choices, completed; layers: layer -> the quantized layer."""

    label: str
    plans: dict[str, LayerPlan]
    layers: dict[str, nn.Module]


def recipe_of(text: str, what: str = "candidate") -> QuantConfig:
    """The recipe of a line of text. Raises UserError where there is no such method, option or value, or the recipe
    cannot be mixed with others. what: how messages call it."""
    name, *words = text.split() or [""]
    options: dict[str, Any] = {"method": name}
    for word in words:
        key, equals, value = word.partition("=")
        if not equals:
            raise UserError(f"{what} '{text}': '{word}' is no option; write option=value.")
        options[key] = _value(value)
    label = f"{what} '{text}'"
    _check_kind(METHODS.find(name), label)
    return mixable(QuantConfig.from_dict(options), label)


def mixable(recipe: QuantConfig, label: str) -> QuantConfig:
    """The recipe itself. Raises UserError, which begins with a label, where its plans cannot stand among others'."""
    _check_kind(type(recipe), label)
    if recipe.transforms or recipe.modules_to_not_convert or recipe.plan is not None:
        raise UserError(
            f"{label}: transforms, plan and modules_to_not_convert are of the whole model, not of one "
            "layer's format; leave them out."
        )
    return recipe


def _check_kind(kind: type[QuantConfig], label: str) -> None:
    if kind.loaded_only or hasattr(kind, "candidates"):
        raise UserError(f"{label}: '{kind.method}' has no plan of its own for each layer.")


def recipes_of(texts: Sequence[str]) -> dict[str, QuantConfig]:
    """Text -> recipe. Raises UserError for one that stands twice, none at all, or recipes that look at calibration in
    different ways, as one plan cannot."""
    if not texts:
        raise UserError("candidates must name at least one recipe, such as 'rtn activations=dynamic'.")
    if twice := next((text for text in texts if list(texts).count(text) > 1), None):
        raise UserError(f"candidate '{twice}' stands twice.")
    recipes = {text: recipe_of(text) for text in texts}
    learned = [text for text, recipe in recipes.items() if recipe.learning() is not None]
    if learned:
        raise UserError(
            f"candidate '{learned[0]}' trains whole blocks, which have one format; candidates round layer by layer "
            "(nearest, gptq)."
        )
    return recipes


def _value(text: str) -> Any:
    """A number, True, False or None, or else the text itself."""
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text


def packed(
    model: nn.Module, recipes: dict[str, QuantConfig], store: CalibrationStore | None, skip: Sequence[str] = ()
) -> tuple[list[Candidate], dict[str, Any]]:
    """(every candidate with its quantized layers, the packing options that they share); the model stays as it is.

    skip: layers that keep full precision.

    Raises UserError where candidates look at different calibration inputs.
    """
    found, packing, first = [], dict[str, Any](), ""
    for text, recipe in recipes.items():
        recipe = replace(recipe, modules_to_not_convert=tuple(skip))
        plan = make_plan(model, recipe, store)
        if plan.packing:
            if packing and packing != plan.packing:
                raise UserError(
                    f"candidates '{first}' and '{text}' look at calibration inputs in different ways; give both the "
                    "same num_tuples, seed and prefix."
                )
            packing, first = plan.packing, text
        layers, plan = recipe.pack(model, plan, store)
        found.append(Candidate(text, plan.layers, layers))
    return found, packing


def activation_of(label: str, plan: Any) -> str:
    """What a plan rounds inputs to, as a word: layers that share an input take one of these.

    Formats whose layers share tensors with those that share their input go together with their candidate.
    """
    if plan is None:
        return "float"
    if hasattr(plan, "lender"):
        return f"{plan.format} of {label}"
    kind = "e4m3" if plan.format == "fp8" else f"int{plan.activation_bits}"
    return f"{kind} {'static' if plan.static else 'dynamic'}"


def width_of(plan: Any) -> int:
    """Bits of a weight; of a format that does not tell, 4."""
    return 32 if plan is None else getattr(plan, "weight_bits", 4)


def sixteen_bits(module: nn.Module) -> int:
    """Bytes of a module's tensors, were its floating ones, but for those that a quantized layer keeps, in 16 bits."""
    total = 0
    seen: set[int] = set()
    for owner in module.modules():
        kept = getattr(owner, "kept", ())
        for name, tensor in [*owner.named_parameters(recurse=False), *owner.named_buffers(recurse=False)]:
            if id(tensor) not in seen:
                seen.add(id(tensor))
                total += tensor.numel() * _width(tensor, name in kept)
    return total


def _width(tensor: Tensor, kept: bool) -> int:
    wide = tensor.is_floating_point() and tensor.element_size() > 2 and not kept
    return 2 if wide else tensor.element_size()
