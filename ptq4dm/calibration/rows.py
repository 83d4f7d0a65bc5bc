"""Which rows of a denoiser's call belong to which seed: seen from a call for one seed beside a call for two.

The pipeline itself makes a call for one seed alone. So rows that are picked from a call for several seeds are right
if they are the arguments of that call; no other evidence is needed, and no axis is guessed.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from .calls import Call
from .record import call_on, tensors_of, times_of

NEAR = 1e-2  # of the largest value: what an encoder changes with the size of its batch
SAME = 1e-3  # of the largest output


@dataclass(frozen=True)
class RowRule:
    """Rows of a call for B seeds: seed k has rows k, k + B, ..., `copies` of them, in each of the leaves `own`.

    structure: of the calls that it is a rule for. times: leaves that are one time for all rows, and may be one a row.
    """

    structure: pytree.TreeSpec
    own: tuple[int, ...]
    copies: int
    times: tuple[int, ...] = ()

    def rows(self, seeds: Tensor, batch: int) -> Tensor:
        """The rows of some seeds, by their place in the batch: all their first copies, all their second ones, ..."""
        return torch.cat([seeds + copy * batch for copy in range(self.copies)])

    def fits(self, call: Call, batch: int) -> bool:
        """Whether a call for `batch` seeds has the rows that the rule speaks of."""
        leaves, structure = call.flat()
        size = self.copies * batch
        rows = [i for i in self.own if i not in self.times]
        return structure == self.structure and all(
            isinstance(leaves[i], Tensor) and leaves[i].ndim and len(leaves[i]) == size for i in rows
        )

    def with_times(self, call: Call, batch: int) -> Call:
        """The same call with a time for each row."""
        leaves, structure = call.flat()
        for i in self.times:
            leaves[i] = torch.as_tensor(leaves[i]).reshape(1).expand(self.copies * batch)
        return Call.nested(leaves, structure)


def row_rule(model: nn.Module, one: Call, two: Call) -> RowRule | None:
    """The rule of a model's calls, from a call for one seed and one for it and another; None where there is none."""
    ours, structure = one.flat()
    theirs, other = two.flat()
    if structure != other:
        return None
    pairs = list(enumerate(zip(ours, theirs, strict=True)))
    own = [i for i, (a, b) in pairs if isinstance(a, Tensor) and isinstance(b, Tensor) and a.shape != b.shape]
    if not own or any(ours[i].ndim == 0 for i in own):
        return None
    copies = len(ours[own[0]])
    if any(len(ours[i]) != copies or len(theirs[i]) != 2 * copies for i in own):
        return None
    picked = torch.arange(copies) * 2
    for i, (a, b) in pairs:
        if not _alike(a, b[picked] if i in own else b):
            return None
    rule = RowRule(structure, tuple(own), copies)
    single = tuple(i for i in times_of(model, one) if i not in own and torch.as_tensor(ours[i]).numel() == 1)
    if not single:
        return rule
    spread = RowRule(structure, tuple(sorted((*own, *single))), copies, single)
    return spread if _takes_times(model, two, spread.with_times(two, 2)) else rule


def _alike(a: object, b: object) -> bool:
    if not (isinstance(a, Tensor) and isinstance(b, Tensor)):
        return type(a) is type(b) and a == b
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    if not a.is_floating_point():
        return torch.equal(a, b)
    largest = float(a.abs().max()) if a.numel() else 0.0
    return bool(((a - b).abs() <= NEAR * largest).all()) or torch.equal(a, b)


@torch.no_grad()
def _takes_times(model: nn.Module, call: Call, spread: Call) -> bool:
    """Whether a model gives the same for one time a row as for one time."""
    try:
        exact, found = (
            tensors_of(model(*c.args, **c.kwargs)) for c in (call_on(model, call), call_on(model, spread))
        )
    except (RuntimeError, ValueError, TypeError, IndexError):
        return False
    return len(exact) == len(found) and all(
        a.shape == b.shape and bool(((a - b).abs() <= SAME * a.abs().max()).all())
        for a, b in zip(exact, found, strict=True)
    )
