"""The slot of number formats: one registration says everything that the rest of the library asks of a format.

A plan is a dataclass of one layer's choices, with a field `format`; a layer class is built from (float layer, plan,
device) with its tensors allocated, and filled by `pack(weight, name, evidence)`. `base.py` has what they share.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import UserError
from ..evidence import LayerEvidence
from ..ranges.registry import weights_need
from ..registry import Registry
from ..rounding.registry import ROUNDERS

FORMATS: Registry = Registry("format", late=True)


@dataclass
class Problem:
    """Layers that are packed together, since they share an input and a format.

    layers: name -> float layer, the leader first; plans: name -> its choices.
    evidence: a calibration.Evidence, or None where no plan needs one.
    enclosing: the name of the module around them whose output may judge choices, or None.
    """

    layers: dict[str, nn.Module]
    plans: dict[str, Any]
    evidence: Any = None
    enclosing: str | None = None

    @property
    def leader(self) -> str:
        return next(iter(self.layers))

    def seen(self, name: str) -> LayerEvidence | None:
        """What a layer is fed, if its plan needs to know."""
        return self.evidence.of(name) if needs_of(self.plans[name]) else None


@dataclass(frozen=True)
class Format:
    """What a number format is.

    plan: the dataclass of a layer's choices.
    layers: nn.Linear, nn.Conv2d -> the quantized class that takes its place.
    build: Problem -> quantized layers by name; their plans are complete.
    needs: plan -> the evidence it takes to pack the layer: "rows"; "module" for the calls of the enclosing module.
    leader: (name, plan) -> the layer whose input it shares; itself where it shares none.
    grid: the kind of grid that rounders get, "uniform", "e4m3", "power", "binary" or "codebook".
    link: (find, name, plan) ties a layer to others, which find(name) gives, where its tensors do not say so; called
        after loading, too.
    """

    plan: type
    layers: dict[type, type]
    build: Callable[[Problem], dict[str, nn.Module]]
    needs: Callable[[Any], frozenset[str]]
    leader: Callable[[str, Any], str]
    link: Callable[[Callable[[str], nn.Module], str, Any], None]
    grid: str = "uniform"


def register_format(
    name: str,
    *,
    plan: type,
    layers: dict[type, type],
    build: Callable[[Problem], dict[str, nn.Module]] | None = None,
    needs: Callable[[Any], frozenset[str]] | None = None,
    leader: Callable[[str, Any], str] | None = None,
    link: Callable[[Callable[[str], nn.Module], str, Any], None] | None = None,
    grid: str = "uniform",
) -> None:
    """Register a number format. What is left out: each layer is packed by itself, from its own weight.

    Raises ValueError where another format has the name.
    """
    FORMATS.add(
        name,
        Format(
            plan,
            layers,
            build or build_each,
            needs or choices_need,
            leader or (lambda layer, _: layer),
            link or (lambda *_: None),
            grid,
        ),
    )


def choices_need(plan: Any) -> frozenset[str]:
    """The evidence that a plan's rounder and range objective look at: that of inputs has chosen already."""
    rounder = ROUNDERS.find(getattr(plan, "rounding", "nearest"))
    return rounder.needs | objective_needs(plan)


def objective_needs(plan: Any) -> frozenset[str]:
    """The evidence that a plan's range objective looks at for weights."""
    return weights_need(getattr(plan, "objective", "max"))


def needs_of(plan: Any) -> frozenset[str]:
    """The evidence that it takes to pack a layer by this plan."""
    return FORMATS.find(plan.format).needs(plan)


def build_each(problem: Problem) -> dict[str, nn.Module]:
    """The quantized layers of a problem, each from its own weight."""
    return {
        name: quantized_copy(layer, problem.plans[name], name, problem.seen(name))
        for name, layer in problem.layers.items()
    }


def empty_quantized(module: nn.Module, plan: Any, device: torch.device | str | None = None) -> nn.Module:
    """A quantized layer of the module's shape, its tensors allocated but not filled.

    Raises UserError where the format has no layer of this kind.
    """
    kinds = FORMATS.find(plan.format).layers
    if type(module) not in kinds:
        raise UserError(f"format '{plan.format}' has no {type(module).__name__}; leave such layers out of the plan.")
    return kinds[type(module)](module, plan, device)


@torch.no_grad()
def quantized_copy(module: nn.Module, plan: Any, name: str, evidence: LayerEvidence | None = None) -> nn.Module:
    """The quantized layer of a float layer: same device, the same bias. `name` is for error messages."""
    layer = empty_quantized(module, plan, module.weight.device)
    layer.pack(module.weight, name, evidence)
    if module.bias is not None:
        layer.bias.copy_(module.bias)
    return layer.train(module.training)


def finite(weight: Tensor, name: str) -> Tensor:
    """The weight in float32. Raises UserError, naming the layer, if it holds NaN or infinity."""
    weight = weight.detach().to(torch.float32)
    if not weight.isfinite().all():
        raise UserError(f"the weight of layer '{name}' holds NaN or infinity; quantize a model that is whole.")
    return weight
