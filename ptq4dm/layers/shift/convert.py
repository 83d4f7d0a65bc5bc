"""A model's layers on integers and back, in place: the parameters stay the same tensors."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from torch import nn

from ...errors import UserError
from ...kernels.shift.products import EXACT, kernel_name
from ..base import holds_quantized, replace_module
from ..view import find_layers
from .l1 import RATIO
from .layers import ShiftConv2d, ShiftLinear, trainable
from .norms import normalizes, put_norms
from .widths import Widths


@dataclass
class Converted:
    """What a model's layers became: layers on integers and norms by the mean magnitude, by name; `kept`: those Linear
    and Conv2d that have no form on integers, and stay floats."""

    layers: dict[str, Widths] = field(default_factory=dict)
    norms: list[str] = field(default_factory=list)
    kept: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        told = f"{len(self.layers)} layers on integers"
        told += f", {len(self.norms)} norms by the mean magnitude" if self.norms else ""
        return told + (f"; floats stay {', '.join(self.kept)}" if self.kept else "")


def kernels_of(model: nn.Module) -> dict[str, int]:
    """Kernel -> how many layers on integers of a model its products run on, where the model is."""
    layers = [one for one in model.modules() if isinstance(one, ShiftLinear | ShiftConv2d)]
    return dict(Counter(kernel_name(one.weight.device, getattr(one, "kernel_size", (1, 1))) for one in layers))


def kernels_told(kernels: Mapping[str, int]) -> str:
    """What `kernels_of` gives, for a reader."""
    text = ", ".join(f"{name} {count}" for name, count in kernels.items())
    slow = f"; {EXACT}: a CPU without fast products of 8 bits multiplies whole numbers as float32, exactly"
    return text + slow * (EXACT in kernels)


def to_integers(
    model: nn.Module,
    widths: Widths | None,
    norms: bool = False,
    skip: Sequence[str] = (),
    ratios: Mapping[str, float] | None = None,
    wide: Sequence[str] | None = None,
) -> Converted:
    """Let a model compute and train on integers; returns what was changed.

    Args:
        widths: of all layers but the two at the model's ends, which have at least 8 bits, and the first one's input
            twice so many; None leaves layers alone.
        norms: whether GroupNorm and LayerNorm are replaced by L1 normalization. It is another function under the same
            parameters: a model that diffusers saves and loads has its old norms again.
        skip: names or patterns of modules that stay as they are.
        wide: names or patterns of layers whose weights and inputs have at least 8 bits; None: those beside the ends
            of a U-Net (`beside_the_ends`), unless grids are as served.
        ratios: of norms, by name: what their mean magnitudes are multiplied by (norms.ratios); that of Gaussian
            values where there is none.

    Raises:
        UserError: the model is quantized, a pattern fits nothing, or there is nothing to change.
    """
    if holds_quantized(model):
        raise UserError("the model is quantized and its codes do not train; give it in full precision.")
    views, found = find_layers(model, skip), Converted()
    if wide is None:
        wide = beside_the_ends(model)
    for view in views:
        if widths is None:
            continue
        if not trainable(view.module):
            found.kept.append(view.name)
        elif view.role != "inner":
            found.layers[view.name] = widths.at_the_ends(view.role == "first")
        else:
            found.layers[view.name] = widths.beside_the_ends() if view.matches(wide) else widths
    if norms:
        found.norms = [name for name, module in model.named_modules() if normalizes(module)]
    if not found.layers and not found.norms:
        raise UserError(f"{type(model).__name__} has no layer that trains on integers.")
    for name, chosen in found.layers.items():
        replace_module(model, name, on_integers(model.get_submodule(name), chosen))
    put_norms(model, {name: (ratios or {}).get(name, RATIO) for name in found.norms})
    return found


def on_integers(layer: nn.Module, widths: Widths) -> nn.Module:
    """A trainable layer on integers, with the same parameters."""
    return ShiftConv2d(layer, widths) if isinstance(layer, nn.Conv2d) else ShiftLinear(layer, widths)


def beside_the_ends(model: nn.Module) -> list[str]:
    """Names of the layers of a diffusers U-Net that read what its first layers wrote: an image with all its noise,
    of which six bits lose most at the first times. In the first block the first convolution; in the last one, whose
    skip connections bring it back, each block's first convolution and its shortcut."""
    down, up = (list(getattr(model, name, ())) for name in ("down_blocks", "up_blocks"))
    if not (down and up):
        return []
    first, last = (list(getattr(block, "resnets", ())) for block in (down[0], up[-1]))
    blocks = {"down_blocks.0": first[:1], f"up_blocks.{len(up) - 1}": last}
    return [
        f"{name}.resnets.{i}.{part}"
        for name, resnets in blocks.items()
        for i, resnet in enumerate(resnets)
        for part in ("conv1", "conv_shortcut")
        if getattr(resnet, part, None) is not None
    ]


def to_floats(model: nn.Module) -> None:
    """Put plain Linear and Conv2d back, with the same parameters; norms stay what they are, another function."""
    for name, layer in list(model.named_modules()):
        if isinstance(layer, (ShiftLinear, ShiftConv2d)):
            replace_module(model, name, layer.plain())
