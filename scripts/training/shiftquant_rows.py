"""The rows of compare_shiftquant.py: which network, from where, on what codes."""

from __future__ import annotations

from dataclasses import dataclass

from ptq4dm.layers.shift.widths import Widths


@dataclass(frozen=True)
class Row:
    """name: "<stage> <what>". stage: "unet" (from scratch), "dit" (fine-tuned) or "qat" (fine-tuned, W4A4).

    widths: None computes in floats (bf16 on a GPU). norms: L1 normalization in the place of GroupNorm and LayerNorm.
    """

    stage: str
    what: str
    network: str
    widths: Widths | None = None
    norms: bool = False

    @property
    def name(self) -> str:
        return f"{self.stage} {self.what}"

    @property
    def trained(self) -> bool:
        """Whether training starts from the embedded model."""
        return self.stage != "unet"


def _codes(bits: int, groups: int = 4) -> Widths:
    return Widths(bits, bits, bits, groups)


def _variants(stage: str, network: str) -> list[Row]:
    """Full precision, codes of 6 and 4 bits, the control of one group, the norm alone, and all together."""
    return [
        Row(stage, "bf16", network),
        Row(stage, "6/6/6", network, _codes(6)),
        Row(stage, "6/6/6 G=1", network, _codes(6, 1)),
        Row(stage, "6/6/6 G=2", network, _codes(6, 2)),
        Row(stage, "6/6/6 samples", network, Widths(tokens=False)),
        Row(stage, "4/4/4", network, _codes(4)),
        Row(stage, "4/4/4 G=1", network, _codes(4, 1)),
        Row(stage, "L1", network, None, True),
        Row(stage, "6/6/6 L1", network, _codes(6), True),
    ]


SERVED = Widths(4, 4, 6, 4, served=True)
ROWS = [
    *_variants("unet", "unet"),
    *_variants("dit", "dit"),
    *[Row("qat", f"W4A4 {network}", network, SERVED) for network in ("dit", "unet")],
]
