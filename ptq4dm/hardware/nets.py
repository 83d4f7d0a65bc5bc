"""The four nets of MixPE's results file as lists of work: ViT-B, ViT-H, OPT-6.7B and Llama2-13B, one token each.

The released lists hold, for 64 images or sequences, one row for each in every block (not 197 tokens), q, k and v in
one product, and before the vision models' blocks the whole patch embedding of 14 x 14 pixels. No attention, no head.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ..errors import UserError
from .switches import Switches
from .work import Work

PUBLISHED_BATCH, FILLED_BATCH = 64, 128


@dataclass(frozen=True)
class Net:
    """Blocks of a width; feed_forward: its hidden width; gated: three products in it; patches: an embedding first."""

    name: str
    blocks: int
    width: int
    feed_forward: int
    gated: bool = False
    patches: bool = False


NETS = {
    "vit-b": Net("ViT-B", 12, 768, 3072, patches=True),
    "vit-h": Net("ViT-H", 32, 1280, 5120, patches=True),
    "opt-6.7b": Net("OPT-6.7B", 32, 4096, 16384),
    "llama2-13b": Net("Llama2-13B", 40, 5120, 13824, gated=True),
}


def batch_of(switches: Switches) -> int:
    """Rows of a block: 64 as published, which fill half of the rows that W4A8 has for 4-bit inputs (T6); or 128."""
    return PUBLISHED_BATCH if switches.half_filled else FILLED_BATCH


def works_of_net(name: str, batch: int, switches: Switches) -> list[Work]:
    """The layers of a net, for `batch` images or sequences. Raises UserError for a name that is none of NETS."""
    if name not in NETS:
        raise UserError(f"'{name}' is none of the nets of MixPE's results: {', '.join(NETS)}.")
    net = NETS[name]
    works = []
    if net.patches:
        size: dict[str, Any] = {"height": 14, "width": 14, "kernel": (16, 16), "stride": (16, 16)}
        works.append(Work("patch", "convolution", batch, net.width, 3, **size, edge=True))
    hidden, gated = net.feed_forward, net.gated
    if gated and switches.plain_llama:
        hidden, gated = 4 * net.width, False
    for k in range(net.blocks):
        block = f"blocks.{k}"
        layers = [
            ("qkv", "attention", 3 * net.width, net.width, False),
            ("out", "attention", net.width, net.width, True),
            ("up", "feed-forward", hidden * (2 if gated else 1), net.width, False),
            ("down", "feed-forward", net.width, hidden, False),
        ]
        works += [
            Work(f"{block}.{layer}", kind, batch, outputs, inputs, block=block, writes_attention=writes)
            for layer, kind, outputs, inputs, writes in layers
        ]
    return works
