"""The rows of compare_shiftquant.py: which network, from where, on what codes."""

from __future__ import annotations

import re
from dataclasses import dataclass

from ptq4dm.errors import UserError
from ptq4dm.layers.shift.widths import Widths

SERVED = Widths(4, 4, 6, 4, served=True)


@dataclass(frozen=True)
class Row:
    """name: "<stage> <what>". stage: "unet" (from scratch), "dit" (fine-tuned) or "qat" (fine-tuned, W4A4).

    widths: None computes in floats (bf16 on a GPU). norms: L1 normalization in the place of GroupNorm and LayerNorm.
    wide: of to_integers.
    """

    stage: str
    what: str
    network: str
    widths: Widths | None = None
    norms: bool = False
    wide: tuple[str, ...] | None = None

    @property
    def name(self) -> str:
        return f"{self.stage} {self.what}"

    @property
    def trained(self) -> bool:
        """Whether training starts from the embedded model."""
        return self.stage != "unet"


def row_of(name: str) -> Row:
    """The row of a name: "unet 6/6/8 G=2 samples L1": bits of weights, inputs and gradients, then what differs.

    narrow: the same bits in the layers beside the ends of a U-Net. G=n: so many groups. samples: a row of a Linear
    layer is a sample, not a token. served: on the grids of RTNConfig. L1: norms by the mean magnitude. "bf16" and
    "L1" alone are in floats.

    Raises UserError for a name that says nothing.
    """
    stage, _, what = name.partition(" ")
    if stage == "qat" and what in ("W4A4 dit", "W4A4 unet"):
        return Row(stage, what, what[5:], SERVED)
    words, settings = what.split(), {}
    bits = re.fullmatch(r"([2-8])/([2-8])/([2-8])", words[0]) if words else None
    for word in words[1:] if bits else ():
        if found := re.fullmatch(r"G=([1-7])", word):
            settings["groups"] = int(found[1])
        elif word in ("samples", "served"):
            settings |= {"tokens": False} if word == "samples" else {"served": True}
        elif word not in ("L1", "narrow"):
            words = []
    if stage not in ("unet", "dit") or not (bits and words or words in (["bf16"], ["L1"])):
        raise UserError(f"no row is called '{name}'; there are: {'; '.join(ROWS)}; and others of such names.")
    widths = Widths(*map(int, bits.groups()), **settings) if bits else None
    return Row(stage, what, stage, widths, "L1" in words, () if "narrow" in words else None)


WHATS = ("bf16", "6/6/6", "6/6/6 G=1", "6/6/6 G=2", "6/6/6 samples", "4/4/4", "4/4/4 G=1", "L1", "6/6/6 L1")
ROWS = [f"{stage} {what}" for stage in ("unet", "dit") for what in WHATS] + ["qat W4A4 dit", "qat W4A4 unet"]
