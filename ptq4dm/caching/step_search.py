"""The evaluations to compute, and the weights of those that reuse, from inner products of what the deep part gives.

At evaluation j a sum of the deep parts F_c, F_p, ... of the latest evaluations that were computed stands for F_j. Its
weights are the best by least squares over calibration trajectories, and what is left of F_j is its error e_j: both
follow from the inner products F_i . F_j, so that no candidate is run. An error of the deep part is one of the model's
output g_j times as large, and of the end of sampling s_j g_j, see plan_steps.py. The plan has the least sum of
(s_j g_j e_j)^2 over all ways to choose so many evaluations, by dynamic programming; a state is the latest ones.
"""

from __future__ import annotations

import numpy as np

JITTER = 1e-3  # the share of a deep part that is taken for its error: it keeps weights small


def best_weights(products: np.ndarray, sources: list[int], evaluation: int) -> tuple[np.ndarray, float]:
    """(weights of the sources, what they leave of the deep part: a mean square)."""
    gram = products[np.ix_(sources, sources)].copy()
    right = products[sources, evaluation]
    gram[np.diag_indices(len(sources))] *= 1 + JITTER**2
    weights = np.linalg.solve(gram, right)
    return weights, max(float(products[evaluation, evaluation] - right @ weights), 0.0)


def alike(products: np.ndarray, sources: tuple[int, ...], evaluation: int) -> tuple[int, ...]:
    """Of the sources, the latest first, those up to the first whose deep part is none that the evaluation's has an
    inner product with: of a call with other shapes, as where guidance begins."""
    for count in range(len(sources), 0, -1):
        some = [*sources[:count], evaluation]
        if np.isfinite(products[np.ix_(some, some)]).all():
            return sources[:count]
    return ()


class Costs:
    """The cost of runs of evaluations that reuse, by what was computed before them.

    products: [N, N] of the deep part, averaged over trajectories, NaN where there is none; factors: [N], (s_j g_j)^2.
    """

    def __init__(self, products: np.ndarray, factors: np.ndarray) -> None:
        self.products, self.factors = products, factors
        self._found: dict[tuple[tuple[int, ...], int], float] = {}

    def of(self, sources: tuple[int, ...], evaluation: int) -> float:
        """Of one evaluation; infinite where it cannot reuse these."""
        key = sources, evaluation
        if key not in self._found:
            usable = alike(self.products, sources, evaluation)
            left = best_weights(self.products, list(usable), evaluation)[1] if usable else np.inf
            self._found[key] = left * self.factors[evaluation] if usable else np.inf
        return self._found[key]


def best_steps(costs: Costs, computed: int, history: int, longest: int) -> tuple[tuple[int, ...], float]:
    """(so many evaluations to compute, the first among them, the sum of squared errors of the rest).

    history: deep parts that a sum may have. longest: evaluations that reuse in a row, at most.
    """
    count = len(costs.factors)
    ways: dict[tuple[int, ...], tuple[float, tuple[int, ...]]] = {(0,): (0.0, (0,))}
    for step in range(1, computed + 1):
        following: dict[tuple[int, ...], tuple[float, tuple[int, ...]]] = {}
        for state, (total, way) in ways.items():
            for n in range(state[0] + 1, min(state[0] + longest + 1, count) + 1):
                if n > state[0] + 1:
                    total += costs.of(state, n - 1)
                if not np.isfinite(total):
                    break
                if (n == count) != (step == computed):
                    continue
                new = (n, *state)[:history]
                if new not in following or total < following[new][0]:
                    following[new] = total, (*way, n)
        ways = following
    if not ways:
        return (), np.inf
    total, way = min(ways.values())
    return way[:-1], total
