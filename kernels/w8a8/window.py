"""Geometry of what a convolution reads, and the flat layout of padded images that the W8A8 kernels share.

    row(b, y, x) = (b H' + y + ph) W' + x + pw,   H' = H + ph,  W' = W + pw

holds the channels of pixel (b, y, x); all other rows are padding. An image's lower padding is the upper padding of
the next, and a line's right padding the left one of the next line, so that at 3x3 a 32x32 image takes 33x33 rows. Tap
(ky, kx) of output (b, oy, ox) is row

    (b H' + oy sh) W' + ox sw  +  ky dh W' + kx dw:

one number per output and one per tap. With stride 1 the outputs of consecutive rows read consecutive rows, which is
what the bulk copy engine wants.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

from ..runtime.integers import cdiv

CHANNELS = 32  # the least K of an 8-bit tensor-core product


@dataclass(frozen=True)
class Window:
    """batch images of h x w; kernel, stride, padding, dilation: pairs (vertical, horizontal)."""

    batch: int
    h: int
    w: int
    kernel: tuple[int, int] = (1, 1)
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (0, 0)
    dilation: tuple[int, int] = (1, 1)

    @functools.cached_property
    def taps(self) -> int:
        return self.kernel[0] * self.kernel[1]

    @functools.cached_property
    def rows_of_pixels(self) -> bool:
        """Whether each output is a product with the channels of one pixel, in their order: Linear, and plain 1x1."""
        return self.taps == 1 and self.padding == (0, 0) and self.stride == (1, 1)

    @functools.cached_property
    def output(self) -> tuple[int, int]:
        """Height and width of the output."""
        size = zip((self.h, self.w), self.kernel, self.stride, self.padding, self.dilation, strict=True)
        return tuple((n + 2 * p - d * (k - 1) - 1) // s + 1 for n, k, s, p, d in size)

    @functools.cached_property
    def padded(self) -> tuple[int, int]:
        """H' and W'."""
        return self.h + self.padding[0], self.w + self.padding[1]

    @functools.cached_property
    def rows(self) -> int:
        """Rows of the flat layout: up to the last one that any tap reads."""
        hp, wp = self.padded
        return (self.batch * hp + self.padding[0]) * wp + self.padding[1]


def turned_padding(kernel: tuple[int, ...], padding: tuple[int, ...], dilation: tuple[int, ...]) -> tuple[int, ...]:
    """The padding with which a convolution by the turned weight is the gradient by the input."""
    return tuple(d * (k - 1) - p for k, p, d in zip(kernel, padding, dilation, strict=True))


same_window = functools.lru_cache(maxsize=4096)(Window)  # the same object for the same numbers: no work for each call


def gradient_window(window: Window) -> Window:
    """The images of the gradient by the output, padded as the gradient by the input wants them; the stride is 1."""
    around = turned_padding(window.kernel, window.padding, window.dilation)
    return same_window(window.batch, *window.output, padding=around)


def stored_channels(channels: int) -> int:
    """Channels of a row of the flat layout: zeros fill it up to what a product takes."""
    return cdiv(channels, CHANNELS) * CHANNELS
