"""Transforms on their way through `quantize`: found on calibration calls, made on the float model.

What a transform changes is what layers are fed, so a store is measured anew: its calls stay true, for the model's
function does.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial

from torch import Tensor, nn

from ..calibration.evidence import calibration_batches
from ..calibration.measure import measured
from ..calibration.record import answers
from ..calibration.store import CalibrationStore, fingerprint
from ..errors import UserError
from ..kernels.formats.rotation import rotate
from ..pipelines.denoiser import evaluation_mode
from ..transforms.base import TransformPlan, apply_all, is_online
from ..transforms.named import check_together, named
from ..transforms.peaks import watch_peaks

Turn = Callable[[Tensor], Tensor]

TUPLES = 32  # calibration tuples that transforms look at


def transformed(
    model: nn.Module,
    kinds: Sequence[str],
    plans: Sequence[TransformPlan] | None,
    store: CalibrationStore | None,
) -> tuple[list[TransformPlan], CalibrationStore | None]:
    """Transform a model in place, by plans or, where there are none, as recipes name it. Gives (plans, store).

    The store given back is of the transformed model. The caller undoes it where something fails (`whole_or_not`).

    Raises UserError for an unknown kind, one that needs a store where there is none, or plans of another model.
    """
    if not kinds and not plans:
        return [], store
    if plans is None:
        check_together(kinds)
        plans = []
        for text in kinds:
            found = _found(model, text, store)
            apply_all(model, found)
            plans += found
    else:
        if any(tensor.is_meta for plan in plans for tensor in plan.tensors.values()):
            raise UserError("the plan's transforms came without their tensors; load it with Plan.load.")
        apply_all(model, plans)
    return list(plans), None if store is None else remeasured(model, store, turns_of(model, plans))


def remeasured(
    model: nn.Module, store: CalibrationStore, turns: Mapping[str, Turn] | None = None
) -> CalibrationStore:
    """The same calls, with statistics and fingerprints of the model as it is now; turns: as `measured` has them."""
    statistics = measured(model, store, turns)
    return replace(store, fingerprint=fingerprint(model), statistics=statistics)


def turns_of(model: nn.Module, plans: Sequence[TransformPlan]) -> dict[str, Turn]:
    """Layer -> the rotation of its input that plans of online transforms say: what static grids have to hold."""
    turns: dict[str, Turn] = {}
    for plan in plans:
        if not is_online(plan.kind):
            continue
        turn = partial(rotate, group=plan.options["group"], kind=plan.options["kind"])
        for name in plan.modules:
            conv = isinstance(model.get_submodule(name), nn.Conv2d)
            turns[name] = partial(_over_channels, turn) if conv else turn
    return turns


def _over_channels(turn: Turn, x: Tensor) -> Tensor:
    return turn(x.movedim(1, -1)).movedim(-1, 1)


def _found(model: nn.Module, text: str, store: CalibrationStore | None) -> list[TransformPlan]:
    transform, options = named(text)
    if not transform.needs:
        return transform.find(model, None, **options)
    if store is None:
        raise UserError(f"the transform '{transform.name}' looks at what layers are fed; give a calibration store.")
    with watch_peaks(model) as peaks, evaluation_mode(model):
        for batch in calibration_batches(store.recorded(), TUPLES):
            answers(model, batch)
    return transform.find(model, peaks, **options)
