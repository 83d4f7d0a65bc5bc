"""The Pareto front of a small table against all choices there are."""

import numpy as np
import pytest

from ptq4dm.budgets.exact import allocate
from ptq4dm.budgets.front import front, plot
from ptq4dm.budgets.references import every
from tables import drawn_table


def test_the_front_goes_from_the_least_to_full_precision_and_nothing_beats_it():
    table = drawn_table(layers=7, seed=8, ties=[(0, 1)])
    found, all_there_are = front(table, 9), [p for p in every(table) if table.fits(p, None, None)]
    for kind, share in {"bytes": table.size, "latency": table.latency}.items():
        line = found[kind]
        assert 4 < len(line) <= 9
        assert getattr(line[0], kind) == pytest.approx(min(map(share, all_there_are)), rel=1e-5)
        assert line[-1].error == 0 and not line[-1].picks.any()
        assert np.all(np.diff([one.error for one in line]) < 0) and np.all(
            np.diff([getattr(one, kind) for one in line]) > 0
        )
        for one in line:
            no_more = [table.error(picks) for picks in all_there_are if share(picks) <= getattr(one, kind)]
            assert one.error == pytest.approx(min(no_more), rel=1e-9)


def test_the_front_is_drawn(tmp_path):
    table = drawn_table(layers=5)
    plot(table, front(table, 4), allocate(table, None, 0.6), "a model", tmp_path / "front.png")
    assert (tmp_path / "front.png").read_bytes().startswith(b"\x89PNG")
