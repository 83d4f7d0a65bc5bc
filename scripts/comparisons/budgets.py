"""Round to nearest at the bytes of a method: some layers get 8 bits instead of 4, until as much is stored."""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from torch import nn

from ptq4dm.layers.plan import Plan
from ptq4dm.layers.registry import empty_quantized
from ptq4dm.layers.sizes import stored_bytes
from ptq4dm.quantization.planning import make_plan
from ptq4dm.quantization.recipe import QuantConfig


def plan_bytes(model: nn.Module, plan: Plan) -> dict[str, int]:
    """layer -> bytes of the tensors that it will have, without making any."""
    modules = {name: model.get_submodule(name) for name in plan.layers}
    return {name: stored_bytes(empty_quantized(modules[name], c, "meta")) for name, c in plan.layers.items()}


def at_bytes_of(method: Callable[[], QuantConfig], wide: Callable[[], QuantConfig]):
    """A change of plans, (model, plan, store, seed) -> the plan with layers of `wide`, in the bytes of `method`.

    In an order drawn by `seed`, layers are given their choice of the plan of `wide` for as long as they fit. Layers
    that share their inputs change together.
    """

    def change(model: nn.Module, plan: Plan, store, seed: int) -> Plan:
        budget = sum(plan_bytes(model, make_plan(model, method(), store)).values())
        wider = make_plan(model, wide(), store)
        plan, now, then = copy.deepcopy(plan), plan_bytes(model, plan), plan_bytes(model, wider)
        together: dict[str, list[str]] = {}
        for name, choice in plan.layers.items():
            if name in then and then[name] > now[name]:
                together.setdefault(getattr(choice, "lender", "") or name, []).append(name)
        units, left = list(together.values()), budget - sum(now.values())
        order = torch.randperm(len(units), generator=torch.Generator("cpu").manual_seed(seed)).tolist()
        for names in (units[i] for i in order):
            more = sum(then[name] - now[name] for name in names)
            if more <= left:
                left -= more
                plan.layers.update({name: wider.layers[name] for name in names})
        return plan

    return change
