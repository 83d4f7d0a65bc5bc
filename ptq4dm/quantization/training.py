"""The blocks of a plan that are trained: layers whose rounding is "learned", in a plan with `learning`."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Mapping
from functools import cached_property

import torch
from torch import Tensor, nn

from ..calibration.calls import Calls
from ..calibration.evidence import Evidence, chosen_calls
from ..errors import UserError
from ..layers.plan import Plan
from ..layers.registry import FORMATS, objective_needs
from ..reconstruction.block import BlockTask, BlockTraining
from ..reconstruction.items import predictions_of
from ..reconstruction.soft import is_trainable
from ..reconstruction.tuples import Tuples
from ..rounding.registry import ROUNDERS
from ..walk.walk import Walks
from .blocks import Block


def learned_layers(plan: Plan) -> set[str]:
    """The layers of a plan that are trained with their block."""
    if plan.learning is None:
        return set()
    return {name for name, choice in plan.layers.items() if getattr(choice, "rounding", "") == "learned"}


def training_needs(plan: Plan, name: str) -> frozenset[str]:
    """The evidence that the training of a layer begins with."""
    start = ROUNDERS.find(plan.learning.begin).needs if plan.learning else frozenset()
    return start | objective_needs(plan.layers[name])


def check_trained(plan: Plan) -> None:
    """Raises UserError where blocks of the plan are trained, and no gradient passes one of its layers, or scales are
    to be trained that cannot change."""
    learned = learned_layers(plan)
    for name, choice in plan.layers.items() if learned else ():
        if not is_trainable(choice.format):
            raise UserError(
                f"layer '{name}' has format '{choice.format}', which no gradient passes, so that no block of its "
                "plan can be trained."
            )
        if getattr(choice, "rotation", 0) != 0:
            raise UserError(
                f"layer '{name}' has inputs that are turned in every call, which training of blocks does not know; "
                "leave rotation out."
            )
        kinds = FORMATS.find(choice.format).layers.values()
        fixed = not all(kind.scales_trained for kind in kinds)
        if fixed and name in learned and plan.learning is not None and "scales" in plan.learning.train:
            raise UserError(
                f"layer '{name}' has format '{choice.format}', whose scales are whole steps that training cannot "
                "change; leave 'scales' out of train."
            )


class Training:
    """What all blocks of one plan share: calibration calls in batches, drawn and mixed by the seed."""

    def __init__(self, walks: Walks, plan: Plan, learned: set[str], calls: Calls, num_tuples: int, seed: int) -> None:
        assert plan.learning is not None
        self.model, self.plan, self.learned, self.learning = walks.model, plan, learned, plan.learning
        self.seed = seed
        for name in (
            one for one in plan.layers if one in learned
        ):  # a plan that is followed begins where it was begun
            choice = plan.layers[name]
            start = plan.starts.setdefault(name, [choice.input_scale, choice.input_zero_point])
            choice.input_scale, choice.input_zero_point = start
        chosen = chosen_calls(calls, num_tuples)
        if self.learning.correction and len(chosen) == len(calls):
            raise UserError(
                f"all {len(calls)} recorded tuples are trained on, so that correction would change nothing; take "
                "num_tuples below that, or leave correction out."
            )
        order = torch.randperm(len(chosen), generator=torch.Generator("cpu").manual_seed(seed))
        batches = list(chosen[order].batches(self.learning.step_tuples))
        reference = list(calls.batches(self.learning.step_tuples)) if self.learning.correction else []
        self.tuples = Tuples.of(walks, batches, reference)

    @cached_property
    def predictions(self) -> list[Tensor]:
        """The model's own answers to each batch, made once for all blocks; nothing where training asks for none."""
        return predictions_of(self.model, self.tuples.batches) if self.learning.prediction else []

    def block(
        self,
        block: Block,
        later: Collection[str],
        fixed: Mapping[str, nn.Module],
        before: Mapping[str, nn.Module],
        evidence: Evidence | None,
    ) -> dict[str, nn.Module]:
        """The trained layers of a block, with `stages` for the report: flips, block_error, block_error_nearest,
        block_error_start. later: of it and all later ones, see `still_to_come`."""
        names = [name for name in block.layers if name in self.learned]
        if not names:
            return {}
        plan = self.plan
        fed = {name: evidence.of(name) for name in names if evidence and training_needs(plan, name)}
        task = BlockTask(block.name, {name: plan.layers[name] for name in names}, fixed, before, fed)
        self.tuples.on(later, before)
        seed = _seed(self.seed, block.name)
        training = BlockTraining(self.model, task, self.learning, self.tuples, self.predictions, seed)
        layers, figures = training.run()
        for name, layer in layers.items():
            layer.stages = {
                "flips": figures.flips[name],
                "block_error": figures.error,
                "block_error_nearest": figures.nearest,
                "block_error_start": figures.start,
            }
        return layers


def _seed(seed: int, block: str) -> int:
    """A seed for each block, so that one that is trained alone comes to the same codes."""
    return int.from_bytes(hashlib.sha256(f"{seed} {block}".encode()).digest()[:7], "big")
