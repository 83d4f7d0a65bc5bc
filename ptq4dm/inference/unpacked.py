"""Weights of 4 bits kept in 8, so that calls need not unpack them: N K bytes more, and the same results.

A layer's codes stay what is saved. What is kept is made of them as each call makes it (kernels/w4/layer.py), and goes
with the first thing that changes or moves them. Which layers keep it is up to weight_cache.py.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from ..kernels.runtime.prepared import version_of
from ..kernels.w4 import layer as svdq_linear


@dataclass(eq=False)
class Unpacked:
    """The weight of a layer in 8 bits; made_of: addresses and versions of the codes. A copy of a layer has none."""

    weight: Tensor
    scales: Tensor
    made_of: tuple[tuple[int, int], ...]

    def __reduce__(self) -> tuple:
        return type(None), ()


if TYPE_CHECKING:
    from ..layers.base import QuantizedLayer as Layer
else:
    Layer = object


class KeepsUnpacked(Layer):
    """What a layer with `qweight`, `wscales` and a plan with `activation` inherits to keep its weight in 8 bits."""

    _unpacked: Unpacked | None = None
    wscales: Tensor

    def unpacks(self) -> bool:
        """Whether each call on many rows makes 8 bits of the weight, which `keep_unpacked` can keep."""
        return self.plan.activation != "none" and svdq_linear.on_gpu(self.kernel_name())

    def keep_unpacked(self) -> None:
        """Keep the weight in 8 bits, as calls make it. Raises ValueError where they do not."""
        weight, scales = svdq_linear.unpacked(self.qweight, self.wscales, self.plan.activation)
        self._unpacked = Unpacked(weight, scales, self._made_of())

    def drop_unpacked(self) -> None:
        """Unpack in every call again."""
        vars(self).pop("_unpacked", None)

    def unpacked_is_right(self) -> bool:
        """False if the codes were written into, or lie elsewhere, since `keep_unpacked`."""
        return self._unpacked is None or self._unpacked.made_of == self._made_of()

    def eight_bits(self) -> tuple[Tensor | None, Tensor | None]:
        """The weight in 8 bits and its scales, as the ops take them."""
        kept = self._unpacked
        return (None, None) if kept is None else (kept.weight, kept.scales)

    def _made_of(self) -> tuple[tuple[int, int], ...]:
        return tuple((one.data_ptr(), version_of(one)) for one in (self.qweight, self.wscales))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
        self.drop_unpacked()
        return super()._apply(fn, recurse)

    def _load_from_state_dict(self, state_dict: dict, prefix: str, *args: Any) -> None:
        self.drop_unpacked()
        super()._load_from_state_dict(state_dict, prefix, *args)
