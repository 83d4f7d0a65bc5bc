"""Reorder: channels by falling peak, so that neighbours in a quantization group are alike (QServe, arXiv:2405.04532).

    y = (W_reader P^T) (P W_writer u + P b)        P: x -> x[order]

Values of attention change places within their head, hidden units of a feed-forward layer anywhere in it.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor, nn

from ..errors import UserError
from .attention import value_streams
from .base import Evidence, TransformPlan, check_holds, register_transform
from .feedforward import hidden_streams
from .streams import Stream, change, input_peaks, streams_of


def falling(peak: Tensor, heads: int) -> Tensor:
    """The order [K] int64 that sorts each head's channels by falling peak; equal ones stay as they are."""
    width = len(peak) // heads
    order = peak.reshape(heads, width).argsort(dim=1, descending=True, stable=True)
    return (order + width * torch.arange(heads, device=peak.device)[:, None]).flatten()


def permuted(w: Tensor, order: Tensor) -> Tensor:
    """The rows of a matrix [K, N] in an order [K]."""
    return w[order.to(w.device)]


@register_transform("reorder")
class Reorder:
    """A new order of channels between layers."""

    name: str
    needs = frozenset({"peaks"})

    def find(self, model: nn.Module, evidence: Evidence | None) -> list[TransformPlan]:
        """Plans with `order` [K] int64, where it is another than now.

        Raises:
            UserError: the evidence has no peaks of this model.
        """
        plans = []
        for stream, peak in input_peaks(self.name, self._streams(model), evidence):
            order = falling(peak, stream.heads)
            if not torch.equal(order, torch.arange(stream.size, device=order.device)):
                plans.append(TransformPlan(self.name, stream.modules, {}, {"order": order}))
        return plans

    def check_plan(self, plan: TransformPlan) -> None:
        """Raises UserError where a plan can be of no model."""
        check_holds(plan, {}, {"order": torch.int64})
        order = plan.tensors["order"]
        if not order.is_meta and not torch.equal(order.flatten().sort().values.cpu(), torch.arange(order.numel())):
            raise UserError(f"the order of '{plan.kind}' for {plan.modules} is no permutation.")

    def check(self, model: nn.Module, *plans: TransformPlan) -> list[Stream]:
        """The streams that the plans are for; UserError where one does not fit the model."""
        streams = streams_of(model, plans, self._streams(model), ("order",))
        for plan, stream in zip(plans, streams, strict=True):
            order = plan.tensors["order"].cpu()
            heads = torch.arange(stream.size).reshape(stream.heads, -1)
            if order.dtype != torch.int64 or not torch.equal(order.reshape(heads.shape).sort(dim=1).values, heads):
                raise UserError(f"the order of '{plan.kind}' for {plan.modules} is no permutation within heads.")
        return streams

    def apply(self, model: nn.Module, *plans: TransformPlan) -> None:
        """W_writer[order] in rows, its bias too; W_reader[:, order]."""
        for plan, stream in zip(plans, self.check(model, *plans), strict=True):
            permute = partial(permuted, order=plan.tensors["order"])
            change(model, stream, permute, permute)

    def _streams(self, model: nn.Module) -> list[Stream]:
        return value_streams(model) + hidden_streams(model)
