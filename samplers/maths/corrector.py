"""A step done again with the evaluation at its end (UniPC's corrector, arXiv:2302.04867), for the DEIS polynomials.

Step i - 1 leads from rho_{i-1} to rho_i. Before the model is called there, its polynomial P of degree r passes
through evaluations i - 1, i - 2, ...; when it has been called, C, of degree r + 1, passes through evaluation i too.
UniPC replaces the state by what C gives, and goes on from there without another call. With v = x / alpha and
p_j, c_j the integrals over that step of the basis polynomials of P and C,

    predicted    v_i  = v_{i-1} + sum_{j >= 1} p_j eps_{i-j}
    corrected    v'_i = v_{i-1} + sum_{j >= 0} c_j eps_{i-j} = v_i + sum_j (c_j - p_j) eps_{i-j},  p_0 = 0

so where the step began need not be remembered: the difference is weights of evaluations, which are there anyhow. The
next step, with weights w_j, begins at v'_i, and both are one update of the sample that the model was called with:

    v_{i+1} = v_i + sum_j (w_j + c_j - p_j) eps_{i-j}

A corrected solver is thus a table of weights like any other, over one more evaluation. P and C give a constant the
same integral: the sum of the weights stays the length of the step, which velocities.py relies on. c and p come from
the solver's own rule: in t, rho or log rho, in a flow's s, and for even steps (there they are Adams and Moulton's).

A step that begins where rho is infinite is not corrected: its v is infinite, and so is the integral of any polynomial
that tells evaluation i from evaluation i - 1 there. In a flow's s, of velocities, no step is such.
"""

from __future__ import annotations

import numpy as np

from .coefficients import Rule, cancelling


def corrected(table: list[list[np.ndarray]], rule: Rule, most: float) -> list[list[np.ndarray]]:
    """The table of a predictor, by step and length of the history, with each step before corrected.

    Args:
        table: of `rule`, of any degrees.
        most: a correction is left out where the weights with it are `cancelling` by this bound.
    """
    return [table[0], *(_row(table, rule, i, most) for i in range(1, len(table)))]


def _row(table: list[list[np.ndarray]], rule: Rule, i: int, most: float) -> list[np.ndarray]:
    """Weights of step i by the number of earlier evaluations k: without any, nothing is corrected."""
    before, now = table[i - 1], table[i]
    if not np.isfinite(rule.levels[i - 1]):
        return now
    row = now[:1]
    for k in range(1, max(len(now), len(before) + 1)):
        plain = _longer(now[min(k, len(now) - 1)], k)
        predicted = before[min(k, len(before)) - 1]
        change = _longer(rule.over(i - 1, i, len(predicted)), k)
        change[1 : len(predicted) + 1] -= predicted
        row.append(plain if cancelling(plain + change, most) else plain + change)
    return row


def _longer(weights: np.ndarray, past: int) -> np.ndarray:
    """A copy for `past` earlier evaluations, of which the last do not count."""
    return np.append(weights, np.zeros(past + 1 - len(weights)))
