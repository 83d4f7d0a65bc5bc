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
from functools import partial
from math import factorial

import numpy as np

from .paths import EDM, Schedule
from .schedule import integrate

Weights = Callable[[np.ndarray, tuple[float, float]], np.ndarray]
MULTISTEP = ("t_ab", "rho_ab", "ipndm", "log_rho")

# Newest evaluation first.
ADAMS_BASHFORTH = (
    np.array([1.0]),
    np.array([3, -1]) / 2,
    np.array([23, -16, 5]) / 12,
    np.array([55, -59, 37, -9]) / 24,
)

# Explicit Runge-Kutta methods by (nodes c, rows of A, weights b).
RUNGE_KUTTA = {
    "1euler": ((0,), ((),), (1,)),
    "2heun": ((0, 1), ((), (1,)), (1 / 2, 1 / 2)),
    "3kutta": ((0, 1 / 2, 1), ((), (1 / 2,), (-1, 2)), (1 / 6, 2 / 3, 1 / 6)),
    "3heun": ((0, 1 / 3, 2 / 3), ((), (1 / 3,), (0, 2 / 3)), (1 / 4, 0, 3 / 4)),
    "3ral": ((0, 1 / 2, 3 / 4), ((), (1 / 2,), (0, 3 / 4)), (2 / 9, 1 / 3, 4 / 9)),
    "4rk": ((0, 1 / 2, 1 / 2, 1), ((), (1 / 2,), (0, 1 / 2), (0, 0, 1)), (1 / 6, 1 / 3, 1 / 3, 1 / 6)),
}


def multistep_weights(
    solver: str, schedule: Schedule, times: np.ndarray, rho_end: float, order: int
) -> list[list[np.ndarray]]:
    """For step i and each history length k + 1 (k = 0 .. min(i, order)): float64 [k + 1] weights, newest first.

    Args:
        times: decreasing times, one per evaluation, float64 [n].
        rho_end: the rho that the last step reaches.
    """
    rho = np.append(schedule.rho(times), rho_end)
    if solver == "log_rho" or (solver == "t_ab" and isinstance(schedule, EDM)):  # there t is log(rho) / 4
        return log_rho_weights(rho, order)
    if solver in ("ipndm", "rho_ab"):
        return plain_weights(rho, order, even=solver == "ipndm")
    return _table(times, rho, order, partial(_t_weights, schedule))


def log_rho_weights(rho: np.ndarray, order: int) -> list[list[np.ndarray]]:
    """The table of `multistep_weights` for "log_rho", from rho at the evaluations and at the end, float64 [n + 1]."""
    return _table(rho[:-1], rho, order, _finite(_log_rho_weights))


def plain_weights(levels: np.ndarray, order: int, even: bool) -> list[list[np.ndarray]]:
    """Adams and Bashforth's weights in the levels themselves, float64 [n + 1]: at the evaluations, and at the end.

    even: those of even steps, whatever the levels.
    """
    weights = _even_weights if even else _finite(_rho_weights)
    return _table(levels[:-1], levels, order, weights)


def _table(nodes: np.ndarray, levels: np.ndarray, order: int, weights: Weights) -> list[list[np.ndarray]]:
    """weights(the last k + 1 nodes, newest first; start and end of step i) for all steps and history lengths."""
    steps = [(float(start), float(end)) for start, end in zip(levels[:-1], levels[1:], strict=True)]
    return [
        [
            weights(nodes[i - k : i + 1][::-1], step) if k else np.array([step[1] - step[0]])
            for k in range(min(i, order) + 1)
        ]
        for i, step in enumerate(steps)
    ]


def _finite(weights: Weights) -> Weights:
    """The same weights, with those of nodes at infinity, which are 0."""

    def limit(nodes: np.ndarray, step: tuple[float, float]) -> np.ndarray:
        near = np.isfinite(nodes)  # the newest ones
        return np.append(weights(nodes[near], step), np.zeros(len(nodes) - near.sum()))

    return limit


def steady(table: list[list[np.ndarray]], most: float) -> list[list[np.ndarray]]:
    """The table without degrees whose weights cancel: sum |w| above `most` times |sum w|, and all degrees above.

    |sum w| is the length of the step in rho, whatever the degree; sum |w| is what becomes of the errors of a model.
    """
    kept = []
    for row in table:
        degree = 1
        while degree < len(row) and np.abs(row[degree]).sum() <= most * abs(row[degree].sum()):
            degree += 1
        kept.append(row[:degree])
    return kept


def _even_weights(nodes: np.ndarray, step: tuple[float, float]) -> np.ndarray:
    return ADAMS_BASHFORTH[len(nodes) - 1] * (step[1] - step[0])


def _lagrange(nodes: np.ndarray, j: int, x: np.ndarray) -> np.ndarray:
    """The polynomial that is 1 at nodes[j] and 0 at the other nodes."""
    value = np.ones_like(x)
    for m, node in enumerate(nodes):
        if m != j:
            value = value * (x - node) / (nodes[j] - node)
    return value


def _t_weights(schedule: Schedule, nodes: np.ndarray, step: tuple[float, float]) -> np.ndarray:
    return np.array([integrate(schedule, partial(_lagrange, nodes, j), *step) for j in range(len(nodes))])


def _rho_weights(nodes: np.ndarray, step: tuple[float, float]) -> np.ndarray:
    x, w = np.polynomial.legendre.leggauss(4)  # exact to degree 7
    rho, half = (step[1] + step[0]) / 2 + (step[1] - step[0]) / 2 * x, (step[1] - step[0]) / 2
    return np.array([(_lagrange(nodes, j, rho) * w).sum() * half for j in range(len(nodes))])


def _log_rho_weights(nodes: np.ndarray, step: tuple[float, float]) -> np.ndarray:
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
