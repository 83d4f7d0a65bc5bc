"""Candidates: recipes that each would quantize the whole model. Of every layer one of their plans is taken, or none.

A candidate is a line of text, a method and its options:

    rtn weight_bits=4 group_size=64 activations=dynamic
    ptq4dm weight_bits=4 rounding=gptq
"""

from __future__ import annotations

import ast
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, fields, replace
from typing import Any

from torch import nn

from ..calibration.store import CalibrationStore
from ..errors import UserError
from ..layers.plan import LayerPlan, Plan
from ..layers.registry import empty_quantized
from ..layers.sizes import bytes_in_16_bits
from ..layers.view import LayerView
from ..options import saying
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
        options[key] = value
    label = f"{what} '{text}'"
    kind = METHODS.find(name)
    _check_kind(kind, label)
    parsers = {item.name: item.metadata.get("parse") for item in fields(kind)}
    options |= {key: _value(value, parsers.get(key)) for key, value in options.items() if key != "method"}
    with saying(options):
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
            "(nearest, gptq, or rounding=learned, which trains each layer by itself)."
        )
    return recipes


def _value(text: str, parse: Callable[[str], Any] | None) -> Any:
    """A number, True, False or None, or what the option's own parser makes of a text, or else the text itself."""
    for read in (ast.literal_eval, parse or str):
        with suppress(ValueError, SyntaxError):
            return read(text)
    return text


@dataclass
class Planned:
    """A recipe whose plan is made and whose layers are not packed yet."""

    label: str
    recipe: QuantConfig
    plan: Plan


def planned(
    model: nn.Module, recipes: dict[str, QuantConfig], store: CalibrationStore | None, skip: Sequence[str] = ()
) -> list[Planned]:
    """The plan of every candidate. skip: layers that keep full precision.

    Raises UserError where candidates look at different calibration inputs.
    """
    found: list[Planned] = []
    for text, recipe in recipes.items():
        recipe = replace(recipe, modules_to_not_convert=tuple(skip))
        found.append(Planned(text, recipe, make_plan(model, recipe, store)))
    looking = [one for one in found if one.plan.packing]
    if other := next((one for one in looking if one.plan.packing != looking[0].plan.packing), None):
        raise UserError(
            f"candidates '{looking[0].label}' and '{other.label}' look at calibration inputs in different ways; give "
            "both the same num_tuples, seed and prefix."
        )
    return found


def packing_of(plans: Sequence[Planned]) -> dict[str, Any]:
    """The packing options that plans share; {} where none looks at calibration inputs."""
    return next((one.plan.packing for one in plans if one.plan.packing), {})


def packed(model: nn.Module, plans: Sequence[Planned], store: CalibrationStore | None) -> list[Candidate]:
    """Every candidate with its quantized layers; the model stays as it is."""
    found = []
    for one in plans:
        layers, plan = one.recipe.pack(model, one.plan, store)
        found.append(Candidate(one.label, plan.layers, layers))
    return found


def least_bytes(model: nn.Module, views: Sequence[LayerView], plans: Sequence[Planned]) -> float:
    """The least share of the model's bytes in 16 bits that any choice of formats reaches, without packing any."""
    total = rest = bytes_in_16_bits(model)
    for view in views:
        own = bytes_in_16_bits(view.module)
        choices = [one.plan.layers[view.name] for one in plans if view.name in one.plan.layers]
        sizes = [bytes_in_16_bits(empty_quantized(view.module, choice, "meta")) for choice in choices]
        rest += min([own, *sizes]) - own
    return rest / total


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
