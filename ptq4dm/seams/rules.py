"""Where a concatenation is after an operation: which axis of the result it lies along, and between which places.

    Joint(axis, cuts)       tensor[..., c - 1, ...] and tensor[..., c, ...] come from two tensors, for each c of cuts

What is done value by value, normalized over groups of channels, resized, permuted or viewed keeps it; whatever else
mixes channels ends it. Where a sum meets another concatenation, both count.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor


class Joint(NamedTuple):
    """An axis, counted from the first, and the places on it where another tensor begins."""

    axis: int
    cuts: tuple[int, ...]


Known = Callable[[Any], Joint | None]
aten = torch.ops.aten

# What gives the first tensor that it is given anew, axis by axis, with channels where they were.
SAME_AXES = {
    "native_group_norm", "native_layer_norm", "_fused_rms_norm", "native_batch_norm", "cudnn_batch_norm",
    "_native_batch_norm_legit_no_training", "upsample_nearest2d", "upsample_nearest1d", "upsample_nearest3d",
    "_upsample_nearest_exact2d", "upsample_bilinear2d", "upsample_bicubic2d", "avg_pool2d", "_adaptive_avg_pool2d",
    "max_pool2d_with_indices", "_softmax", "clone", "_to_copy", "detach", "alias", "lift_fresh", "expand",
    "contiguous", "native_dropout", "cumsum", "flip", "roll",
}  # fmt: skip
VIEWS = {"view", "_unsafe_view", "reshape", "_reshape_alias"}
PARTS = {"split", "split_with_sizes", "chunk"}


def after(func: Any, args: tuple, kwargs: dict, output: Any, known: Known) -> list[tuple[Tensor, Joint]]:
    """The tensors that an operation gave of which a seam is known. known: tensor -> where one is, or None."""
    name = getattr(func, "_schema", None) and func._schema.name.removeprefix("aten::")
    if not name:
        return []
    if name == "cat":
        return _joined(args, kwargs, output, known)
    given = args[0] if args else None
    here = known(given) if isinstance(given, Tensor) else None
    if name in PARTS and here is not None:
        axis = _axis(args[2:3] or (kwargs.get("dim", 0),), given)
        return _of_parts(output, here, axis)
    if torch.Tag.pointwise in func.tags or name.rstrip("_") in ("copy",):
        return _value_by_value(args, kwargs, output, known)
    if here is None:
        return []
    found = _of_one(name, given, args, kwargs, output, here)
    result = output[0] if isinstance(output, (tuple, list)) else output
    return [] if found is None or not found.cuts else [(result, found)]


def _joined(args: tuple, kwargs: dict, output: Any, known: Known) -> list[tuple[Tensor, Joint]]:
    tensors = [one for one in args[0] if one.numel()]
    axis = _axis(args[1:2] or (kwargs.get("dim", 0),), output)
    cuts: set[int] = set()
    start = 0
    for one in tensors:
        here = known(one)
        cuts |= {start} | ({start + cut for cut in here.cuts} if here is not None and here.axis == axis else set())
        start += one.shape[axis]
    if cuts - {0}:
        return [(output, Joint(axis, tuple(sorted(cuts - {0}))))]
    return []


def _of_parts(output: Sequence[Tensor], here: Joint, axis: int) -> list[tuple[Tensor, Joint]]:
    if axis != here.axis:
        return [(part, here) for part in output]
    found, start = [], 0
    for part in output:
        size = part.shape[axis]
        if cuts := tuple(cut - start for cut in here.cuts if start < cut < start + size):
            found.append((part, Joint(axis, cuts)))
        start += size
    return found


def _value_by_value(args: tuple, kwargs: dict, output: Any, known: Known) -> list[tuple[Tensor, Joint]]:
    if not isinstance(output, Tensor):
        return []
    found: dict[int, set[int]] = {}
    for one in (*args, *kwargs.values()):
        here = known(one) if isinstance(one, Tensor) else None
        if here is None:
            continue
        axis = here.axis + output.ndim - one.ndim
        if one.shape[here.axis] == output.shape[axis]:
            found.setdefault(axis, set()).update(here.cuts)
    if len(found) != 1:  # along two axes at once: no layer has such an input
        return []
    ((axis, cuts),) = found.items()
    return [(output, Joint(axis, tuple(sorted(cuts))))]


def _of_one(name: str, given: Tensor, args: tuple, kwargs: dict, output: Any, here: Joint) -> Joint | None:
    """Where the seam of the one tensor that an operation looks at is in what it gives."""
    axis, cuts = here
    result = output[0] if isinstance(output, (tuple, list)) else output
    if not isinstance(result, Tensor):
        return None
    if name in SAME_AXES:
        axis += result.ndim - given.ndim
        return Joint(axis, cuts) if result.shape[axis] == given.shape[here.axis] else None
    if name in VIEWS:
        before, size = math.prod(given.shape[:axis]), given.shape[axis]
        for new, wide in enumerate(result.shape):
            if math.prod(result.shape[:new]) == before and wide == size:
                return Joint(new, cuts)
        return None
    if name == "permute":
        return Joint([one % given.ndim for one in args[1]].index(axis), cuts)
    if name in ("transpose", "t"):
        a, b = (0, 1) if name == "t" else (one % given.ndim for one in args[1:3])
        return Joint({a: b, b: a}.get(axis, axis), cuts)
    if name == "unsqueeze":
        return Joint(axis + (args[1] % result.ndim <= axis), cuts)
    if name == "squeeze":
        gone = [i for i, n in enumerate(given.shape) if n == 1] if len(args) == 1 else _axes(args[1], given)
        return Joint(axis - sum(one < axis for one in gone if given.shape[one] == 1), cuts)
    if name == "select":
        taken = args[1] % given.ndim
        return None if taken == axis else Joint(axis - (taken < axis), cuts)
    if name == "slice":
        along, start, stop, step = _slice(args, given)
        if along != axis:
            return here
        return Joint(axis, tuple(c - start for c in cuts if start < c < stop)) if step == 1 else None
    if name == "constant_pad_nd":
        pads = args[1]
        place = 2 * (given.ndim - 1 - axis)
        before = pads[place] if place < len(pads) else 0
        return Joint(axis, tuple(c + before for c in cuts if 0 < c + before < result.shape[axis]))
    return None


def _slice(args: tuple, given: Tensor) -> tuple[int, int, int, int]:
    along = args[1] % given.ndim if len(args) > 1 else 0
    size = given.shape[along]
    start, stop, step = slice(*(args[i] if len(args) > i else None for i in (2, 3, 4))).indices(size)
    return along, start, stop, step


def _axis(dim: tuple, tensor: Tensor) -> int:
    return dim[0] % tensor.ndim


def _axes(dims: int | Sequence[int], tensor: Tensor) -> list[int]:
    return [one % tensor.ndim for one in ([dims] if isinstance(dims, int) else dims)]
