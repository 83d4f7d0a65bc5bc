"""What a kernel makes of a weight before it runs: made once, and dropped with the weight or when it changes."""

from __future__ import annotations

from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

CACHE: WeakIdKeyDictionary = WeakIdKeyDictionary()  # weight -> (its version, {key: layout})


def prepared(qweight: Tensor, key, build) -> Tensor:
    """build() of this tensor, kept under `key`. Codes stay codes in it, never floats."""
    version = (qweight.data_ptr(), 0 if qweight.is_inference() else qweight._version)
    entry = CACHE.get(qweight)
    if entry is None or entry[0] != version:
        entry = CACHE[qweight] = (version, {})
    if key not in entry[1]:
        entry[1][key] = build()
    return entry[1][key]
