"""Work: one matrix product of a network as an accelerator sees it, with how often it is made."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Work:
    """Y[rows, outputs] = X[rows, taps * channels] W, rows = batch * height * width.

    name: the layer. kind: what it is for ("convolution", "attention", ...). block: the repeated block that it is in,
    "" outside of all. batch: rows but for the pixels of a convolution's output, height x width; 1 x 1 for a Linear.
    taps: of the convolution's kernel (kernel[0] * kernel[1]). edge: it reads the network's input or writes its
    output, and keeps the wide format. writes_attention: it is the projection after an attention. weights: False where
    W is made on the way, too, as in attention's own products: then nothing has 4 bits, and nothing is dequantized.
    count: how often it is made.
    """

    name: str
    kind: str
    batch: int
    outputs: int
    channels: int
    height: int = 1
    width: int = 1
    kernel: tuple[int, int] = (1, 1)
    stride: tuple[int, int] = (1, 1)
    block: str = ""
    edge: bool = False
    writes_attention: bool = False
    weights: bool = True
    count: int = 1

    @property
    def rows(self) -> int:
        return self.batch * self.height * self.width

    @property
    def taps(self) -> int:
        return self.kernel[0] * self.kernel[1]

    @property
    def inputs(self) -> int:
        """K of the product."""
        return self.taps * self.channels

    @property
    def products(self) -> int:
        """Multiplications and additions of one time."""
        return self.rows * self.outputs * self.inputs
