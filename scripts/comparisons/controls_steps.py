"""Controls of transforms, rotated inputs, zero points, planes, rows of 8 bits; controls.py says what they are."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping

import torch
from controls import generator, permuted
from torch import Tensor, nn

from ptq4dm.allocation.mixed_rows import mixed_plan
from ptq4dm.allocation.salient_rows import chosen_rows
from ptq4dm.errors import UserError
from ptq4dm.kernels.formats.codebook import LIMIT, CodebookGrid
from ptq4dm.kernels.formats.hadamard import block_of
from ptq4dm.layers.plan import Int4Plan, Plan
from ptq4dm.quantization.packing import pack_plan, packing_of
from ptq4dm.quantization.planning import make_plan
from ptq4dm.quantization.recipe import QuantConfig
from ptq4dm.ranges.codebook import NORMAL, codebook_grid
from ptq4dm.transforms.attention import value_streams
from ptq4dm.transforms.feedforward import hidden_streams


def shuffle_divisors(model: nn.Module, plan: Plan, store, seed: int) -> Plan:
    """Smoothing divides as it did, but by the divisors of other channels of the layer."""
    plan = copy.deepcopy(plan)
    for place, change in enumerate(_of_kind(plan, "smooth")):
        divisors = change.tensors["divisors"]
        change.tensors["divisors"] = divisors[torch.randperm(len(divisors), generator=generator(seed, place))]
    return plan


def shuffle_order(model: nn.Module, plan: Plan, store, seed: int) -> Plan:
    """Channels change places as they did, but in an order that is drawn: within heads, where they have some."""
    plan = copy.deepcopy(plan)
    heads = {tuple(stream.modules): stream.heads for stream in value_streams(model) + hidden_streams(model)}
    for place, change in enumerate(_of_kind(plan, "reorder")):
        drawn, count = generator(seed, place), heads[tuple(change.modules)]
        order = change.tensors["order"]
        width = len(order) // count
        parts = [head * width + torch.randperm(width, generator=drawn) for head in range(count)]
        change.tensors["order"] = torch.cat(parts).to(order.device)
    return plan


def shuffle_rotation(model: nn.Module, plan: Plan, store, seed: int) -> Plan:
    """As many layers have turned inputs, but others: what was found is dealt out anew among layers of one width."""
    _, plan = pack_plan(model, plan, store, packing_of(plan.packing))
    turned = {name: layer for name, layer in plan.layers.items() if layer.format == "progressive"}
    if not any(layer.rotation for layer in turned.values()):
        raise UserError("no layer of the plan has turned inputs: there is no rotation to shuffle.")
    widths = {name: model.get_submodule(name).weight.shape[1] for name in turned}
    for width in sorted(set(widths.values())):
        names = [name for name in turned if widths[name] == width]
        found = permuted([turned[name].rotation for name in names], seed)
        for name, rotation in zip(names, found, strict=True):
            turned[name].rotation = rotation
    return plan


def rotate_all(model: nn.Module, plan: Plan, store, seed: int) -> Plan:
    """Every layer that can has turned inputs, whatever calibration says."""
    plan = copy.deepcopy(plan)
    for name, layer in plan.layers.items():
        if layer.format == "progressive":
            layer.rotation = block_of(model.get_submodule(name).weight.shape[1])
    return plan


def shuffle_zeros(model: nn.Module, exact: nn.Module, store, seed: int) -> None:
    """Zero points are permuted within a layer, and codes rounded to nearest under them."""
    layers = [(name, m) for name, m in model.named_modules() if getattr(getattr(m, "plan", None), "affine", False)]
    if not layers:
        raise UserError("no layer of the model has zero points to shuffle.")
    for place, (name, layer) in enumerate(layers):
        matrix = layer.matrix(exact.get_submodule(name).weight.detach().float())
        grid = layer.grid(matrix, None)
        order = torch.randperm(grid.zeros.numel(), generator=generator(seed, place)).to(grid.zeros.device)
        grid.zeros = grid.zeros.flatten()[order].view_as(grid.zeros)
        layer.fill(grid.codes(matrix), grid)


def shuffle_scales(model: nn.Module, exact: nn.Module, store, seed: int) -> None:
    """Scales of sign planes are dealt to other groups of the layer, and codes are the nearest under them."""
    layers = [
        (name, m) for name, m in model.named_modules() if getattr(getattr(m, "plan", None), "format", "") == "bcq"
    ]
    if not layers:
        raise UserError("no layer of the model has sign planes whose scales could be shuffled.")
    for place, (name, layer) in enumerate(layers):
        matrix = layer.matrix(exact.get_submodule(name).weight.detach().float())
        grid = layer.grid(matrix, None)
        order = torch.randperm(grid.alphas[..., 0].numel(), generator=generator(seed, place)).to(grid.alphas.device)
        grid.alphas = grid.alphas.flatten(0, 1)[order].view_as(grid.alphas)
        layer.fill(grid.codes(matrix), grid)


def shuffle_levels(model: nn.Module, exact: nn.Module, store, seed: int) -> None:
    """Distances between neighbouring levels of each codebook are permuted; scales and codes are fitted under them."""

    def dealt(grid: CodebookGrid, draw: torch.Generator) -> Tensor:
        levels = grid.levels.int().cpu()
        order = torch.randperm(levels.shape[1] - 1, generator=draw)
        return torch.cat([levels[:, :1], levels[:, :1] + levels.diff(dim=1)[:, order].cumsum(1)], 1)

    _under_levels(model, exact, seed, dealt)


def normal_levels(model: nn.Module, exact: nn.Module, store, seed: int) -> None:
    """Levels of every codebook are those of a normal distribution; scales and codes are fitted under them."""
    half = (torch.tensor(NORMAL) / NORMAL[-1] * LIMIT).round().int()
    both = torch.cat([-half.flip(0), half])[None]
    _under_levels(model, exact, seed, lambda grid, draw: both.expand(grid.levels.shape))


def _under_levels(model: nn.Module, exact: nn.Module, seed: int, levels_of: Callable) -> None:
    layers = [(name, m) for name, m in model.named_modules() if getattr(m, "levels", None) is not None]
    if not layers:
        raise UserError("no layer of the model has a codebook whose levels could be changed.")
    for place, (name, layer) in enumerate(layers):
        matrix = layer.matrix(exact.get_submodule(name).weight.detach().float())
        levels = levels_of(layer.grid(matrix, None), generator(seed, place)).to(matrix.device, torch.int8)
        grid = codebook_grid(matrix, layer.plan.group_size, len(levels) > 1, None, levels)
        layer.fill(grid.codes(matrix), grid)


def _of_kind(plan: Plan, kind: str) -> list:
    found = [change for change in plan.transforms if change.kind == kind]
    if not found:
        raise UserError(f"the plan has no transform '{kind}' to shuffle.")
    return found


# ------------------------------------------------------------------------------------------- rows of 8 bits


def rows_of(score: Callable[[nn.Module, Mapping[str, Tensor], object, int], Mapping[str, Tensor]], share: float,
            each: bool = False):  # fmt: skip
    """A change of a plan of 4 bits: a share of all rows gets 8, by score(model, weights by layer, store, seed).

    each: the same share of every layer, and not of all together.
    """

    def change(model: nn.Module, plan: Plan, store, seed: int) -> Plan:
        plan = copy.deepcopy(plan)
        weights = {
            name: model.get_submodule(name).weight.detach().flatten(1).float()
            for name, choice in plan.layers.items()
            if isinstance(choice, Int4Plan) and getattr(model.get_submodule(name), "groups", 1) == 1
        }
        if not weights:
            raise UserError("no layer of the plan has weights of 4 bits: there are no rows to choose.")
        scores = score(model, weights, store, seed)
        parts = [{name: scores[name]} for name in weights] if each else [{name: scores[name] for name in weights}]
        for part in parts:
            for name, rows in chosen_rows(part, share).items():
                plan.layers[name] = mixed_plan(plan.layers[name], rows, len(weights[name]))
        return plan

    return change


def salience_of(recipe: Callable[[], QuantConfig]):
    """The scores by which a recipe ranks rows."""

    def score(model: nn.Module, weights: Mapping[str, Tensor], store, seed: int) -> Mapping[str, Tensor]:
        config = recipe()
        make_plan(model, config, store)
        return config.outcome.salience.total

    return score


def row_norms(model: nn.Module, weights: Mapping[str, Tensor], store, seed: int) -> Mapping[str, Tensor]:
    """|w_n|, whatever the model does with it."""
    return {name: weight.norm(dim=1) for name, weight in weights.items()}


def draw_of(number: int):
    """Scores that are drawn: the `number`-th draw of a seed."""

    def score(model: nn.Module, weights: Mapping[str, Tensor], store, seed: int) -> Mapping[str, Tensor]:
        draw = generator(seed, 1000 + number)
        return {name: torch.rand(len(weight), generator=draw) for name, weight in weights.items()}

    return score
