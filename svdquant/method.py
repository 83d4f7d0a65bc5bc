"""SVDQuant: "Absorbing Outliers by Low-Rank Components for 4-Bit Diffusion Models", Li et al., arXiv:2411.05007.

1. Trace the model: which layers share an input, which are fed tokens, which embeddings.
2. Block by block, capture what the layers are fed on calibration tuples; quantize each group: `group`.
3. Layers that are no matrix product over tokens, or do not divide into groups, stay at 8 bits or in full precision.

No model is named: roles come from the calls and from shapes, and `roles` overrides them.
"""

from __future__ import annotations

import fnmatch
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import nn
from tqdm.auto import tqdm

from ..calibration.capture import capture
from ..calibration.record import Calls
from ..calibration.trace import Traced, block_of, trace
from ..errors import UserError
from ..kernels.w4.reference import ACTIVATIONS
from ..layers.modules import quantized_copy
from ..layers.plan import LayerPlan, Plan
from ..layers.view import LayerView
from ..methods.eight_bit import IntegerConfig
from ..quantization.options import number_or_word, option
from ..quantization.recipe import QuantConfig, register
from .layers.plan import SVDQPlan
from .layers.svdq import link_lenders, matrix_like
from .packing import quantize_group

ROLES = ("w4", "weight-only", "int8", "keep")
GROUP_SIZES = (16, 32, 64, 128)
BATCH = 8  # calibration tuples per forward


@register("svdquant")
@dataclass(repr=False)
class SVDQuantConfig(QuantConfig):
    """SVDQuant W4A4 or W4A8, with everything else of the model in 8 bits or kept.

    A plan of this method gives the same codes, bit for bit, with the same store, num_tuples and seed: rounding looks
    at calibration inputs.

    rank: of the low-rank branch; 0 leaves it out.
    group_size: inputs per weight scale (and per activation scale of int4).
    activations: "int4" (per token and group), "int8" or "fp8" (per token).
    smoothing: "search"; "exhaustive" (the authors' whole grid on the enclosing module's output: slow); "none"; or a
        number, alpha, with beta = 1 - alpha.
    rounding: "gptq" or "nearest". refinements: most turns of branch and rounding.
    num_tuples: calibration tuples used, evenly from the store.
    unsigned: lift inputs that are the outputs of GELU or SiLU above zero and round them to 0..15 (int4 only), as the
        authors do. Off: on dit-cifar10 it costs 4 dB of same-seed PSNR (zeros then lie between two codes), and
        Nunchaku Lite checkpoints cannot hold such layers.
    roles: shell pattern of layer names -> "w4", "weight-only" (4-bit codes, inputs as they are), "int8", "keep"; the
        first that fits counts. Otherwise: token-wise Linear and 1x1 Conv2d layers of repeated blocks are "w4"; layers
        of blocks that are fed an embedding and widen it at least twice (adaLN) "weight-only"; other layers of blocks
        and all larger convolutions "int8"; the rest "keep".
    """

    rank: int = option(32, "of the low-rank branch")
    group_size: int = option(64, "inputs per scale", choices=GROUP_SIZES)
    activations: str = option("int4", "format of inputs", choices=ACTIVATIONS[:3])
    smoothing: str | float = option("search", "search, exhaustive, none, or alpha", parse=number_or_word)
    rounding: str = option("gptq", "gptq or nearest", choices=("gptq", "nearest"))
    refinements: int = option(10, "most turns of branch and rounding")
    num_tuples: int = option(32, "calibration tuples used")
    unsigned: bool = option(False, "lift the outputs of GELU and SiLU above zero (int4)")
    roles: dict[str, str] = option({}, "layer pattern -> role", flag=False)
    seed: int = option(0, "of the rows that are kept", flag=False)

    def __post_init__(self):
        super().__post_init__()
        if not (isinstance(self.rank, int) and 0 <= self.rank <= 1024):
            raise UserError(f"rank must be a whole number from 0 to 1024; got {self.rank!r}.")
        if self.group_size not in GROUP_SIZES:
            raise UserError(f"group_size must be 16, 32, 64 or 128; got {self.group_size!r}.")
        if self.activations not in ACTIVATIONS[:3]:
            raise UserError(f"activations must be int4, int8 or fp8; got '{self.activations}'.")
        if self.rounding not in ("gptq", "nearest"):
            raise UserError(f"rounding must be gptq or nearest; got '{self.rounding}'.")
        number = isinstance(self.smoothing, (int, float)) and 0 <= self.smoothing <= 1
        if not number and self.smoothing not in ("search", "exhaustive", "none"):
            raise UserError(
                f"smoothing must be search, exhaustive, none or a number in [0, 1]; got {self.smoothing!r}."
            )
        if self.refinements < 0 or self.num_tuples < 1:
            raise UserError("refinements must be 0 or more, and num_tuples 1 or more.")
        if wrong := set(self.roles.values()) - set(ROLES):
            raise UserError(f"unknown role '{min(wrong)}'; choose from {', '.join(ROLES)}.")

    packs_while_loading: ClassVar[bool] = False

    @property
    def needs_calibration(self) -> bool:
        return True

    # ------------------------------------------------------------------------------------------ roles -> plan

    def resolve(self, model: nn.Module, views: list[LayerView], store) -> dict[str, object]:
        unmatched = [p for p in self.roles if not any(fnmatch.fnmatch(view.name, p) for view in views)]
        if unmatched:
            raise UserError(f"'{unmatched[0]}' in roles names no layer of the model; see `ptq4dm info`.")
        traced = trace(model, views, store.calls[:1])
        eight = IntegerConfig()
        plans: dict[str, object] = {}
        for view in views:
            seen = traced.get(view.name)
            role = self._role(view, seen)
            if role == "w4":
                plans[view.name] = self._w4(seen, view.name, plans)
            elif role == "weight-only":
                plans[view.name] = SVDQPlan(
                    rank=0, group_size=self.group_size, activation="none", alpha=0.0, beta=0.0,
                    rounding=self.rounding, seed=self.seed,
                )  # fmt: skip
            elif role == "int8":
                tokens = seen is not None and seen.tokens
                plans[view.name] = eight.layer_plan(view, store, "lp", 2.4) if tokens else LayerPlan()
        if not any(isinstance(plan, SVDQPlan) for plan in plans.values()):
            raise UserError(f"no layer of the model can take 4 bits in groups of {self.group_size}; see `roles`.")
        return plans

    def _role(self, view: LayerView, seen: Traced | None) -> str:
        inputs = view.weight.shape[1]
        fits = matrix_like(view.module) and inputs % self.group_size == 0
        for pattern, role in self.roles.items():
            if fnmatch.fnmatch(view.name, pattern):
                if role in ("w4", "weight-only") and (seen is None or not fits):
                    why = "was not called in calibration" if seen is None else "does not divide into groups"
                    raise UserError(f"layer '{view.name}' cannot be {role}: it {why}.")
                return role
        if seen is None or view.role != "inner":
            return "keep"
        if isinstance(view.module, nn.Conv2d) and not matrix_like(view.module):
            return "int8"
        if not any(part.isdigit() for part in view.name.split(".")):
            return "keep"
        if fits and seen.tokens:
            return "w4"
        widens = view.weight.shape[0] >= 2 * inputs
        return "weight-only" if fits and widens and not seen.tokens else "int8"

    def _w4(self, seen: Traced, name: str, plans: dict) -> SVDQPlan:
        alpha = beta = None
        if self.smoothing == "none":
            alpha = beta = 0.0
        elif not isinstance(self.smoothing, str):
            alpha, beta = float(self.smoothing), 1 - float(self.smoothing)
        lenders = [other for other, plan in plans.items() if other in seen.shares and _has_branch(plan)]
        return SVDQPlan(
            rank=self.rank, group_size=self.group_size, activation=self.activations, alpha=alpha, beta=beta,
            lender=lenders[0] if lenders else "", rounding=self.rounding, refinements=self.refinements,
            shift=None if self.unsigned and self.activations == "int4" else 0.0, seed=self.seed,
        )  # fmt: skip

    # ---------------------------------------------------------------------------------------- plan -> layers

    def pack(self, model: nn.Module, plan: Plan, store) -> dict[str, nn.Module]:
        """Quantize block by block; what the search finds is written into the plan."""
        if store is None:
            raise UserError(
                "SVDQuant needs a calibration store, also to follow a plan; make one with ptq4dm.collect."
            )
        store.check_model(model)
        for name in plan.layers:
            if not model.get_submodule(name).weight.isfinite().all():
                raise UserError(
                    f"the weight of layer '{name}' holds NaN or infinity; quantize a model that is whole."
                )
        groups = _groups(model, plan)
        batches = self._batches(store)
        enclosing = self._enclosing(model, groups, plan, batches[0])
        exhaustive = self.smoothing == "exhaustive"
        packed: dict[str, nn.Module] = {}
        blocks: dict[str, list[str]] = {}
        for leader in groups:
            blocks.setdefault(block_of(leader), []).append(leader)
        for leaders in tqdm(blocks.values(), desc="svdquant", unit="block"):
            modules = sorted({enclosing[leader] for leader in leaders if leader in enclosing})
            got = capture(model, leaders, modules, batches, self.seed)
            for leader in leaders:
                packed |= quantize_group(model, groups[leader], plan, got, enclosing.get(leader), exhaustive)
        for name, choice in plan.layers.items():
            if name not in packed:
                packed[name] = quantized_copy(model.get_submodule(name), choice, name)
        return {name: packed[name] for name in plan.layers}

    def _batches(self, store) -> list[Calls]:
        count = min(self.num_tuples, len(store.calls))
        rows = torch.linspace(0, len(store.calls) - 1, count).round().long().unique()
        return [store.calls[part] for part in rows.split(BATCH)]

    def _enclosing(self, model, groups: dict[str, list[str]], plan: Plan, calls: Calls) -> dict[str, str]:
        """leader -> module whose output judges the smoothing, for groups of several layers still to be searched."""
        open_ = [leader for leader, names in groups.items() if plan.layers[leader].alpha is None and len(names) > 1]
        if not open_:
            return {}
        views = [LayerView(name, model.get_submodule(name)) for leader in open_ for name in groups[leader]]
        traced = trace(model, views, calls[:1])
        found = {leader: traced[leader].enclosing for leader in open_ if leader in traced}
        return {leader: enclosing for leader, enclosing in found.items() if enclosing != leader}

    def link(self, model: nn.Module, plan: Plan) -> None:
        link_lenders(model, plan)


def _has_branch(plan) -> bool:
    """Whether layers that are fed the same may borrow from this one: it is 4-bit, not weight-only."""
    return isinstance(plan, SVDQPlan) and plan.activation != "none"


def _groups(model: nn.Module, plan: Plan) -> dict[str, list[str]]:
    """leader -> the SVDQuant layers that share its input, itself first; in the model's order, as files sort plans."""
    groups: dict[str, list[str]] = {}
    for name, _ in model.named_modules():
        if isinstance(choice := plan.layers.get(name), SVDQPlan):
            groups.setdefault(choice.lender or name, []).append(name)
    for leader, (first, *_) in groups.items():
        if first != leader:
            raise UserError(f"the plan is damaged: '{first}' borrows from '{leader}', which has nothing to lend.")
    return groups
