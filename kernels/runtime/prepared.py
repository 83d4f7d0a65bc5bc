"""Forms of a weight that a kernel makes before it runs: made once, and dropped with the weight or when it changes."""

from __future__ import annotations

import weakref

from torch import Tensor

CACHE: dict[int, tuple] = {}  # id of a weight -> (reference to it, its address and version), {key: layout}


def version_of(tensor: Tensor) -> int:
    """How often it was changed in place, which tensors of inference mode do not count."""
    return 0 if tensor.is_inference() else tensor._version


def prepared(qweight: Tensor, key, build, *others: Tensor) -> Tensor:
    """build() of this tensor, and of others, kept under `key`. Codes stay codes in it, never floats."""
    state, *more = ((one.data_ptr(), version_of(one)) for one in (qweight, *others))
    key = (key, *more) if more else key
    name = id(qweight)
    entry = CACHE.get(name)
    if entry is None or entry[0][0]() is not qweight or entry[0][1] != state:
        # `drop` is held here, for weights that outlive the names of this module when Python ends.
        entry = CACHE[name] = (weakref.ref(qweight, lambda _, drop=CACHE.pop: drop(name, None)), state), {}
    if key not in entry[1]:
        made = build()
        if made is qweight or made._base is qweight:
            return made  # the weight is in that form already: kept here, it would live for ever
        entry[1][key] = made
    return entry[1][key]
