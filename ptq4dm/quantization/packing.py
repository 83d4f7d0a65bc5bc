"""From a plan to quantized layers: one driver for all methods.

Block by block, in the order of the model: layers that share an input and a format are one problem; what their formats
need to know of calibration is captured once for the block, from full precision or from the part that is quantized
already, by calls that go on where the block before was reached; each format builds the layers of its problems.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from torch import nn

from ..calibration.calls import Calls
from ..calibration.evidence import Evidence, calibration_batches
from ..calibration.store import CalibrationStore, fingerprint
from ..calibration.trace import trace
from ..checks import check_fields
from ..errors import UserError
from ..layers.plan import Plan
from ..layers.registry import FORMATS, Problem, finite, needs_of
from ..layers.view import LayerView
from ..options import option
from ..pipelines.loading import not_while_loading
from ..progress import progress_bar
from ..walk.walk import Walks
from .blocks import Block, blocks_of, still_to_come
from .checkpoint import BlockCheckpoint, block_checkpoint
from .training import Training, learned_layers, training_needs

PREFIXES = ("exact", "quantized")


@dataclass
class PackingOptions:
    """What decides about codes beside plan and store.

    num_tuples: calibration tuples used, evenly from the store; seed: of the input rows that are kept.
    prefix: "exact" or "quantized": what a block is fed while it is packed.
    """

    num_tuples: int = option(32, low=1)
    seed: int = option(0, low=0)
    prefix: str = option("exact", choices=PREFIXES)

    def __post_init__(self) -> None:
        check_fields(self, "PackingOptions")


def packing_of(options: dict) -> PackingOptions:
    """The options of a recipe or a plan. Raises UserError for one that nobody knows, or a wrong value."""
    if unknown := sorted(set(options) - {item.name for item in fields(PackingOptions)}):
        raise UserError(f"the plan is damaged: packing has no option '{unknown[0]}'.")
    return PackingOptions(**options)


def pack_plan(
    model: nn.Module,
    plan: Plan,
    store: CalibrationStore | None = None,
    options: PackingOptions | None = None,
    checkpoint: str | Path | None = None,
) -> tuple[dict[str, nn.Module], Plan]:
    """(the quantized layers by name, a copy of the plan completed by what was found). The model is left as it is.

    checkpoint: a folder that keeps each block as it is done; the same call with it goes on where it stopped.

    Raises:
        UserError: a weight holds NaN or infinity, evidence is needed and there is no store, or the store is of
            another model.
    """
    options, plan = options or PackingOptions(), plan.copy()
    learned = learned_layers(plan)
    needs = {
        name: training_needs(plan, name) if name in learned else needs_of(choice)
        for name, choice in plan.layers.items()
    }
    batches: list[Calls] = []
    calls = None
    if any(needs.values()) or learned:
        if store is None:
            raise UserError(
                f"{plan.method} needs a calibration store here, also to follow a plan: its formats, roundings or "
                "objectives look at what layers are fed; make one with ptq4dm.collect."
            )
        store.check_model(model)
        batches = calibration_batches(store.recorded(), options.num_tuples)
        calls = store.recorded()
    for name in plan.layers:
        finite(model.get_submodule(name).weight, name)
    blocks = blocks_of(model, plan, calls)
    enclosing = _enclosing(model, blocks, needs, batches)
    walks = Walks(model)
    fed, stops = walks.over(batches), still_to_come(blocks, enclosing, learned)
    training = None
    if learned and store is not None:
        training = Training(walks, plan, learned, store.recorded(), options.num_tuples, options.seed)
    packed: dict[str, nn.Module] = {}
    with _checkpoint(checkpoint, model, plan, store, options) as kept:
        bar = progress_bar(blocks, desc=plan.method, unit="block", hidden=not batches)
        for block, later in zip(bar, stops, strict=True):
            with not_while_loading():
                done = kept.load(block.name, model) if kept else None
            if done is None:
                leaders = [leader for leader, names in block.problems.items() if any(needs[name] for name in names)]
                around = sorted({enclosing[leader] for leader in leaders if leader in enclosing})
                before = packed if options.prefix == "quantized" else {}
                evidence = None
                if leaders:
                    fed.on(later, before)
                    evidence = Evidence(model, leaders, around, batches, options.seed, before, fed.resumed)
                done = {}
                for leader, names in block.problems.items():
                    if leader in learned:
                        continue
                    layers = {name: model.get_submodule(name) for name in names}
                    problem = Problem(layers, {n: plan.layers[n] for n in names}, evidence, enclosing.get(leader))
                    with not_while_loading():
                        done |= FORMATS.find(plan.layers[leader].format).build(problem)
                if training is not None:
                    done |= training.block(block, later, done, before, evidence)
                if kept:
                    kept.save(block.name, done)
            bar.set_postfix_str(_figures(block.name, done))
            packed |= done
            link_layers(packed.__getitem__, {name: layer.plan for name, layer in done.items()})
    packed = {name: packed[name] for name in plan.layers}
    plan.layers = {name: layer.plan for name, layer in packed.items()}
    return packed, plan


def _figures(block: str, layers: Mapping[str, nn.Module]) -> str:
    """A block's name, and its error where it was trained."""
    stages: dict = next(
        (layer.stages for layer in layers.values() if "block_error" in getattr(layer, "stages", {})), {}
    )
    if not stages:
        return block
    return f"{block}: error {stages['block_error']:.2e} (nearest {stages['block_error_nearest']:.2e})"


def link_layers(find: Callable[[str], nn.Module], plans: Mapping[str, Any]) -> None:
    """Tie layers to those they share something with, as their formats say. find: name -> quantized layer."""
    for name, choice in plans.items():
        FORMATS.find(choice.format).link(find, name, choice)


def _enclosing(
    model: nn.Module, blocks: list[Block], needs: dict[str, frozenset[str]], batches: list[Calls]
) -> dict[str, str]:
    """leader -> the module around its problem, where a format wants to judge by that and there are several layers."""
    asked = [
        (leader, names)
        for block in blocks
        for leader, names in block.problems.items()
        if len(names) > 1 and "module" in needs[leader]
    ]
    if not asked:
        return {}
    views = [LayerView(name, model.get_submodule(name)) for _, names in asked for name in names]
    traced = trace(model, views, batches[0][:1])
    found = {leader: traced[leader].enclosing for leader, _ in asked if leader in traced}
    return {leader: module for leader, module in found.items() if module != leader}


def _checkpoint(
    folder: str | Path | None, model: nn.Module, plan: Plan, store: CalibrationStore | None, options: PackingOptions
) -> AbstractContextManager[BlockCheckpoint | None]:
    if folder is None:
        return nullcontext()
    identity = {
        "plan": plan.to_dict(),
        "options": asdict(options),
        "model": fingerprint(model),
        "store": None if store is None else [store.config, store.fingerprint],
    }
    return block_checkpoint(Path(folder), json.loads(json.dumps(identity)))
