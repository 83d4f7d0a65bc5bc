"""The choice of formats as an integer program, solved to the end: "On-Chip Hardware-Aware Quantization", Huang et
al., arXiv:2309.01945.

    least  sum_lf c_lf x_lf      x_lf in {0, 1}: layer l has format f
    with   sum_f x_lf = 1                                           for each layer
           outside + sum_lf time_lf x_lf  <=  latency * step
           rest + sum_lf bytes_lf x_lf    <=  bytes * total
           sum_f in a x_kf = sum_f in a x_lf                        for layers k, l that share an input, and each
                                                                    activation format a

The paper's abstract alone was at hand. It joins accuracy and efficiency in one objective; whether it has budgets is
not known. Here c is the predicted error under budgets, and `efficiency` times the shares of time and bytes is added
to it for the joint objective (our assumption).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, OptimizeResult, milp
from scipy.sparse import coo_array, csr_array, vstack

from ..errors import UserError
from .hushed import hushed
from .table import KEEP, Table

SCALE = 1e4  # of the objective: the solver's absolute gap, 1e-6, is then a part in 10^10 of the largest error
OPTIMAL, INFEASIBLE = 0, 2  # scipy's numbers
WORTH_TELLING = 0.01  # of a step: less is within what timing scatters


@dataclass
class Allocation:
    """A choice of formats, and what is predicted of it.

    picks: [L] numbers of formats. latency, bytes: shares of the model in full precision. error: relative.
    notes: sentences on what the budgets did.
    """

    picks: np.ndarray
    latency: float
    bytes: float
    error: float
    notes: list[str]

    def choices(self, table: Table) -> dict[str, str]:
        """Layer -> label."""
        return {name: table.labels[pick] for name, pick in zip(table.layers, self.picks, strict=True)}


def allocate(
    table: Table, latency: float | None = None, size: float | None = None, efficiency: float = 0.0
) -> Allocation:
    """The choice of least objective within the budgets, by an exact solver.

    latency, size: shares of the full-precision model; None for no budget.

    Raises UserError where no choice is within the budgets (it tells the least that there is), or the solver does not
    prove its answer optimal.
    """
    picks = _least(table, _objective(table, efficiency), latency, size)
    if picks is None:
        raise UserError(_refusal(table, latency, size))
    return told(table, picks)


def least(table: Table, costs: np.ndarray) -> np.ndarray:
    """The picks of least costs [L, F] without any budget; layers that share an input are still tied."""
    picks = _least(table, np.where(table.allowed, costs, 0), None, None)
    return table.uniform(KEEP) if picks is None else picks  # full precision everywhere is always a choice


def told(table: Table, picks: np.ndarray) -> Allocation:
    """Picks with what is predicted of them."""
    notes, here = [], table.device or "this device"
    rest = "of a step at most; it is a budget of bytes that asks for them."
    if table.eight_bits_fastest:
        notes.append(f"8 bits are the fastest on {here}: fewer save {table.narrow_gain:.1%} {rest}")
    if table.full_precision_fastest:
        slower = f"No format in all layers is faster than full precision on {here}"
        notes.append(f"{slower}: mixed, they save {table.gain:.1%} {rest}")
    if (share := table.latency(picks)) > 1 + WORTH_TELLING:
        notes.append(f"This choice takes {share:.2f} of full precision's step on {here}: it saves bytes, not time.")
    return Allocation(picks, table.latency(picks), table.size(picks), table.error(picks), notes)


def _objective(table: Table, efficiency: float) -> np.ndarray:
    """c [L, F]. With `efficiency`, both terms as shares: of the error with the worst format everywhere, and of the
    full-precision model's time and bytes, half each."""
    errors = np.where(table.allowed, table.errors, 0)
    if not efficiency:
        return errors
    worst = errors.max(1).sum() or 1.0
    costs = np.where(table.allowed, table.times / table.step + table.bytes / table.total, 0) / 2
    return errors / worst + efficiency * costs


def _least(table: Table, objective: np.ndarray, latency: float | None, size: float | None) -> np.ndarray | None:
    """The picks of least objective, proven; None where none are within the budgets."""
    found = _solve(table, objective, latency, size)
    if found.status == INFEASIBLE:
        return None
    if found.status != OPTIMAL or found.x is None:
        raise UserError(f"the solver gave no optimal choice of formats ({str(found.message).strip()}).")
    picks = found.x.reshape(table.allowed.shape).argmax(1)
    if not table.fits(picks, latency, size, slack=1e-5):
        raise UserError("the solver's choice of formats is not within the budgets; change them a little.")
    return picks


def _solve(table: Table, objective: np.ndarray, latency: float | None, size: float | None) -> OptimizeResult:
    layers, labels = table.allowed.shape
    count = layers * labels
    one = coo_array((np.ones(count), (np.repeat(np.arange(layers), labels), np.arange(count))), (layers, count))
    rows, low, high = [csr_array(one)], [np.ones(layers)], [np.ones(layers)]
    for costs, fixed, budget in (
        (table.times, table.outside, None if latency is None else latency * table.step),
        (table.bytes, table.rest, None if size is None else size * table.total),
    ):
        if budget is not None:  # as shares of it, so that the solver's tolerance is one of a share
            values = np.where(table.allowed, costs, 0).reshape(1, -1) / budget
            rows.append(csr_array(values))
            low.append(np.array([-np.inf]))
            high.append(np.array([1 - fixed / budget]))
    for row in _tied(table):
        rows.append(csr_array(row.reshape(1, -1)))
        low.append(np.zeros(1))
        high.append(np.zeros(1))
    constraint = LinearConstraint(vstack(rows), np.concatenate(low), np.concatenate(high))
    largest = np.abs(objective).max() or 1.0
    with hushed(b"Highs"):
        return milp(
            objective.reshape(-1) / largest * SCALE,
            integrality=np.ones(count),
            bounds=Bounds(0, table.allowed.reshape(-1).astype(float)),
            constraints=constraint,
            options={"mip_rel_gap": 0.0},
        )


def _tied(table: Table) -> list[np.ndarray]:
    """Rows [L * F] that are zero where layers that share an input have one activation format."""
    found = []
    for group in table.ties:
        words = sorted({table.activations[layer][f] for layer in group for f in np.flatnonzero(table.allowed[layer])})
        for first, second in zip(group, group[1:], strict=False):
            for word in words:
                row = np.zeros(table.allowed.shape)
                for layer, sign in ((first, 1.0), (second, -1.0)):
                    has = [here == word for here in table.activations[layer]]
                    row[layer, table.allowed[layer] & has] = sign
                found.append(row.reshape(-1))
    return found


def out_of_reach(asked: str, least: str) -> str:
    """What to say of budgets that nothing is within, without a full stop."""
    return f"no choice of formats is within {asked} of the full-precision model; the least is {least}"


def _refusal(table: Table, latency: float | None, size: float | None) -> str:
    """What to say of budgets that nothing is within: the least of each, alone and beside the other."""
    known: dict[str, float] = {}
    asked = []
    if latency is not None:
        asked.append(f"latency {latency:g}")
        known["latency"] = table.latency(least(table, table.times))
    if size is not None:
        asked.append(f"bytes {size:g}")
        known["bytes"] = table.size(least(table, table.bytes))
    reach = ", ".join(f"{name} {share:.4f}" for name, share in known.items())
    text = out_of_reach(" and ".join(asked), reach)
    if latency is not None and size is not None:
        picks = _least(table, np.where(table.allowed, table.times, 0), None, size)
        if picks is not None:
            text += f", and within these bytes latency {table.latency(picks):.4f}"
    return f"{text}."
