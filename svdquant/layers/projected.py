"""Codes of inputs without the directions that the branch holds (subspace "inputs", svdquant/group.py):

codes of (x - (x D^T) D) H / s,    branch x D^T
"""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

from ...kernels.w4 import from_codes
from .plan import SVDQPlan


def projected_codes(
    x: Tensor, down: Tensor, own: Tensor, smooth: Tensor | None, plan: SVDQPlan, on_kernels: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """(codes [M, K], scales, branch [M, R]) of x [..., K], as `svdq_codes` gives them.

    own: D [r, K]; down: D, and what adapters have below it. The two products before the codes are of float32: the
    rest may be far smaller than x. on_kernels: whether kernels take the branch, which want its columns padded.
    """
    exact = x.float().flatten(0, -2)
    rest = exact - F.linear(F.linear(exact, own.float()), own.float().T)
    after = (None, None, 0.0, "adaptive", "", plan.rotation, plan.rotation_kind)
    codes, scales, _ = from_codes.svdq_codes(rest, None, smooth, None, plan.activation, 0.0, *after)
    branch = F.linear(exact, down.float())
    return codes, scales, from_codes.padded_branch(branch, x.dtype) if on_kernels else branch
