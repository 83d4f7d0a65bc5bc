"""DEIS coefficients: v(rho') = v(rho) + sum_j w_j eps_j, with w_j the integral of a basis polynomial over drho.

Zhang & Chen, "Fast Sampling of Diffusion Models with Exponential Integrator" (arXiv:2204.13902), eq. 14 and
algorithm 1 (t_ab, rho_ab), section 4 (rho_rk); `ipndm` has the weights of Adams and Bashforth for even steps,
whatever the grid; `log_rho` interpolates in log rho, as diffusers' DEIS does. All in float64, all exact: Lagrange
polynomials in rho and log rho are integrated in closed form or by a Gauss rule that is exact for them, those in t by
a converged one.

A flow-matching model begins where rho is infinite. As a node goes there, the polynomials in rho and log rho through
it become those through the other nodes, and its own weight goes to 0: it is left out. In t it is a node as any other.
The first step, from there, has no weight in drho: velocities.py has its finite form.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from math import factorial

import numpy as np

from .paths import EDM, Schedule
from .schedule import integrate

Step = tuple[float, float]
MULTISTEP = ("t_ab", "rho_ab", "ipndm", "log_rho")

# Explicit Runge-Kutta methods by (nodes c, rows of A, weights b).
Tableau = tuple[tuple[float, ...], tuple[tuple[float, ...], ...], tuple[float, ...]]
RUNGE_KUTTA: dict[str, Tableau] = {
    "1euler": ((0,), ((),), (1,)),
    "2heun": ((0, 1), ((), (1,)), (1 / 2, 1 / 2)),
    "3kutta": ((0, 1 / 2, 1), ((), (1 / 2,), (-1, 2)), (1 / 6, 2 / 3, 1 / 6)),
    "3heun": ((0, 1 / 3, 2 / 3), ((), (1 / 3,), (0, 2 / 3)), (1 / 4, 0, 3 / 4)),
    "3ral": ((0, 1 / 2, 3 / 4), ((), (1 / 2,), (0, 3 / 4)), (2 / 9, 1 / 3, 4 / 9)),
    "4rk": ((0, 1 / 2, 1 / 2, 1), ((), (1 / 2,), (0, 1 / 2), (0, 0, 1)), (1 / 6, 1 / 3, 1 / 3, 1 / 6)),
}


@dataclass(frozen=True)
class Rule:
    """How a multistep solver integrates over the steps of a grid, whatever the degree of its polynomials.

    levels: float64 [n + 1], what is integrated over: rho (or s of a flow) at the n evaluations, and at the end.
    nodes: float64 [n], the evaluations in the polynomials' own variable.
    ends: float64 [n + 1], starts and ends of steps as `basis` takes them.
    basis: (nodes [k], (start, end)) -> the integrals [k] over that step of the polynomials that are 1 at one node
        and 0 at the others.
    even: they are for steps of length 1 and are scaled with the step's own.
    """

    levels: np.ndarray
    nodes: np.ndarray
    ends: np.ndarray
    basis: Callable[[np.ndarray, Step], np.ndarray]
    even: bool = False

    def over(self, step: int, newest: int, degree: int) -> np.ndarray:
        """Weights [degree + 1] over step `step` for evaluations `newest`, `newest` - 1, ..., newest first."""
        length = self.levels[step + 1] - self.levels[step]
        if degree == 0:
            return np.array([length])
        nodes = self.nodes[newest - degree : newest + 1][::-1]
        weights = self.basis(nodes, (float(self.ends[step]), float(self.ends[step + 1])))
        return weights * length if self.even else weights

    def table(self, order: int) -> list[list[np.ndarray]]:
        """For step i, by history length k + 1 (k = 0 .. min(i, order)): float64 [k + 1] weights, newest first."""
        return [[self.over(i, i, k) for k in range(min(i, order) + 1)] for i in range(len(self.nodes))]


def multistep_rule(solver: str, schedule: Schedule, times: np.ndarray, rho_end: float) -> Rule:
    """The rule of a solver of MULTISTEP, in rho.

    Args:
        times: decreasing times, one per evaluation, float64 [n].
        rho_end: the rho that the last step reaches.
    """
    rho = np.append(schedule.rho(times), rho_end)
    if solver == "log_rho" or (solver == "t_ab" and isinstance(schedule, EDM)):  # there t is log(rho) / 4
        return log_rho_rule(rho)
    if solver in ("ipndm", "rho_ab"):
        return plain_rule(rho, even=solver == "ipndm")
    return Rule(rho, times, rho, partial(_t_weights, schedule))


def log_rho_rule(rho: np.ndarray) -> Rule:
    """The rule of "log_rho", from rho at the evaluations and at the end, float64 [n + 1]."""
    return Rule(rho, rho[:-1], rho, _telling(_log_rho_weights))


def plain_rule(levels: np.ndarray, even: bool) -> Rule:
    """Polynomials in the levels themselves, float64 [n + 1]: at the evaluations, and at the end.

    even: the weights are those of even steps (Adams and Bashforth's), whatever the levels.
    """
    if even:
        places = np.arange(float(len(levels)))
        return Rule(levels, places[:-1], places, _plain_weights, even=True)
    return Rule(levels, levels[:-1], levels, _telling(_plain_weights))


def _telling(basis: Callable[[np.ndarray, Step], np.ndarray]) -> Callable[[np.ndarray, Step], np.ndarray]:
    """The same weights, with 0 for nodes that tell nothing: at infinity, or where a newer one is.

    Times of equal rho are those at which a schedule is as good as pure noise: there rho is clipped (schedule.py).
    """

    def limit(nodes: np.ndarray, step: Step) -> np.ndarray:
        tells = np.isfinite(nodes) & np.append(True, nodes[1:] != nodes[:-1])
        weights = np.zeros(len(nodes))
        weights[tells] = basis(nodes[tells], step)
        return weights

    return limit


def steady(table: list[list[np.ndarray]], most: float) -> list[list[np.ndarray]]:
    """The table without degrees whose weights cancel, by `cancelling` above `most`, and all degrees above."""
    kept = []
    for row in table:
        degree = 1
        while degree < len(row) and not cancelling(row[degree], most):
            degree += 1
        kept.append(row[:degree])
    return kept


def cancelling(weights: np.ndarray, most: float) -> bool:
    """Whether sum |w| is above `most` times |sum w|.

    |sum w| is the length of the step in rho, whatever the degree; sum |w| is what becomes of the errors of a model.
    """
    return bool(np.abs(weights).sum() > most * abs(weights.sum()))


def _lagrange(nodes: np.ndarray, j: int, x: np.ndarray) -> np.ndarray:
    """The polynomial that is 1 at nodes[j] and 0 at the other nodes."""
    value = np.ones_like(x)
    for m, node in enumerate(nodes):
        if m != j:
            value = value * (x - node) / (nodes[j] - node)
    return value


def _t_weights(schedule: Schedule, nodes: np.ndarray, step: Step) -> np.ndarray:
    return np.array([integrate(schedule, partial(_lagrange, nodes, j), *step) for j in range(len(nodes))])


def _plain_weights(nodes: np.ndarray, step: Step) -> np.ndarray:
    x, w = np.polynomial.legendre.leggauss(4)  # exact to degree 7
    at, half = (step[1] + step[0]) / 2 + (step[1] - step[0]) / 2 * x, (step[1] - step[0]) / 2
    return np.array([(_lagrange(nodes, j, at) * w).sum() * half for j in range(len(nodes))])


def _log_rho_weights(nodes: np.ndarray, step: Step) -> np.ndarray:
    """In u = log(rho / start): the integral of u^k drho is rho sum_m (-1)^(k-m) k!/m! u^m, and 0 at rho = 0."""
    start, end = step
    if len(nodes) == 1:
        return np.array([end - start])
    u = np.log(nodes / start)

    def power(k: int, rho: float) -> float:
        if rho == 0:
            return 0.0
        x = np.log(rho / start)
        return rho * sum((-1) ** (k - m) * factorial(k) / factorial(m) * x**m for m in range(k + 1))

    weights = []
    for j in range(len(nodes)):
        others = np.delete(u, j)
        polynomial = np.poly(others) / np.prod(u[j] - others)  # highest power first
        weights.append(sum(c * (power(k, end) - power(k, start)) for k, c in enumerate(polynomial[::-1])))
    return np.array(weights)
