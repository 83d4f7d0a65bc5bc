"""Shuffled controls: a method with its decisions dealt out at random, everything else as it was.

If the gain of a method is in its decisions, it is gone when they are shuffled; if it stays, the gain is of something
else. What is shuffled keeps its numbers: the same ratios, the same divisors, as many flipped codes.

A control of a plan takes (model, plan, store, seed) and returns another plan; one of packed layers takes (model,
exact, store, seed), the quantized model and its original, and changes the former. `seed` fixes what is drawn.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from ptq4dm.budgets.exact import allocate
from ptq4dm.budgets.references import dealt_out, greedy, random_choices
from ptq4dm.errors import UserError
from ptq4dm.kernels.formats.grid import Grid
from ptq4dm.kernels.formats.int4 import pack_int4, quantize_groups
from ptq4dm.kernels.formats.int8 import affine_parameters, quantize_weight
from ptq4dm.layers.plan import Plan
from ptq4dm.quantization.planning import make_plan
from ptq4dm.quantization.recipe import QuantConfig
from ptq4dm.ranges import register_objective
from ptq4dm.ranges.prediction import Prediction
from ptq4dm.ranges.weights import weight_scale
from ptq4dm.rounding import register_rounder
from ptq4dm.rounding.gptq import gptq
from ptq4dm.svdquant.layers.lowrank import top_factors

DRAWS = {"seed": 0}  # of objectives and rounders here, which get no seed


def generator(seed: int, place: int = 0) -> torch.Generator:
    """The generator of the `place`-th layer."""
    return torch.Generator("cpu").manual_seed(seed * 1_000_003 + place)


def permuted(values: Sequence, seed: int) -> list:
    return [values[i] for i in torch.randperm(len(values), generator=generator(seed)).tolist()]


# ------------------------------------------------------------------------------------------------ ranges


def input_ratios(plan: Plan, store) -> dict[str, tuple[float, float]]:
    """layer -> (low, high): where its static int8 grid ends, over where its inputs end; 1 for an end at zero."""
    ratios = {}
    for name, choice in plan.layers.items():
        if choice.format in ("int8", "int4", "row-mix") and choice.static:
            low, high = _extremes(store, name)
            limit, zero = 2 ** (choice.activation_bits - 1), choice.input_zero_point
            ends = (-limit - zero) * choice.input_scale, (limit - 1 - zero) * choice.input_scale
            ratios[name] = tuple(end / full if full else 1.0 for end, full in zip(ends, (low, high), strict=True))
    return ratios


def shuffle_input_ranges(model: nn.Module, plan: Plan, store, seed: int) -> Plan:
    """The ratios of chosen to full input ranges are permuted among the layers of one width."""
    plan, ratios = copy.deepcopy(plan), input_ratios(plan, store)
    if not ratios:
        raise UserError("no layer of the plan has a static grid of its input: there are no input ranges to shuffle.")
    for bits in {plan.layers[name].activation_bits for name in ratios}:
        names = [name for name in ratios if plan.layers[name].activation_bits == bits]
        for name, (a, b) in zip(names, permuted([ratios[name] for name in names], seed), strict=True):
            low, high = _extremes(store, name)
            choice = plan.layers[name]
            choice.input_scale, choice.input_zero_point = affine_parameters(low * a, high * b, bits)
    return plan


def input_ranges_of(recipe: Callable[[], QuantConfig]):
    """A change of a plan: static grids of inputs are those of another recipe's plan; weights keep their codes."""

    def change(model: nn.Module, plan: Plan, store, seed: int) -> Plan:
        plan, DRAWS["seed"] = copy.deepcopy(plan), seed
        other = make_plan(model, recipe(), store)
        for name, choice in plan.layers.items():
            lends = other.layers[name]
            choice.input_scale, choice.input_zero_point = lends.input_scale, lends.input_zero_point
        return plan

    return change


@register_objective("prediction, of other tuples", needs=frozenset({"model"}))
class OfOtherTuples(Prediction):
    """Input ranges by the error of the model's prediction, but from what it predicts on other tuples."""

    @staticmethod
    def targets(predictions: list[Tensor]) -> list[Tensor]:
        """The predictions of all tuples, moved on by a drawn number of tuples: none is at its own place."""
        sizes, together = [len(one) for one in predictions], torch.cat(predictions)
        if len(together) < 2:
            raise UserError("one tuple's prediction cannot change places; give more tuples.")
        steps = int(torch.randint(1, len(together), (), generator=generator(DRAWS["seed"])))
        return list(together.roll(steps, 0).split(sizes))


def shuffle_weight_ranges(model: nn.Module, exact: nn.Module, store, seed: int) -> None:
    """The ratios of chosen to full weight ranges are permuted among a layer's rows, and the codes rounded anew."""
    for place, (layer, weight) in enumerate(_int8_layers(model, exact)):
        full = weight_scale(weight, layer.plan.weight_bits)
        order = torch.randperm(len(full), generator=generator(seed, place)).to(full.device)
        scale = full * (layer.weight_scale / full)[order]
        layer.weight_scale.copy_(scale)
        layer.qweight.copy_(quantize_weight(weight, scale, layer.plan.weight_bits))


# ------------------------------------------------------------------------------------------------ wide rows


def shuffle_rows(model: nn.Module, plan: Plan, store, seed: int) -> Plan:
    """As many rows of each layer have 8 bits, but others."""
    plan = copy.deepcopy(plan)
    mixed = [(name, layer) for name, layer in plan.layers.items() if layer.format == "row-mix"]
    if not mixed:
        raise UserError("no layer of the plan has rows of two widths: there are no rows to shuffle.")
    for place, (name, layer) in enumerate(mixed):
        outputs = len(model.get_submodule(name).weight)
        layer.wide = sorted(torch.randperm(outputs, generator=generator(seed, place))[: len(layer.wide)].tolist())
    return plan


# ----------------------------------------------------------------------------------------- formats under budgets


def chosen_by(recipe: Callable[[], QuantConfig], choose: Callable):
    """A change of a plan: its layers have the formats that choose(the table, the recipe, seed) picks."""

    def change(model: nn.Module, plan: Plan, store, seed: int) -> Plan:
        config, plan = recipe(), copy.deepcopy(plan)
        made = make_plan(model, config, store)
        plan.layers, plan.packing = config.outcome.plans(choose(config.outcome.table, config, seed)), made.packing
        return plan

    return change


def permuted_errors(table, config, seed: int):
    """The exact choice, with the errors of layers dealt out among them."""
    return allocate(dealt_out(table, seed), config.latency, config.bytes, config.efficiency).picks


def greedily(table, config, seed: int):
    picks = greedy(table, config.latency, config.bytes)
    if picks is None:
        raise UserError("the greedy choice does not get within the budgets.")
    return picks


def at_random(table, config, seed: int):
    """A drawn choice that uses the budgets up."""
    return random_choices(table, 1, seed, config.latency, config.bytes)[0]


# ------------------------------------------------------------------------------------------------ SVDQuant


def shuffle_smoothing(model: nn.Module, exact: nn.Module, store, seed: int) -> None:
    """The smoothing divisors are permuted within a layer; branch and codes are made anew under them."""

    def shuffled(place: int, smooth: Tensor) -> Tensor:
        return smooth[torch.randperm(len(smooth), generator=generator(seed, place)).to(smooth.device)]

    split_anew(model, exact, smoothing=shuffled)


def random_branch(model: nn.Module, exact: nn.Module, store, seed: int) -> None:
    """The branch keeps its rank but takes random directions of the inputs, and the best outputs for them."""

    def factors(place: int, smoothed: Tensor, rank: int) -> tuple[Tensor, Tensor]:
        start = torch.randn(smoothed.shape[1], rank, generator=generator(seed, place)).to(smoothed)
        down = torch.linalg.qr(start).Q.T
        return smoothed @ down.T, down

    split_anew(model, exact, factors=factors)


def split_anew(model: nn.Module, exact: nn.Module, smoothing=None, factors=None) -> None:
    """Branch and codes of SVDQuant layers from the original weights, under other divisors or in other directions.

    Of layers that were rounded to nearest in one turn (rounding="nearest", refinements=0), because only those can be
    made anew without the inputs: with neither given, they stay what they are, bit for bit.

    smoothing: (number of the group, divisors [K]) -> divisors [K].
    factors: (number of the group, smoothed weight [N, K], rank) -> up [N, r], down [r, K].
    """
    groups: dict[str, list[str]] = {}
    for name, module in model.named_modules():
        if getattr(getattr(module, "plan", None), "format", "") == "svdq" and module.plan.activation != "none":
            groups.setdefault(module.plan.lender or name, []).append(name)
    if not groups:
        raise UserError("the model has no SVDQuant layer to shuffle.")
    for place, names in enumerate(groups.values()):
        layers = [model.get_submodule(name) for name in names]
        leader, plan = layers[0], layers[0].plan
        if (plan.rounding, plan.refinements, plan.shift) != ("nearest", 0, 0):
            raise UserError("this control needs SVDQuant with rounding='nearest', refinements=0 and unsigned=False.")
        weights = [exact.get_submodule(name).weight.detach().flatten(1).float() for name in names]
        weight, dtype = torch.cat(weights), leader.smooth.dtype
        smooth = leader.smooth.float() if smoothing is None else smoothing(place, leader.smooth.float())
        rest = smoothed = weight * smooth
        if plan.rank:
            make = factors or (lambda _, matrix, rank, seed=plan.seed: top_factors(matrix, rank, seed))
            up, down = make(place, smoothed, plan.rank)
            down, up = (down / smooth).to(dtype), up.to(dtype)
            rest = smoothed - up.float() @ (down.float() * smooth)
            leader.down.copy_(down)
        codes, scales = quantize_groups(rest, plan.group_size, dtype)
        start = 0
        for layer, own in zip(layers, weights, strict=True):
            rows = slice(start, start := start + len(own))
            layer.qweight.copy_(pack_int4(codes[rows], plan.group_size))
            layer.wscales.copy_(scales[rows])
            layer.smooth.copy_(smooth)
            if plan.rank:
                layer.up.copy_(up[rows])


# ------------------------------------------------------------------------------------------------ rounding


def random_flips(weight: Tensor, codes: Tensor, grid: Grid, draw: torch.Generator) -> Tensor:
    """Nearest codes [N, K] with as many of them at random at their other neighbour as `codes` has off the nearest.

    The other neighbour is the code on the other side of the weight; of a weight right on a code, either. Those whose
    other neighbour is not on the grid are not drawn.
    """
    nearest = grid.codes(weight)
    wrong = weight.float() - grid.values(nearest)
    coin = torch.randint(0, 2, nearest.shape, generator=draw).to(weight.device) * 2 - 1
    side = torch.where(wrong == 0, coin, wrong.sign()).to(torch.int8)
    moved = nearest + side
    free = ((moved >= grid.low) & (moved <= grid.high)).flatten().nonzero().flatten()
    count = min(int((codes != nearest).sum()), len(free))
    chosen = free[torch.randperm(len(free), generator=draw)[:count].to(weight.device)]
    flat = nearest.flatten()
    flat[chosen] += side.flatten()[chosen]
    return flat.view_as(nearest)


@register_rounder("gptq, flips at random", needs=frozenset({"rows"}))
def flips_at_random(weight: Tensor, grid: Grid, evidence) -> Tensor:
    """As many codes off the nearest as Hessian rounding has, but at random."""
    return random_flips(weight, gptq(weight, grid, evidence), grid, generator(DRAWS["seed"], weight.numel()))


@register_rounder("gptq, Hessian shuffled", needs=frozenset({"rows"}))
def hessian_shuffled(weight: Tensor, grid: Grid, evidence) -> Tensor:
    """Hessian rounding, the Hessian's columns permuted: errors are made up for in the wrong places."""
    order = torch.randperm(weight.shape[1], generator=generator(DRAWS["seed"], weight.numel()))
    return gptq(weight, grid, evidence.columns(order.to(weight.device)))


def rounded_by(name: str):
    """A control of a plan: all that Hessian rounding rounds is rounded by this rounder instead."""

    def control(model: nn.Module, plan: Plan, store, seed: int) -> Plan:
        plan, DRAWS["seed"] = copy.deepcopy(plan), seed
        chosen = [layer for layer in plan.layers.values() if getattr(layer, "rounding", "") == "gptq"]
        if not chosen:
            raise UserError("no layer of the plan is rounded by its Hessian: there is no rounding to shuffle.")
        for layer in chosen:
            layer.rounding = name
        return plan

    return control


shuffle_rounding = rounded_by("gptq, flips at random")
shuffle_hessian = rounded_by("gptq, Hessian shuffled")


# ------------------------------------------------------------------------------------------------ parts


def _extremes(store, name: str) -> tuple[float, float]:
    _, _, low, high = store.input_of(name)
    return min(low, 0.0), max(high, 0.0)


def _is_int8(module: nn.Module) -> bool:
    return getattr(getattr(module, "plan", None), "format", "") == "int8"


def _int8_layers(model: nn.Module, exact: nn.Module):
    """(packed layer, its float32 weight [N, ...]) of all W8A8 layers, narrower grids among them."""
    layers = [(name, module) for name, module in model.named_modules() if _is_int8(module)]
    if not layers:
        raise UserError("the model has no int8 layer to shuffle.")
    for name, layer in layers:
        yield layer, exact.get_submodule(name).weight.detach().float()
