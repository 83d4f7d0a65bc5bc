"""Updates of flow-matching models, x = (1 - s) x_0 + s n, in forms that are finite at pure noise (s = 1, alpha = 0).

In velocity (dx / ds = v, the model's own output) a solver's weights W_j in ds need nothing else:

    x' = x + sum_j W_j v_j

In noise, as on every other path, the exponential integrator has weights w_j in drho, rho = s / (1 - s):

    x' = alpha' (x / alpha + sum_j w_j epsilon_j)

where x / alpha and w_0 grow without bound as s goes to 1. All polynomials through the same nodes give a constant the
same integral, so sum_j w_j = rho' - rho. With c = sum_{j > 0} w_j, which is finite, epsilon_0 = x + alpha v_0, and
alpha' (1 / alpha + rho' - rho) = 1 (for alpha + s = 1), that is

    x' = x + (s' - s) v_0 - alpha' c epsilon_0 + alpha' sum_{j > 0} w_j epsilon_j

It holds at s = 1 too. Without history (c = 0) both are Euler's step of the flow, which is DDIM's.
"""

from __future__ import annotations

import numpy as np

from .evaluations import Evaluation


def velocity_row(at: float, start: float, end: float, starts: bool, weights: list[np.ndarray]) -> Evaluation:
    """From weights in ds, of velocities; `at`, `start` and `end` are levels s."""
    return Evaluation(1 - float(at), float(at), starts, 1.0, tuple(tuple(map(float, some)) for some in weights))


def noise_row(at: float, start: float, end: float, starts: bool, weights: list[np.ndarray]) -> Evaluation:
    """From weights in drho, of epsilon: weights of v_0, epsilon_0, epsilon_1, ...; `start` and `end` are levels s."""
    alpha, rows = 1 - end, []
    for some in weights:
        past = [float(alpha * w) for w in some[1:]]
        rows.append((float(end - start), -sum(past), *past))
    return Evaluation(1 - float(at), float(at), starts, 1.0, tuple(rows), said=2)
