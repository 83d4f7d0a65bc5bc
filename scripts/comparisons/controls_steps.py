"""Shuffled controls of transforms, rotated inputs, zero points, scales of planes; controls.py says what they are."""

from __future__ import annotations

import copy

import torch
from controls import generator, permuted
from torch import nn

from ptq4dm.errors import UserError
from ptq4dm.kernels.formats.hadamard import block_of
from ptq4dm.layers.plan import Plan
from ptq4dm.quantization.packing import pack_plan, packing_of
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


def _of_kind(plan: Plan, kind: str) -> list:
    found = [change for change in plan.transforms if change.kind == kind]
    if not found:
        raise UserError(f"the plan has no transform '{kind}' to shuffle.")
    return found
