"""From a problem of the driver to packed SVDQuant layers: search, split, round, and a layer for each weight."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor, nn

from ..errors import DamagedFile
from ..kernels.formats.int4 import pack_int4
from ..layers.registry import Problem, build_each, empty_quantized, register_format
from ..reconstruction.layer_errors import Ratio
from .group import Decomposition, Group, output, refine, round_rest, search, split_weight
from .layers.plan import SVDQPlan
from .layers.svdq import SVDQConv2d, SVDQLinear

# Least outputs of GELU and SiLU are -0.17 and -0.28: lifted by these, which are exact in 16 bits, they are positive.
SHIFTS = (0.171875, 0.28125)


@torch.no_grad()
def quantize_group(problem: Problem) -> dict[str, nn.Module]:
    """The quantized layers of one group, by name, their plans completed by what was searched."""
    if problem.plans[problem.leader].evidence == "none":
        return build_each(problem)
    leader, layers = problem.leader, list(problem.layers.values())
    fed = problem.evidence.of(leader)
    weights = [layer.weight.detach().flatten(1).float() for layer in layers]
    stacked, choice = torch.cat(weights), problem.plans[leader]
    choice = replace(choice, rank=min(choice.rank, *stacked.shape))
    if choice.shift is None:
        choice = replace(choice, shift=_shift(fed.low, float(fed.peak.max())))
    original = layers[0].weight.dtype
    dtype = original if original in (torch.float16, torch.bfloat16) else torch.float16
    group = Group.of(stacked, fed.rows, fed.peak, choice, dtype)
    if choice.alpha is None:
        judge = None if problem.enclosing is None else _module_error(problem, group)
        alpha, beta = search(group, choice.search == "exhaustive", judge)
        choice = group.plan = replace(choice, alpha=alpha, beta=beta)
    smooth = group.divisors(choice.alpha, choice.beta)
    splits = _stages(group, smooth)
    splits["final"] = split = round_rest(group, refine(group, smooth, splits["branched"]))
    exact = group.rows @ group.weight.T
    results = {stage: output(group, one, group.rows) for stage, one in splits.items()}
    packed, start = {}, 0
    for (name, layer), weight in zip(problem.layers.items(), weights, strict=True):
        rows = slice(start, start + len(weight))
        start = rows.stop
        own = replace(choice, lender="" if name == leader else leader)
        packed[name] = build_layer(layer, own, split, rows, dtype, packed.get(leader))
        packed[name].stages = {
            f"sqnr_{stage}": Ratio.between(exact[:, rows], result[:, rows]).decibel
            for stage, result in results.items()
        }
    return packed


def _stages(group: Group, smooth: Tensor) -> dict[str, Decomposition]:
    """What each part of the method is worth: rounding alone; with smoothing; with smoothing and branch, at once."""
    plain = replace(group, plan=replace(group.plan, rank=0, subspace="weight"), subspace=None)
    ones = torch.ones_like(smooth)
    return {
        "rounded": split_weight(plain, ones),
        "smoothed": split_weight(plain, smooth),
        "branched": split_weight(group, smooth),
    }


def build_layer(
    layer: nn.Module, plan: SVDQPlan, split: Decomposition, rows: slice, dtype, lender: nn.Module | None
) -> nn.Module:
    new = empty_quantized(layer, plan, layer.weight.device)

    def put(name: str, value: Tensor) -> None:
        if getattr(new, name) is not None:
            setattr(new, name, nn.Parameter(value.to(layer.weight.device).contiguous(), requires_grad=False))

    put("qweight", pack_int4(split.codes[rows], plan.group_size))
    put("wscales", split.scales[rows].to(dtype))
    put("smooth", split.smooth.to(dtype))
    if split.up is not None:
        put("down", plan.turned(split.down).to(dtype))
        put("up", split.up[rows].to(dtype))
    if new.bias is not None:
        bias = torch.zeros(len(split.codes[rows])) if layer.bias is None else layer.bias.detach().float()
        if plan.shift:
            bias = bias.to(split.smooth) - plan.shift * (split.residual()[rows] / split.smooth).sum(1)
        new.bias = nn.Parameter(bias.to(layer.weight.device, new.bias.dtype), requires_grad=False)
    if lender is not None:
        new.borrow_from(lender)
    return new.train(layer.training)


def _module_error(problem: Problem, group: Group) -> Callable[[Decomposition], float]:
    """A function: Decomposition -> squared error of the enclosing module's outputs with the layers quantized so."""
    layers = problem.layers
    ends = torch.tensor([layer.weight.shape[0] for layer in layers.values()]).cumsum(0).tolist()

    def quantized(layer: nn.Module, split: Decomposition, rows: slice) -> Callable[[Tensor], Tensor]:
        up = None if split.up is None else split.up[rows]
        part = Decomposition(split.codes[rows], split.scales[rows], split.down, up, split.smooth)
        conv, bias = isinstance(layer, nn.Conv2d), layer.bias

        def forward(x: Tensor) -> Tensor:
            flat = x.permute(0, 2, 3, 1) if conv else x
            y = output(group, part, group.plan.turned(flat.reshape(-1, flat.shape[-1]).float()))
            y = (y if bias is None else y + bias.float()).to(x.dtype).unflatten(0, flat.shape[:-1])
            return y.permute(0, 3, 1, 2) if conv else y

        return forward

    def error(split: Decomposition) -> float:
        forwards = {
            name: quantized(layer, split, slice(start, end))
            for (name, layer), start, end in zip(layers.items(), [0, *ends], ends, strict=False)
        }
        return problem.evidence.module_error(problem.enclosing, forwards)

    return error


def _shift(low: float, high: float) -> float:
    """The lift that makes an input with a small negative tail unsigned; 0 where its sign carries more."""
    if low < 0 and high > -4 * low:
        return next((shift for shift in SHIFTS if low >= -shift), 0.0)
    return 0.0


def _link(find: Callable[[str], nn.Module], name: str, plan: SVDQPlan) -> None:
    """Let a layer that borrows its down projection find the layer that its plan names."""
    if plan.lender:
        layer, lender = find(name), find(plan.lender)
        lent, taken = (0 if one is None else one.shape[axis] for axis, one in ((0, lender.down), (1, layer.up)))
        own = [(one.plan.rotation, one.plan.rotation_kind, one.plan.subspace) for one in (layer, lender)]
        if own[0] != own[1] or lent != taken or layer.weight_shape[1] != lender.weight_shape[1]:
            raise DamagedFile(f"layer '{name}' of the plan borrows from '{plan.lender}', which has another branch.")
        layer.borrow_from(lender)


def _needs(plan: SVDQPlan) -> frozenset[str]:
    if plan.evidence == "none":
        return frozenset()
    return frozenset({"rows"} if plan.alpha is not None else {"rows", "module"})


register_format(
    "svdq",
    plan=SVDQPlan,
    layers={nn.Linear: SVDQLinear, nn.Conv2d: SVDQConv2d},
    build=quantize_group,
    needs=_needs,
    leader=lambda name, plan: plan.lender or name,
    link=_link,
)
