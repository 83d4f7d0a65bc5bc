"""What the parts of layers' inputs hold, measured while the model makes the calls of a store again."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from torch import nn

from ..calibration.calls import Calls
from ..calibration.input_statistics import InputStatistics
from ..calibration.record import answers
from ..errors import UserError
from ..hooks import hooked, input_of
from ..layers.split.choices import SplitChoices, parts_of
from ..layers.split.first import FirstTokenPlan
from ..layers.view import LayerView
from ..pipelines.denoiser import evaluation_mode
from ..progress import progress_bar
from .first import FirstToken, Found, with_first_tokens
from .observe import Seams, observed_seams, one_of_each_kind
from .parts import SAVED, PartedInput

BATCH = 16  # calls of which parts are measured together


def parted_inputs(model: nn.Module, views: list[LayerView], calls: Calls) -> dict[str, Found]:
    """Layer name -> its input in parts: of those that read a concatenation, its parts; of others that read texts with
    a first token far above the rest, both.

    Where parts meet is observed on one call of each kind; what they hold is measured on all calls.

    Raises UserError where there is no such layer.
    """
    kinds = one_of_each_kind(calls)
    seams = observed_seams(model, views, kinds)
    firsts = with_first_tokens(model, [view for view in views if view.name not in seams], kinds)
    if not seams and not firsts:
        raise UserError(
            "split_inputs=True splits inputs that the model concatenates, and texts with a first token far above the "
            "rest, and none of the layers to quantize has one; leave it out."
        )
    counts = {name: len(cuts) + 1 for name, cuts in seams.items()} | dict.fromkeys(firsts, 2)
    statistics, before, places, count = InputStatistics(sum(counts.values()), 1), {}, {}, 0
    for name, parts in counts.items():
        places[name], count = count, count + parts
        before[name] = _measuring(statistics, places[name], seams.get(name), name)
    batches = list(calls.batches(BATCH))
    with evaluation_mode(model), hooked(model, before):
        for batch in progress_bar(batches, desc="measure parts", unit="batch"):
            answers(model, batch)
    found: dict[str, Found] = {}
    for name, parts in counts.items():
        merged = tuple(statistics.merged(places[name] + i) for i in range(parts))
        found[name] = PartedInput(seams[name], merged) if name in seams else FirstToken(*merged)
    return found


def _measuring(statistics: InputStatistics, first: int, cuts: Seams | None, name: str) -> Callable:
    """A hook that adds the parts of an input to the statistics from `first` on; without cuts, its tokens."""

    def add(module: nn.Module, args: tuple, kwargs: dict) -> None:
        x = input_of(args, kwargs)
        axis = x.ndim - (1 if isinstance(module, nn.Linear) else 3)
        ends, what = parts_of(cuts or (), x.shape[axis]), "channels"
        if cuts is None:
            axis, ends, what = x.ndim - 2, [(0, 1), (1, x.shape[-2])], "tokens"
        for i, (start, end) in enumerate(ends):
            try:
                statistics.update(first + i, 0, x.narrow(axis, start, end - start))
            except UserError as error:
                raise UserError(f"layer '{name}', {what} from {start} on: {error}") from None

    return add


def check_split(plans: Iterable[Any], parts: Mapping[str, Found]) -> None:
    """Raises UserError where no plan has an input in parts."""
    if not any(isinstance(plan, (SplitChoices, FirstTokenPlan)) for plan in plans):
        raise UserError(
            f"split_inputs=True would change nothing: {len(parts)} layers read inputs in parts, and these are so "
            f"alike that grids of their own save less than {SAVED:.0%} of the noise in each; leave it out."
        )
