"""Smoothing: divisors s [K] that move outliers from activations to weights, x / s and W diag(s).

s_j = max|X_j|^alpha / max|W_j|^beta        (SVDQuant section 4.1; the candidates are its code's)

SVDQuant divides in its own layers. The transform "smooth" divides in the weights of the layer before, where nothing
nonlinear lies between: values of attention, and hidden units that a gate multiplies.

    y = W_reader diag(s)  diag(1/s) (W_writer u + b)
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ..errors import UserError
from .attention import value_streams
from .base import Evidence, TransformPlan, check_holds, register_transform
from .feedforward import gated_streams
from .streams import Stream, change, input_peaks, streams_of, weight_peaks

SMALLEST, LARGEST = 2.0**-24, 65504.0  # what float16 holds


def divisors(input_peak: Tensor, weight_peak: Tensor, alpha: float, beta: float) -> Tensor:
    """s [K] float32 from the largest magnitudes [K]; 1 for channels that are never fed or have no weight."""
    s = input_peak.pow(alpha) / weight_peak.pow(beta)
    usable = s.isfinite() & (s > 0) & (input_peak > 0) & (weight_peak > 0)
    return torch.where(usable, s, 1.0).clamp(1e-4, 1e4)  # what float16 holds


def candidates(steps: int) -> list[tuple[float, float]]:
    """(alpha, beta): none; then alpha = i / steps with beta 0 and with beta = 1 - alpha."""
    shares = [i / steps for i in range(1, steps)]
    return [(0.0, 0.0), *((a, 0.0) for a in shares), *((a, 1 - a) for a in shares)]


def check_alpha(kind: str, alpha: float) -> None:
    """Raises UserError unless alpha is from 0 to 1."""
    if not 0 <= alpha <= 1:
        raise UserError(f"alpha of '{kind}' is a share from 0 to 1, not {alpha}.")


def check_divisors(plans: Sequence[TransformPlan]) -> None:
    """Raises UserError unless the plans' divisors, where there are any, are above zero and what float16 holds."""
    for plan in plans:
        s = plan.tensors.get("divisors")
        if s is not None and not s.is_meta and not ((s >= SMALLEST) & (s <= LARGEST)).all():
            raise UserError(
                f"the divisors of '{plan.kind}' for {plan.modules} must be positive and finite, in float16 too."
            )


def divide(model: nn.Module, plans: Sequence[TransformPlan], streams: list[Stream]) -> None:
    """What the writers give by s, what the readers do times s, in place."""
    for plan, stream in zip(plans, streams, strict=True):
        s = plan.tensors["divisors"][:, None]
        change(model, stream, lambda w, s=s: w / s.to(w), lambda w, s=s: w * s.to(w))


class Dividing:
    """What transforms with an option alpha and tensors of divisors share: looking at both."""

    name: str

    def check_options(self, *, alpha: float) -> None:
        """Raises UserError unless alpha is from 0 to 1."""
        check_alpha(self.name, alpha)

    def check_plan(self, plan: TransformPlan) -> None:
        """Raises UserError where a plan can be of no model."""
        check_holds(plan, {"alpha": float}, {"divisors": torch.float32})
        check_alpha(plan.kind, plan.options.get("alpha", 0))
        check_divisors([plan])


@register_transform("smooth")
class Smooth(Dividing):
    """Smoothing by the formulas above, with beta = 1 - alpha (SmoothQuant, arXiv:2211.10438, eq. 4)."""

    needs = frozenset({"peaks"})

    def find(self, model: nn.Module, evidence: Evidence | None, *, alpha: float = 0.5) -> list[TransformPlan]:
        """Plans with `divisors` s [K] float32.

        alpha: from 0, where the readers' columns become equally large, to 1, where their inputs do.

        Raises:
            UserError: alpha is out of range, or the evidence has no peaks of this model.
        """
        check_alpha(self.name, alpha)
        plans = []
        for stream, peak in input_peaks(self.name, self._streams(model), evidence):
            s = divisors(peak, weight_peaks(model, stream).to(peak.device), alpha, 1 - alpha)
            plans.append(TransformPlan(self.name, stream.modules, {"alpha": alpha}, {"divisors": s.float()}))
        return plans

    def check(self, model: nn.Module, *plans: TransformPlan) -> list[Stream]:
        """The streams that the plans are for; UserError where one does not fit the model."""
        check_divisors(plans)
        return streams_of(model, plans, self._streams(model), ("divisors",))

    def apply(self, model: nn.Module, *plans: TransformPlan) -> None:
        """W_writer / s in rows, its bias too; W_reader s in columns."""
        divide(model, plans, self.check(model, *plans))

    def _streams(self, model: nn.Module) -> list[Stream]:
        return value_streams(model) + gated_streams(model)
