"""How far gradients reach at each time: what a batch of a diffusion model puts under one scale.

The loss weighs times differently, and a sample's gradients with it: those of noisy samples are smaller by powers of
ten, and a scale for the whole batch rounds them all to nothing, or to chance.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from ..hooks import hooked
from ..layers.shift.layers import ShiftConv2d, ShiftLinear

LAYERS = (nn.Linear, nn.Conv2d, ShiftLinear, ShiftConv2d)


def gradients_by_output(
    model: nn.Module, loss: Callable[[], Tensor], samples: int
) -> dict[str, tuple[Tensor, Tensor]]:
    """(input, gradient by the output) of every Linear and Conv2d, by name, over one forward and backward pass of
    loss(), a call of the model on so many samples; layers whose output is not one of samples are left out.

    Gradients of the parameters are taken away again.
    """
    found: dict[str, tuple[Tensor, Tensor]] = {}

    def keep(name: str) -> Callable:
        def hook(module: nn.Module, args: tuple, kwargs: dict, output: Tensor) -> None:
            if output.requires_grad and len(output) == samples:
                x = (args[0] if args else next(iter(kwargs.values()))).detach()
                output.register_hook(lambda gradient: found.__setitem__(name, (x, gradient.detach())))

        return hook

    names = [name for name, module in model.named_modules() if isinstance(module, LAYERS)]
    with hooked(model, after={name: keep(name) for name in names}):
        loss().backward()
    model.zero_grad(set_to_none=True)
    return found


def gradient_ranges(
    model: nn.Module, loss: Callable[[], Tensor], times: Tensor, total: int, bins: int = 10
) -> list[dict]:
    """Of each bin of times: how many octaves a sample's largest gradient lies below the batch's, over all layers.

    Args:
        loss: one call of the model on samples of these times [B], whole numbers below `total`.

    Returns:
        dicts of low and high (the bin's times), samples, and octaves: the least, the median and the largest of
        log2(batch / sample) over samples and layers; None where no sample is.
    """
    found = gradients_by_output(model, loss, len(times))
    peaks = torch.stack([gradient.float().flatten(1).abs().amax(1) for _, gradient in found.values()])
    octaves = torch.log2(peaks.amax(1, keepdim=True) / peaks).cpu()
    places = (times.cpu() * bins // total).clamp(0, bins - 1)
    rows = []
    for place in range(bins):
        inside = octaves[:, places == place].flatten()
        inside = inside[inside.isfinite()]
        figures = None if not len(inside) else [inside.min().item(), inside.median().item(), inside.max().item()]
        edges = {"low": place * total // bins, "high": (place + 1) * total // bins}
        rows.append({**edges, "samples": int((places == place).sum()), "octaves": figures})
    return rows
