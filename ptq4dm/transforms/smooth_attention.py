"""Attention's smoothing: divisors s [K] that move outliers from keys to queries (QServe, arXiv:2405.04532).

    s_j = max|K_j|^alpha        Q K^T = (Q diag(s)) (K diag(1/s))^T

Channels that a rotary embedding turns together share one s, the largest.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..errors import UserError
from .attention import query_key_streams
from .base import Evidence, TransformPlan, check_holds, register_transform
from .smooth import check_alpha, check_divisors, divide, divisors
from .streams import Stream, output_peaks, streams_of


def shared(s: Tensor, numbers: Tensor) -> Tensor:
    """Each channel's value [K] becomes the largest among the channels of its number [K]."""
    largest = s.new_zeros(len(s)).scatter_reduce(0, numbers, s, "amax")
    return largest[numbers]


@register_transform("smooth-attention")
class SmoothAttention:
    """Smoothing of keys by queries; not where they are normalized first, which is nonlinear."""

    name: str
    needs = frozenset({"output_peaks"})

    def find(self, model: nn.Module, evidence: Evidence | None, *, alpha: float = 0.5) -> list[TransformPlan]:
        """Plans with `divisors` s [K] float32.

        alpha: from 0, where nothing changes, to 1, where all keys' channels become equally large.

        Raises:
            UserError: alpha is out of range, or the evidence has no peaks of this model.
        """
        check_alpha(self.name, alpha)
        turning = dict(query_key_streams(model))
        plans = []
        for stream, peak in output_peaks(self.name, list(turning), evidence):
            peak = shared(peak, turning[stream].to(peak.device))
            s = divisors(peak, torch.ones_like(peak), alpha, 0)
            plans.append(TransformPlan(self.name, stream.modules, {"alpha": alpha}, {"divisors": s.float()}))
        return plans

    def check_options(self, *, alpha: float) -> None:
        """Raises UserError unless alpha is from 0 to 1."""
        check_alpha(self.name, alpha)

    def check_plan(self, plan: TransformPlan) -> None:
        """Raises UserError where a plan can be of no model."""
        check_holds(plan, {"alpha": float}, {"divisors": torch.float32})
        check_alpha(plan.kind, plan.options.get("alpha", 0))
        check_divisors([plan])

    def check(self, model: nn.Module, *plans: TransformPlan) -> list[Stream]:
        """The streams that the plans are for; UserError where one does not fit the model."""
        check_divisors(plans)
        turning = dict(query_key_streams(model))
        streams = streams_of(model, plans, list(turning), ("divisors",))
        for plan, stream in zip(plans, streams, strict=True):
            s = plan.tensors["divisors"]
            if not torch.equal(s, shared(s, turning[stream].to(s.device))):
                raise UserError(
                    f"the divisors of '{plan.kind}' for {plan.modules} differ between channels that the rotary "
                    "embedding of this model turns together."
                )
        return streams

    def apply(self, model: nn.Module, *plans: TransformPlan) -> None:
        """W_key / s and W_query s, both in rows, and their biases."""
        divide(model, plans, self.check(model, *plans))
