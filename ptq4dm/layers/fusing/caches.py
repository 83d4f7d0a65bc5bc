"""diffusers' caches know blocks by their classes: a fused block is to them what it is made of."""

from __future__ import annotations

import copy

from diffusers.hooks._helpers import TransformerBlockRegistry


def known_to_caches(fused: type, plain: type) -> None:
    """Tell diffusers' caches (`enable_cache`) that blocks of a fused class take and give what plain ones do."""
    try:
        facts = TransformerBlockRegistry.get(plain)
    except ValueError:  # they know neither
        return
    if fused not in TransformerBlockRegistry._registry:
        TransformerBlockRegistry.register(fused, copy.copy(facts))
