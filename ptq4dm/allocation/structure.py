"""Facts about layers, read off a model's structure alone: for recipes that see no call of it.

What `trace` reads off calls is exact; this is an estimate, by what diffusers' models have in common. A layer of a
block is taken to be fed an embedding, of which a sample has one, where it is

    - in or below a module that activates what it is given before its one or two Linear layers, or that has one
      Linear, an activation and a norm: an adaptive norm,
    - alone in a Sequential and at least twice as wide as its input,
    - beside convolutions of several pixels (the time projection of a residual block of a UNet).

All other layers are taken to be fed tokens, and no layer to share its input. A wrong estimate costs bytes or
accuracy; what the model computes stays right, since no kernel relies on it.
"""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn

from ..calibration.trace import Traced, block_of
from ..layers.view import LayerView, matrix_like

ACTIVATIONS = (nn.SiLU, nn.GELU, nn.ReLU, nn.Mish, nn.Tanh)
CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


def estimate(model: nn.Module, views: list[LayerView]) -> dict[str, Traced]:
    """Layer name -> how it is most likely called; weights need no values (they may be on "meta")."""
    modules = dict(model.named_modules())
    embedded = {name for name, module in modules.items() if name and _is_modulation(module)}
    found = {}
    for view in views:
        parent, _, child = view.name.rpartition(".")
        above = _ancestors(view.name)
        fed_embedding = not embedded.isdisjoint(above) or _reads_embedding(modules[parent], child, view)
        found[view.name] = Traced([view.name], not fed_embedding, view.name, block_of(view.name))
    return found


def _is_modulation(module: nn.Module) -> bool:
    """Whether a module activates what it is given and then makes scales and shifts of it: one Linear, or two."""
    children = list(module.children())
    linear = [i for i, child in enumerate(children) if isinstance(child, nn.Linear)]
    active = [i for i, child in enumerate(children) if isinstance(child, ACTIVATIONS)]
    if not active or not 1 <= len(linear) <= 2 or any(isinstance(child, CONVOLUTIONS) for child in children):
        return False
    return min(active) < min(linear) or (len(linear) == 1 and any(map(_is_norm, children)))


def _is_norm(module: nn.Module) -> bool:
    return "norm" in type(module).__name__.lower() and not any(module.children())


def _reads_embedding(parent: nn.Module, child: str, view: LayerView) -> bool:
    siblings = [module for name, module in parent.named_children() if name != child]
    if isinstance(parent, nn.Sequential):
        outputs, inputs = view.weight.shape
        return not siblings and outputs >= 2 * inputs
    wide = any(isinstance(module, CONVOLUTIONS) and not matrix_like(module) for module in siblings)
    return wide and isinstance(view.module, nn.Linear)


def _ancestors(name: str) -> Iterable[str]:
    parts = name.split(".")
    return (".".join(parts[:i]) for i in range(1, len(parts)))
