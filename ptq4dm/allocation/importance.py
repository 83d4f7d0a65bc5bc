"""The importance of rows of weights: scores that say which should get 8 bits, where there are not enough for all.

For row n of a weight W, with Q(W) its nearest codes at the narrow width, d_n = Q(W)_n - W_n, and a sum over
calibration tuples x, of what a model predicts, eps(x):

    fisher        sum |<g_n, d_n> + <g_n, d_n>^2 / 2|,   g = dL/dW,  L = mean (eps(x) - e)^2,  e drawn
    gauss-newton  sum <g_n, d_n>^2,  g = dL/dW,  L = <r, eps(x)>,  r Gaussian, drawn anew for each tuple
    gradient      sum |<g_n, w_n>|,  g as in gauss-newton
    integrated    sum |<g_n, d_n>|,  g = mean_t dL/dW at W + t d,  t = 1/8 .. 1,  L = |eps_t - eps|^2 / |eps|^2
    endpoint      the same with t = 1 alone, in an eighth of the time
    magnitude     |d_n|^2
    random        a draw

fisher is that of "MixLLM: LLM Quantization with Global Mixed-precision between Output-features and Highly-efficient
System Design", Zheng et al., arXiv:2412.14590: first order and a second one of rank one, the absolute value tuple by
tuple. Its loss is a language model's, against the text. Here it is that of a diffusion model, against the noise e in
x. A calibration tuple has x alone, and the schedule that would make noise of it is not the model's to know. So e is
drawn from what the model says of it: a Gaussian around eps(x), as large as that is. That is our assumption. The loss
against eps(x) itself would be no score: it is least there, and its gradient is zero.

gauss-newton (our derivation) needs no noise. E <r, J d>^2 = |J d|^2, of the change J d of the prediction to the first
order: so the score of a row is the squared error that its rounding makes in the prediction, and scores of rows whose
errors do not know each other add up. Which bits rows get by the others, "Gradient-Based Post-Training Quantization:
Challenging the Status Quo", Yvinec et al., arXiv:2308.07662, does not say where we could read it: our assumption.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ..calibration.record import replay
from ..pipelines.denoiser import evaluation_mode
from .row_task import IMPORTANCE, RowTask, inner, register_importance

__all__ = ["IMPORTANCE", "RowTask"]

PARTS = 8  # of the way from W to Q(W)


@register_importance("fisher", needs=frozenset({"calls"}))
def fisher(task: RowTask) -> dict[str, Tensor]:
    """MixLLM's: what the loss against drawn noise changes by, to the first order and a second one of rank one."""

    def against_noise(samples: Tensor, noise: Tensor) -> Tensor:
        """mean (eps - e)^2 with e = eps + |eps| r."""
        size = samples.detach().square().mean().sqrt()
        return (samples - (samples.detach() + size * noise)).square().mean()

    return _drawn(task, against_noise, task.errors, lambda slope: (slope + slope.square() / 2).abs())


@register_importance("gauss-newton", needs=frozenset({"calls"}))
def gauss_newton(task: RowTask) -> dict[str, Tensor]:
    """Sum over tuples of <g_n, d_n>^2, g the gradient of the model's output in a random direction: the squared error
    of the output, to the first order, as far as one direction for each tuple tells."""
    return _drawn(task, _along, task.errors, torch.square)


@register_importance("gradient", needs=frozenset({"calls"}))
def gradient(task: RowTask) -> dict[str, Tensor]:
    """Sum over tuples of |<g_n, w_n>|, g as in gauss-newton."""
    return _drawn(task, _along, task.weights, torch.abs)


def _along(samples: Tensor, noise: Tensor) -> Tensor:
    return (samples * noise).sum()


def _drawn(
    task: RowTask, loss: Callable[[Tensor, Tensor], Tensor], by: dict[str, Tensor], score: Callable[[Tensor], Tensor]
) -> dict[str, Tensor]:
    """Layer -> sum over tuples of score(<g_n, by_n>) [N], g = dL/dW, L = loss(samples, r) for a drawn r ~ N(0, I)."""
    total: dict[str, Tensor] = {}
    for number, (part, call) in enumerate(task.tuples()):
        generator = torch.Generator("cpu").manual_seed(task.seed * 1_000_003 + number)

        def value(samples: Tensor, generator: torch.Generator = generator) -> Tensor:
            return loss(samples, torch.randn(samples.shape, generator=generator).to(samples.device))

        found = task.slopes(part, call, task.weights, value, by)
        total = {name: total.get(name, 0) + score(slope) for name, slope in found.items()}
    return total


@register_importance("integrated", needs=frozenset({"calls"}))
def integrated(task: RowTask) -> dict[str, Tensor]:
    """Sum over tuples of what each row's rounding adds to the error, along the way from W to Q(W).

    Absolute values are taken tuple by tuple: rows whose effects on several tuples are of two signs matter, too.
    """
    return _attributed(task, [step / PARTS for step in range(1, PARTS + 1)])


@register_importance("endpoint", needs=frozenset({"calls"}))
def endpoint(task: RowTask) -> dict[str, Tensor]:
    """The same by the gradient at Q(W) alone."""
    return _attributed(task, [1.0])


def _attributed(task: RowTask, parts: list[float]) -> dict[str, Tensor]:
    """Layer -> sum over tuples of |mean over t of <g_n(W + t d), d_n>| for these t."""
    total: dict[str, Tensor] = {}
    for part, call in task.tuples():
        with evaluation_mode(task.model):
            exact = replay(task.model, part).float()

        def error(samples: Tensor, exact: Tensor = exact) -> Tensor:
            return (samples - exact).square().sum() / exact.square().mean()  # a mean would vanish in 16 bits

        added: dict[str, Tensor] = {}
        for share in parts:
            moved = {name: torch.add(w, task.errors[name], alpha=share) for name, w in task.weights.items()}
            found = task.slopes(part, call, moved, error, task.errors)
            added = {name: added.get(name, 0) + slope / len(parts) for name, slope in found.items()}
        total = {name: total.get(name, 0) + one.abs() for name, one in added.items()}
    return total


@register_importance("magnitude")
def magnitude(task: RowTask) -> dict[str, Tensor]:
    """|Q(W)_n - W_n|^2: what rounding does to the weight, whatever it does to the model."""
    return {name: inner(error, error) for name, error in task.errors.items()}


@register_importance("random")
def random(task: RowTask) -> dict[str, Tensor]:
    """A draw for each row, the same for each of its weights."""
    generator = torch.Generator("cpu").manual_seed(task.seed)
    return {
        view.name: torch.rand(len(view.weight), generator=generator, dtype=torch.float64) * view.weight.shape[1]
        for view in task.views
    }
