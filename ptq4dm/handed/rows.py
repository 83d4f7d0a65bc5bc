"""Linear layers whose inputs are quantized row by row in the call: by themselves, or by the kernel before them."""

from __future__ import annotations

import torch
from torch import Tensor

from ..kernels.formats import fp8
from ..kernels.w4 import from_codes
from .value import Handed, RowCodes, encoded


class QuantizesRows:
    """What they share. A class has `codes_of_rows` and `of_codes`, its product; one that blocks are fused around says
    `in_blocks = True` itself."""

    code: torch.dtype
    multiplies_floats = False

    @property
    def rotation(self) -> tuple[int, str]:
        """Group and kind of the rotation before rounding (formats/rotation.py); group 0 for none."""
        return 0, "regular"

    def codes_of_rows(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Codes [M, K'] and scales [M], or one for all, of rows [M, K] as they are."""
        raise NotImplementedError

    def of_codes(self, given: RowCodes, nonlinearity: str = "") -> Tensor:
        """The layer of codes, and one of `formats.nonlinearities` on its sums."""
        raise NotImplementedError

    def encode(self, x: Tensor, norm: tuple | None, dtype: torch.dtype, gate: tuple | None = None) -> RowCodes:
        """Codes of the rows of x, as the layer itself would make them; under a norm nothing is rounded before."""
        if norm is None and gate is None and not self.rotation[0]:
            codes, scale = self.codes_of_rows(x.reshape(-1, x.shape[-1]))
        else:
            codes, scale = from_codes.row_codes(x, self.mode, norm, gate, self.rotation)
        return RowCodes(codes, scale, x.shape, dtype)

    def input_codes(self, x: Tensor, more: Tensor | None = None, norm: tuple | None = None) -> RowCodes:
        """Codes of x [..., K] for this layer, and for others of its `codes_key`.

        more [..., K']: the input's last columns, where x has only the first. norm: (scale [B, K], shift [B, K], eps)
        of an adaptive layer norm that x [B, ..., K] goes through first, or with a form of norm as fourth.
        """
        if more is None:
            return self.encode(x, norm, x.dtype)
        codes, scale = from_codes.row_codes(x, self.mode, norm, None, self.rotation, more)
        return RowCodes(codes, scale, (*x.shape[:-1], codes.shape[1]), x.dtype)

    def multiply(self, x: Tensor | Handed | RowCodes, nonlinearity: str = "") -> Tensor:
        """The layer of x, or of codes of it, and one of `formats.nonlinearities` on its sums."""
        if not isinstance(x, RowCodes):
            given, plain = encoded(self, x)
            x = self.encode(plain, None, plain.dtype) if given is None else given
        return self.of_codes(x, nonlinearity)

    @property
    def mode(self) -> str:
        """What kernels that make codes call the type of these."""
        return "fp8" if self.code == fp8.DTYPE else "int8"
