"""The grid that follows a teacher in few evaluations, by dynamic programming over the teacher's own times.

A step from time c to time n, after evaluations at p and q, reaches

    a x_c + w_0 y_c + w_1 y_p + w_2 y_q

with y the model's outputs. Its local error is what is left of the teacher's x_n when a and w are the best, by least
squares over all trajectories: it follows from the inner products of the x and y alone, so no model is run here. The
grid of n evaluations has the least sum of local errors, each weighed by how much of it is left at the end. Grids by
dynamic programming over local errors of Euler steps: Chen et al., arXiv:2405.11326 (GITS); here the steps are
multistep ones, and a state is the last two times.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from .trajectories import Trajectories

JITTER = 1e-3  # the share of an output that is taken for its error, when weights are chosen: it keeps them small


@dataclass
class Inner:
    """Mean products [2 T + 1, 2 T + 1] of x_0 .. x_T, then y_0 .. y_(T-1), in float64; T evaluations of the teacher.

    left [T + 1]: how much of an error at a time is left at the end, see `contraction`.
    """

    products: np.ndarray
    left: np.ndarray

    @property
    def evaluations(self) -> int:
        return len(self.left) - 1


def inner_products(teacher: Trajectories) -> Inner:
    """The products of a teacher's states and outputs, averaged over trajectories and elements."""
    rows = [teacher.states, teacher.outputs]
    total = torch.zeros(sum(map(len, rows)), sum(map(len, rows)), dtype=torch.float64)
    for k in range(teacher.states.shape[1]):
        some = torch.cat([part[:, k] for part in rows]).double()
        total += (some @ some.T).cpu() / some.shape[1]
    products = (total / teacher.states.shape[1]).numpy()
    return Inner(products, contraction(products[0, : len(teacher.states)] / products[0, 0]))


def contraction(noise: np.ndarray, deviation: float = 0.3) -> np.ndarray:
    """The share of an error that is left at the end, for errors at times with so much noise [T + 1].

    That of Gaussian data of this deviation s, whose states deviate by sqrt(s^2 (1 - noise^2) + noise^2): the flow
    keeps errors in proportion to it.
    """
    noise = np.clip(noise, 0, 1)
    return deviation / np.sqrt(deviation**2 * (1 - noise**2) + noise**2)


def local_errors(inner: Inner, places: np.ndarray) -> np.ndarray:
    """Root mean square error [S, T + 1] of a step to each time, where it begins at places[:, 0] [S, H].

    places: evaluations, the newest first; all rows of one length.
    """
    size, count = inner.evaluations + 1, places.shape[1]
    basis = np.concatenate([places[:, :1], places + size], axis=1)  # x_c, y_c, y_p, ...
    gram = inner.products[basis[:, :, None], basis[:, None, :]]  # [S, H + 1, H + 1]
    diagonal = np.arange(1, count + 1)
    gram[:, diagonal, diagonal] *= 1 + JITTER**2
    right = inner.products[basis[:, :, None], np.arange(size)]  # [S, H + 1, T + 1]
    weights = np.linalg.solve(gram, right)
    squares = np.diag(inner.products)[:size] - (right * weights).sum(1)
    return np.sqrt(np.maximum(squares, 0))


def best_grid(inner: Inner, evaluations: int, history: int, sensitivity: float, power: float) -> list[int]:
    """Places [evaluations + 1] in the teacher's times, from 0 to T, whose weighed local errors have the least sum.

    Args:
        history: outputs that a step weighs, 1 to 4: its own and those before it. The third and fourth are those of
            the best way to the two before.
        sensitivity: exponent of `contraction` in an error's weight; 0: all count alike.
        power: of the errors, before they are summed.
    """
    size = inner.evaluations + 1
    factor = inner.left**sensitivity
    # cost[p, c]: the least sum for a way whose last two evaluations are p and c; way[p, c]: its places, newest first.
    first = (local_errors(inner, np.array([[0]]))[0] * factor) ** power
    ways = {(0, c): ([c, 0], first[c]) for c in range(1, size)}
    for step in range(1, evaluations):
        last = step + 1 == evaluations
        keys = [key for key in ways if key[1] < size - 1]
        places = np.array([ways[key][0][:history] for key in keys])
        errors = (local_errors(inner, places) * factor) ** power
        before = np.array([ways[key][1] for key in keys])
        news = np.array([c for _, c in keys])
        total = before[:, None] + errors
        total[np.arange(size)[None, :] <= news[:, None]] = np.inf
        following: dict[tuple[int, int], tuple[list[int], float]] = {}
        for c in np.unique(news):
            mine = np.flatnonzero(news == c)
            chosen = mine[total[mine].argmin(0)]
            for n in [size - 1] if last else range(int(c) + 1, size):
                if np.isfinite(total[chosen[n], n]):
                    following[(int(c), n)] = ([n, *ways[keys[chosen[n]]][0]], total[chosen[n], n])
        ways = following
    found = [way for (_, c), way in ways.items() if c == size - 1]
    places, _ = min(found, key=lambda way: way[1])
    return places[::-1]
