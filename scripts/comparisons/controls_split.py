"""Shuffled controls of what is split: inputs in parts as large as the model's, of channels drawn at random; weights
in clusters as large as those of their values, dealt out at random."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import fields

import torch
from controls import generator
from torch import Tensor, nn

from ptq4dm.calibration.input_statistics import InputStatistics
from ptq4dm.calibration.record import answers
from ptq4dm.errors import UserError
from ptq4dm.hooks import hooked, input_of
from ptq4dm.kernels.formats.clusters import unpack_thirds
from ptq4dm.layers.base import replace_module
from ptq4dm.layers.registry import quantized_copy
from ptq4dm.layers.split.choices import SplitChoices, parts_of
from ptq4dm.layers.split.formats import SPLIT
from ptq4dm.layers.view import LayerView
from ptq4dm.seams.measure import BATCH
from ptq4dm.seams.parts import PartedInput, split_at


class Permuted(nn.Module):
    """A layer that is fed its channels in another order."""

    def __init__(self, layer: nn.Module, order: Tensor, axis: int) -> None:
        super().__init__()
        self.layer, self.order, self.axis = layer, order, axis

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x.index_select(self.axis, self.order.to(x.device)))


def random_parts(model: nn.Module, exact: nn.Module, store, seed: int) -> None:
    """Give each split layer parts of channels drawn at random, with the grids that these parts ask for.

    Raises UserError where no layer is split.
    """
    split = {n: one.plan for n, one in model.named_modules() if isinstance(getattr(one, "plan", None), SplitChoices)}
    if not split:
        raise UserError("no layer of the model has an input in parts: there are no parts to draw.")
    orders = {
        name: torch.randperm(exact.get_submodule(name).weight.shape[1], generator=generator(seed, place))
        for place, name in enumerate(split)
    }
    for name, found in _measured(exact, store, split, orders).items():
        layer = copy.deepcopy(exact.get_submodule(name))
        layer.weight.data = layer.weight.data[:, orders[name].to(layer.weight.device)]
        whole = _whole(split[name])
        plan = split_at(whole, LayerView(name, layer), found, whole.input_zero_point == 0, None)
        replace_module(model, name, Permuted(quantized_copy(layer, plan, name), orders[name], _axis(layer)))


def shuffle_clusters(model: nn.Module, exact: nn.Module, store, seed: int) -> None:
    """Deal the clusters of each layer's weights out anew within each output, as many of each.

    Raises UserError where no layer has clusters.
    """
    layers = [(n, one) for n, one in model.named_modules() if getattr(one, "places", None) is not None]
    if not layers:
        raise UserError("no layer of the model has weights in clusters: there are none to shuffle.")
    for place, (name, layer) in enumerate(layers):
        matrix = exact.get_submodule(name).weight.detach().float().flatten(1)
        order = torch.rand(matrix.shape, generator=generator(seed, place)).argsort(1).to(matrix.device)
        layer.fill(matrix, unpack_thirds(layer.places, matrix.shape[1]).gather(1, order))


def _measured(exact: nn.Module, store, split: dict, orders: dict[str, Tensor]) -> dict[str, PartedInput]:
    """What each layer's drawn parts hold, on all calls of the store."""
    statistics = {name: InputStatistics(len(plan.seams) + 1, 1) for name, plan in split.items()}

    def add(name: str) -> Callable:
        def hook(module: nn.Module, args: tuple, kwargs: dict) -> None:
            x, axis = input_of(args, kwargs), _axis(module)
            for i, (start, end) in enumerate(parts_of(split[name].seams, x.shape[axis])):
                statistics[name].update(i, 0, x.index_select(axis, orders[name][start:end].to(x.device)))

        return hook

    with hooked(exact, {name: add(name) for name in split}):
        for batch in store.recorded().batches(BATCH):
            answers(exact, batch)
    return {
        name: PartedInput(tuple(plan.seams), tuple(statistics[name].merged(i) for i in range(len(plan.seams) + 1)))
        for name, plan in split.items()
    }


def _axis(layer: nn.Module) -> int:
    return -1 if isinstance(layer, nn.Linear) else -3


def _whole(plan):
    """The plan of the same format whose input is whole."""
    kind = next(whole for whole, parted in SPLIT.items() if parted is type(plan))
    return kind(**{item.name: getattr(plan, item.name) for item in fields(kind) if item.name != "format"})
