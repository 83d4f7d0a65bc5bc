"""Which steps of a sampler compute a network whole, and which reuse its deep part: a small JSON file."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from ..checks import check_fields, named_options
from ..errors import DamagedFile, UserError
from ..files.atomic import replacing
from ..files.outside import naming, read_object
from ..files.places import make_parent
from ..options import option

MOST_STEPS = 100_000
MOST_KEPT = 4  # deep parts that a sum may have
KEYS: dict[str, type | tuple[type, ...]] = {
    "weights": list, "depth": int, "times": list, "error": (int, float, type(None))
}  # fmt: skip


@named_options
@dataclass(frozen=True)
class StepPlan:
    """A plan for one number of evaluations, which for most samplers are its steps.

    weights: for each evaluation none where the whole network is computed; else the weights of what the deep part gave
        in the latest evaluations that computed it, the latest first. One weight of 1 reuses that as it is; several
        continue its change.
    depth: where the network is cut, see `ptq4dm.cached_steps`.
    times: the scheduler's timesteps that it was made for; () where it was made for none.
    error: what reuse is expected to add to the end state, root mean square; None where nothing was measured.
    origin: what it was made from and for (made_for.py). Nothing that is computed depends on it.
    """

    weights: tuple[tuple[float, ...], ...] = ((),)
    depth: int = option(0, low=0, high=MOST_STEPS)
    times: tuple[float, ...] = ()
    error: float | None = None
    origin: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check_fields(self, "StepPlan")
        computed = 0
        for k, row in enumerate(self.weights):
            if len(row) > min(computed, MOST_KEPT):
                raise UserError(
                    f"StepPlan: evaluation {k} has {len(row)} weights, and {computed} were computed before it"
                    + (f"; {MOST_KEPT} are the most." if len(row) > MOST_KEPT else ".")
                )
            computed += not row
        if not self.weights:
            raise UserError("StepPlan: it has weights of no evaluation.")
        if self.times and len(self.times) != self.evaluations:
            raise UserError(f"StepPlan: {len(self.times)} times for {self.evaluations} evaluations.")

    @property
    def evaluations(self) -> int:
        """Of the sampler."""
        return len(self.weights)

    @property
    def computed(self) -> tuple[int, ...]:
        """The evaluations that compute the whole network."""
        return tuple(k for k, row in enumerate(self.weights) if not row)

    @property
    def history(self) -> int:
        """How many are kept at a time."""
        return max(1, *map(len, self.weights))

    @property
    def reuse(self) -> float:
        """The share of evaluations that reuse."""
        return 1 - len(self.computed) / self.evaluations

    def sources(self, evaluation: int) -> list[int]:
        """The evaluations whose deep parts serve this one, the latest first; none where it is computed."""
        row = self.weights[evaluation]
        return [k for k in self.computed if k < evaluation][::-1][: len(row)] if row else []

    def save(self, path: str | os.PathLike) -> None:
        """Write it as JSON. Raises UserError where that fails."""
        make_parent(path)
        with replacing(path) as temporary:
            temporary.write_text(json.dumps(asdict(self), indent=1) + "\n", encoding="utf-8")

    @staticmethod
    def load(path: str | os.PathLike) -> StepPlan:
        """The plan in a file of `save`. Raises DamagedFile."""
        found = read_object(path, KEYS)
        if unknown := found.keys() - {*KEYS, "origin"}:
            raise DamagedFile(f"{path} has the unknown entry '{min(unknown)}'.")
        with naming(path):
            if not all(isinstance(row, list) for row in found["weights"]):
                raise UserError("its weights are no list of lists.")
            rows = tuple(map(tuple, found["weights"]))
            return StepPlan(**{**found, "weights": rows, "times": tuple(found["times"])})


def plain_plan(evaluations: int, computed: Sequence[int], depth: int) -> StepPlan:
    """The plan that computes these evaluations, and reuses the latest of them elsewhere."""
    return StepPlan(weights=tuple(() if k in computed else (1.0,) for k in range(evaluations)), depth=depth)


def even_steps(evaluations: int, computed: int) -> tuple[int, ...]:
    """So many evaluations, spread evenly, the first among them."""
    return tuple(k * evaluations // computed for k in range(computed))
