"""Which layers are trained together, and in which order a model calls them.

A block is an element of a ModuleList or a Sequential that holds two planned layers or more, the innermost one: a
ResNet block or an attention of a UNet, a transformer block. A layer that is in none is a block by itself, and so is
one that is alone in its block because all others are in blocks within it (what makes images smaller in a UNet).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import torch
from torch import nn

from ..calibration.calls import Calls
from ..calibration.record import answers
from ..hooks import hooked
from ..pipelines.denoiser import evaluation_mode
from ..walk.finished import versions


def call_order(model: nn.Module, names: list[str], calls: Calls) -> list[str]:
    """The layers in the order in which a model calls them; those that it never calls come last."""
    seen, _ = _called(model, names, [], calls)
    return [*seen, *(name for name in names if name not in seen)]


def trained_together(model: nn.Module, names: list[str], unit: str, calls: Calls) -> dict[str, str]:
    """Layer -> the module that it is trained in, itself or a block, in the order of the model's calls.

    unit: "block" or "layer". calls: those of one call of the model are made.
    """
    blocks = innermost_blocks(model, names) if unit == "block" else {}
    seen, broken = _called(model, names, sorted(set(blocks.values())), calls)
    # Where somebody calls a block's layers without calling the block, there is no call to train it on; and one that
    # changes its own arguments in place cannot be called with them again.
    broken |= {blocks[name] for name, inside in seen.items() if name in blocks and blocks[name] not in inside}
    order = [*seen, *(name for name in names if name not in seen)]
    return {name: name if blocks.get(name, name) in broken else blocks.get(name, name) for name in order}


def innermost_blocks(model: nn.Module, names: list[str]) -> dict[str, str]:
    """Layer -> its block, by the rule above; layers in no block are left out."""
    lists = (nn.ModuleList, nn.Sequential)
    elements = [
        f"{path}.{place}" if path else place
        for path, module in model.named_modules()
        if isinstance(module, lists)
        for place, element in module.named_children()
        if not isinstance(element, lists)
    ]
    held = {element: [name for name in names if name.startswith(f"{element}.")] for element in elements}
    found: dict[str, str] = {}
    for element in sorted(held, key=lambda one: one.count(".")):  # inner ones later: they have the last word
        if len(held[element]) > 1:
            found |= dict.fromkeys(held[element], element)
    sizes = Counter(found.values())
    return {name: element for name, element in found.items() if sizes[element] > 1}


@torch.no_grad()
def _called(
    model: nn.Module, names: list[str], modules: list[str], calls: Calls
) -> tuple[dict[str, set[str]], set[str]]:
    """(layer -> those of the modules that were running when it was first called, in the order of these calls; the
    modules that changed their own arguments in place)."""
    open_now: dict[str, list[int]] = {}  # module -> versions of its arguments
    seen: dict[str, set[str]] = {}
    changed: set[str] = set()

    def enter(name: str) -> Callable:
        return lambda _, args, kwargs: open_now.update({name: versions((args, kwargs))})

    def leave(name: str) -> Callable:
        def hook(_: nn.Module, args: tuple, kwargs: dict, output: object) -> None:
            if open_now.pop(name) != versions((args, kwargs)):
                changed.add(name)

        return hook

    def note(name: str) -> Callable:
        def hook(*_: object) -> None:
            seen.setdefault(name, set(open_now))

        return hook

    before, after = {name: enter(name) for name in modules}, {name: leave(name) for name in modules}
    layers = {name: note(name) for name in names}
    with evaluation_mode(model), hooked(model, before, after), hooked(model, layers):
        answers(model, calls[:1])
    return seen, changed
