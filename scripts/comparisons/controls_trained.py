"""The shuffled control of trained rounding: as many codes off the nearest as training left, in other places."""

from __future__ import annotations

from controls import generator, random_flips
from torch import nn

from ptq4dm.errors import UserError
from ptq4dm.layers.rounded import RoundedLayer


def flip_trained(model: nn.Module, exact: nn.Module, store, seed: int) -> None:
    """Give each layer its nearest codes, as many of them at random at their other neighbour as it had off them.

    Of layers whose rounding alone was trained. Raises UserError where no layer has a code off the nearest, or scales
    are not those of the plan's grid.
    """
    flips = 0
    for place, (name, layer) in enumerate(_rounded(model)):
        weight = exact.get_submodule(name).weight.detach().float()
        matrix, stored = layer.matrix(weight), layer.matrix(layer.dequantized_weight())
        nearest, grid = layer.rounded(weight, "nearest")
        codes = grid.codes(stored)
        if not grid.values(codes).allclose(stored, rtol=1e-4, atol=1e-8):
            raise UserError(
                f"layer '{name}' has other scales than its plan's grid: flips of its codes are no control."
            )
        flips += int((codes != nearest).sum())
        layer.fill(random_flips(matrix, codes, grid, generator(seed, place)), grid)
    if not flips:
        raise UserError("no code of the model is off the nearest: there are no flips to put in other places.")


def _rounded(model: nn.Module):
    for name, module in model.named_modules():
        if isinstance(module, RoundedLayer) and module.plan.format != "fp8":
            yield name, module
