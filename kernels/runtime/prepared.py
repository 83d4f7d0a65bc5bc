"""Forms of a weight that a kernel makes before it runs: made once, and dropped with the weight or when it changes."""

from __future__ import annotations

import weakref

import torch
from torch import Tensor

from .recording import current

CACHE: dict[int, tuple] = {}  # id of a weight -> (reference to it, its address and version), {key: layout}


def version_of(tensor: Tensor) -> int:
    """How often it was changed in place, which tensors of inference mode do not count."""
    return 0 if tensor.is_inference() else tensor._version


def prepared(qweight: Tensor, key, build, *others: Tensor) -> Tensor:
    """build() of this tensor, and of others, kept under `key`. Codes stay codes in it, never floats."""
    recording = current()
    if recording is None:
        return _prepared(qweight, key, build, qweight, others)
    recording.building += 1
    try:
        made = _prepared(recording.original(qweight), key, build, qweight, tuple(map(recording.original, others)))
    finally:
        recording.building -= 1
    recording.is_prepared(made, qweight, key, others)
    return made


def _prepared(owner: Tensor, key, build, given: Tensor, others: tuple[Tensor, ...]) -> Tensor:
    state, *more = ((one.data_ptr(), version_of(one)) for one in (owner, *others))
    key = (key, *more) if more else key
    name = id(owner)
    entry = CACHE.get(name)
    if entry is None or entry[0][0]() is not owner or entry[0][1] != state:
        # `drop` is held here, for weights that outlive the names of this module when Python ends.
        entry = CACHE[name] = (weakref.ref(owner, lambda _, drop=CACHE.pop: drop(name, None)), state), {}
    if key not in entry[1]:
        made = build()
        if made is given or _in_memory_of(owner, made):
            return made  # the weight is in that form already: kept here, it would live for ever
        entry[1][key] = made
    return entry[1][key]


def _in_memory_of(owner: Tensor, made: Tensor) -> bool:
    """Whether `made` is a view of the weight; in a recording, of an alias of it."""
    plain = made.layout == torch.strided  # oneDNN's own form has no memory to ask for
    return plain and made.untyped_storage().data_ptr() == owner.untyped_storage().data_ptr()


def kept(owner: Tensor, key, *others: Tensor) -> Tensor | None:
    """What `prepared` keeps of a tensor under `key`; None where it would build."""
    entry = CACHE.get(id(owner))
    if entry is None or entry[0][0]() is not owner or entry[0][1] != (owner.data_ptr(), version_of(owner)):
        return None
    return entry[1].get((key, *((one.data_ptr(), version_of(one)) for one in others)) if others else key)
