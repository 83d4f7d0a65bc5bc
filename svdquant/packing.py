"""From a group's captured inputs to its packed layers: search, split, round, and a layer for each weight."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn

from ..calibration.capture import Captured
from ..errors import UserError
from ..kernels.formats.int4 import pack_int4
from ..layers.modules import empty_quantized
from ..layers.plan import Plan
from ..pipelines.denoiser import evaluation_mode
from ..quantization.report import Ratio
from .group import Group, Split, output, refine, round_rest, search, split_weight, squared_error
from .layers.plan import SVDQPlan

# Least outputs of GELU and SiLU are -0.17 and -0.28: lifted by these, which are exact in 16 bits, they are positive.
SHIFTS = (0.171875, 0.28125)


@torch.no_grad()
def quantize_group(
    model: nn.Module, names: list[str], plan: Plan, got: Captured, enclosing: str | None, exhaustive: bool
) -> dict[str, nn.Module]:
    """The quantized layers of one group, by name; what was searched is written into the plan."""
    leader, layers = names[0], [model.get_submodule(name) for name in names]
    if leader not in got.rows:
        raise UserError(f"layer '{leader}' of the plan was not called during calibration.")
    weights = [layer.weight.detach().flatten(1).float() for layer in layers]
    stacked, choice = torch.cat(weights), plan.layers[leader]
    choice = replace(choice, rank=min(choice.rank, *stacked.shape))
    if choice.shift is None:
        choice = replace(choice, shift=_shift(got.lows[leader], float(got.peaks[leader].max())))
    original = layers[0].weight.dtype
    dtype = original if original in (torch.float16, torch.bfloat16) else torch.float16
    group = Group(stacked, got.rows[leader], got.peaks[leader], choice, dtype)
    if choice.alpha is None:
        judge = module_error(model, names, group, got.calls[enclosing], enclosing) if enclosing else None
        alpha, beta = search(group, exhaustive, judge)
        choice = group.plan = replace(choice, alpha=alpha, beta=beta)
    smooth = group.divisors(choice.alpha, choice.beta)
    splits = _stages(group, smooth)
    splits["final"] = split = round_rest(group, refine(group, smooth))
    exact = group.rows @ group.weight.T
    results = {stage: output(group, one, group.rows) for stage, one in splits.items()}
    packed, start = {}, 0
    for name, layer, weight in zip(names, layers, weights, strict=True):
        rows = slice(start, start + len(weight))
        start = rows.stop
        own = replace(choice, lender="" if name == leader else leader)
        plan.layers[name] = own
        packed[name] = build_layer(layer, own, split, rows, dtype, packed.get(leader))
        packed[name].stages = {
            f"sqnr_{stage}": Ratio.between(exact[:, rows], result[:, rows]).decibel
            for stage, result in results.items()
        }
    return packed


def _stages(group: Group, smooth: Tensor) -> dict[str, Split]:
    """What each part of the method is worth: rounding alone; with smoothing; with smoothing and branch, at once."""
    plain = replace(group, plan=replace(group.plan, rank=0))
    ones = torch.ones_like(smooth)
    return {
        "rounded": split_weight(plain, ones),
        "smoothed": split_weight(plain, smooth),
        "branched": split_weight(group, smooth),
    }


def build_layer(
    layer: nn.Module, plan: SVDQPlan, split: Split, rows: slice, dtype, lender: nn.Module | None
) -> nn.Module:
    new = empty_quantized(layer, plan, layer.weight.device)

    def put(name: str, value: Tensor) -> None:
        if getattr(new, name) is not None:
            setattr(new, name, nn.Parameter(value.to(layer.weight.device).contiguous(), requires_grad=False))

    put("qweight", pack_int4(split.codes[rows], plan.group_size))
    put("wscales", split.scales[rows].to(dtype))
    put("smooth", split.smooth.to(dtype))
    if split.up is not None:
        put("down", split.down.to(dtype))
        put("up", split.up[rows].to(dtype))
    if new.bias is not None:
        bias = torch.zeros(len(split.codes[rows])) if layer.bias is None else layer.bias.detach().float()
        if plan.shift:
            bias = bias.to(split.smooth) - plan.shift * (split.residual()[rows] / split.smooth).sum(1)
        new.bias = nn.Parameter(bias.to(layer.weight.device, new.bias.dtype), requires_grad=False)
    if lender is not None:
        new.borrow_from(lender)
    return new.train(layer.training)


def module_error(model, names: list[str], group: Group, calls: list, enclosing: str):
    """A function: Split -> squared error of the enclosing module's outputs with the group's layers quantized."""
    module = model.get_submodule(enclosing)
    layers = [model.get_submodule(name) for name in names]
    ends = torch.tensor([layer.weight.shape[0] for layer in layers]).cumsum(0).tolist()
    with evaluation_mode(module):
        exact = [_tensors(module(*args, **kwargs)) for args, kwargs in calls]

    def quantized(split: Split, rows: slice, bias):
        part = Split(
            split.codes[rows],
            split.scales[rows],
            split.down,
            None if split.up is None else split.up[rows],
            split.smooth,
        )

        def forward(x: Tensor) -> Tensor:
            flat = x.permute(0, 2, 3, 1) if isinstance(layers[0], nn.Conv2d) else x
            y = output(group, part, flat.reshape(-1, flat.shape[-1]).float())
            y = (y if bias is None else y + bias.float()).to(x.dtype).unflatten(0, flat.shape[:-1])
            return y.permute(0, 3, 1, 2) if isinstance(layers[0], nn.Conv2d) else y

        return forward

    def error(split: Split) -> float:
        try:
            for layer, start, end in zip(layers, [0, *ends], ends, strict=False):
                layer.forward = quantized(split, slice(start, end), layer.bias)
            with evaluation_mode(module):
                results = [_tensors(module(*args, **kwargs)) for args, kwargs in calls]
        finally:
            for layer in layers:
                vars(layer).pop("forward", None)
        pairs = [pair for two in zip(exact, results, strict=True) for pair in zip(*two, strict=True)]
        return sum(squared_error(a, b) for a, b in pairs)

    return error


def _tensors(value) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    parts = value.values() if isinstance(value, dict) else value if isinstance(value, (tuple, list)) else ()
    return [tensor for part in parts for tensor in _tensors(part)]


def _shift(low: float, high: float) -> float:
    """The lift that makes an input with a small negative tail unsigned; 0 where its sign carries more."""
    if low < 0 and high > -4 * low:
        return next((shift for shift in SHIFTS if low >= -shift), 0.0)
    return 0.0
