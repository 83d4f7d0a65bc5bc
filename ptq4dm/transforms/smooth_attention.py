"""Attention's smoothing: divisors s [K] that move outliers from keys to queries (QServe, arXiv:2405.04532).

    s_j = max|K_j|^alpha        Q K^T = (Q diag(s)) (K diag(1/s))^T

Channels that a rotary embedding turns together share one s, the largest. Where keys and queries are normalized, their
norms' weights take s in; a norm that all heads share has one s for all of them.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..errors import UserError
from .attention import query_key_streams
from .base import Evidence, TransformPlan, register_transform
from .smooth import Dividing, check_alpha, check_divisors, divide, divisors
from .streams import Stream, output_peaks, streams_of


def shared(s: Tensor, numbers: Tensor) -> Tensor:
    """Each channel's value [K] becomes the largest among the channels of its number [K]."""
    largest = s.new_zeros(len(s)).scatter_reduce(0, numbers, s, "amax")
    return largest[numbers]


def _of_text(model: nn.Module, stream: Stream) -> bool:
    """Whether a stream's keys are those of cross-attention."""
    attention = model.get_submodule(stream.modules[0].rpartition(".")[0])
    return bool(getattr(attention, "is_cross_attention", False))


@register_transform("smooth-attention")
class SmoothAttention(Dividing):
    """Smoothing of keys by queries, in self-attention, joint attention and cross-attention."""

    needs = frozenset({"output_peaks"})

    def find(self, model: nn.Module, evidence: Evidence | None, *, alpha: float | None = None) -> list[TransformPlan]:
        """Plans with `divisors` s [K] float32.

        alpha: from 0, where nothing changes, to 1, where all keys' channels become equally large. By default the
            paper's 0.5, and 1 for the keys of a text in cross-attention: our choice, for keys that are kept in 4 bits
            beside queries that are not quantized (kernels/attention/README.md).

        Raises:
            UserError: alpha is out of range, or the evidence has no peaks of this model.
        """
        if alpha is not None:
            check_alpha(self.name, alpha)
        turning = dict(query_key_streams(model))
        plans = []
        for stream, peak in output_peaks(self.name, list(turning), evidence):
            peak = shared(peak, turning[stream].to(peak.device))
            share = (1.0 if _of_text(model, stream) else 0.5) if alpha is None else alpha
            s = divisors(peak, torch.ones_like(peak), share, 0)
            plans.append(TransformPlan(self.name, stream.modules, {"alpha": share}, {"divisors": s.float()}))
        return plans

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
        """W_key / s and W_query s, both in rows, and their biases; or weights and biases of their norms."""
        divide(model, plans, self.check(model, *plans))
