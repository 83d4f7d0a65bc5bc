"""Rotate: values of attention by a Hadamard matrix, which spreads outliers over a head (QuaRot, arXiv:2404.00456).

y = (W_reader H^T) (H W_writer u + H b)        H H^T = I
"""

from __future__ import annotations

from functools import partial

from torch import Tensor, nn

from ..errors import UserError
from ..kernels.formats.hadamard import hadamard
from .attention import value_streams
from .base import Evidence, TransformPlan, check_holds, register_transform
from .streams import Stream, change, streams_of


def rotated(w: Tensor, block: int) -> Tensor:
    """diag(H, ..., H) w: each `block` rows of a matrix [K, N] times H."""
    return (hadamard(block).to(w) @ w.reshape(-1, block, w.shape[1])).reshape(w.shape)


def block_of(stream: Stream) -> int:
    """The largest power of two that divides a head: 72 channels are rotated by eights."""
    width = stream.size // stream.heads
    return width & -width


@register_transform("rotate")
class Rotate:
    """A rotation of values within each head."""

    name: str
    needs: frozenset[str] = frozenset()

    def find(self, model: nn.Module, evidence: Evidence | None = None) -> list[TransformPlan]:
        """Plans with the option `block`, the size of H; heads of an odd width are left alone."""
        streams = [stream for stream in value_streams(model) if block_of(stream) > 1]
        return [TransformPlan(self.name, stream.modules, {"block": block_of(stream)}) for stream in streams]

    def check_plan(self, plan: TransformPlan) -> None:
        """Raises UserError where a plan can be of no model."""
        check_holds(plan, {"block": int}, {})
        block = plan.options.get("block", 0)
        if block < 2 or block & (block - 1):
            raise UserError(f"the block of '{plan.kind}' for {plan.modules} is a power of two, not {block}.")

    def check(self, model: nn.Module, *plans: TransformPlan) -> list[Stream]:
        """The streams that the plans are for; UserError where one does not fit the model."""
        streams = streams_of(model, plans, value_streams(model))
        for plan, stream in zip(plans, streams, strict=True):
            if plan.options.get("block") != block_of(stream):
                raise UserError(
                    f"the plan of '{plan.kind}' for {plan.modules} needs a block of {block_of(stream)}, not "
                    f"{plan.options.get('block')}: it is of another model."
                )
        return streams

    def apply(self, model: nn.Module, *plans: TransformPlan) -> None:
        """H W_writer in rows, its bias too; W_reader H^T in columns, which is H on its transpose."""
        for plan, stream in zip(plans, self.check(model, *plans), strict=True):
            turn = partial(rotated, block=plan.options["block"])
            change(model, stream, turn, turn)
