"""The exact choice of formats against all choices there are; budgets, ties and refusals."""

import re
from dataclasses import replace

import numpy as np
import pytest

from ptq4dm import UserError
from ptq4dm.budgets import exact
from ptq4dm.budgets.exact import allocate
from ptq4dm.budgets.references import dealt_out, every, excess, greedy, random_choices
from tables import drawn_table

BUDGETS = [(None, 0.6), (0.7, None), (0.75, 0.7), (0.62, 0.55)]


def best_of_all(table, latency, size):
    """The least error of all choices within the budgets, told without the code under test."""
    rows, best = np.arange(len(table.layers)), np.inf
    for picks in every(table):
        time = table.outside + table.times[rows, picks].sum()
        stored = table.rest + table.bytes[rows, picks].sum()
        tied = all(len({table.activations[layer][picks[layer]] for layer in group}) == 1 for group in table.ties)
        within = (latency is None or time <= latency * table.step) and (size is None or stored <= size * table.total)
        if tied and within:
            best = min(best, table.errors[rows, picks].sum())
    return best


@pytest.mark.parametrize("latency, size", BUDGETS)
@pytest.mark.parametrize("seed", range(3))
def test_three_formats_of_eight_layers_are_chosen_as_by_trying_all(latency, size, seed):
    table = drawn_table(seed=seed, ties=[(1, 2, 5)])
    found = allocate(table, latency, size)
    assert found.error == pytest.approx(best_of_all(table, latency, size), rel=1e-9)
    assert table.fits(found.picks, latency, size)
    assert (found.latency, found.bytes) == (table.latency(found.picks), table.size(found.picks))


def test_layers_that_share_an_input_take_one_activation_format():
    ties = [(0, 1, 2), (4, 6)]
    free, tied = (drawn_table(formats=4, seed=3, ties=one) for one in ((), ties))
    words = [[tied.activations[k][allocate(t, 0.6, None).picks[k]] for k in range(8)] for t in (free, tied)]
    assert all(len({words[1][k] for k in group}) == 1 for group in ties)
    assert any(len({words[0][k] for k in group}) > 1 for group in ties)  # else nothing was tied


def test_two_weight_formats_under_one_activation_format_may_differ_in_a_tie():
    table = drawn_table(seed=1, ties=[tuple(range(8))])
    picks = allocate(table, None, 0.5).picks
    assert set(picks) == {1, 2}


def test_a_format_that_a_layer_cannot_have_is_not_given():
    table = drawn_table(seed=2)
    table.allowed[3, 1:] = False
    assert allocate(table, None, 0.6).picks[3] == 0


def test_greedy_and_random_choices_are_within_the_budgets_and_not_better():
    for seed in range(4):
        table = drawn_table(layers=12, seed=seed, ties=[(2, 3)])
        least = allocate(table, 0.7, 0.6).error
        others = [greedy(table, 0.7, 0.6), *random_choices(table, 20, seed, 0.7, 0.6)]
        assert len(others) == 21
        for picks in others:
            assert excess(table, picks, 0.7, 0.6) == 0 and table.fits(picks, 0.7, 0.6)
            assert least <= table.error(picks) * (1 + 1e-9)
        spread = [table.error(picks) for picks in others[1:]]
        assert max(spread) > min(spread)


def test_random_choices_leave_no_room_that_a_move_could_use():
    table = drawn_table(seed=5)
    for picks in random_choices(table, 10, 0, None, 0.6):
        for layer in range(8):
            for label in range(3):
                moved = picks.copy()
                moved[layer] = label
                assert table.error(moved) >= table.error(picks) or excess(table, moved, None, 0.6) > 0


def test_budgets_that_nothing_keeps_are_refused_with_the_least_there_is():
    table = drawn_table()
    least = table.size(np.full(8, 2))
    with pytest.raises(UserError, match="no choice of formats is within bytes 0.1 .* the least is bytes") as told:
        allocate(table, None, 0.1)
    assert float(re.search(r"bytes (0\.\d+)\.$", str(told.value)).group(1)) == pytest.approx(least, abs=1e-4)
    with pytest.raises(UserError, match=r"the least is latency 0\.\d+, bytes 0\.\d+\."):
        allocate(table, 0.01, 0.01)
    with pytest.raises(UserError, match=r"within these bytes latency 0\.\d+\."):
        allocate(table, 0.01, 0.9)


def test_an_answer_that_is_not_proven_optimal_is_refused(monkeypatch):
    real = exact._solve

    def stopped(*args):
        found = real(*args)
        found.status, found.message = 1, "time limit reached"
        return found

    monkeypatch.setattr(exact, "_solve", stopped)
    with pytest.raises(UserError, match="no optimal choice of formats .time limit reached"):
        allocate(drawn_table(), None, 0.6)


def test_the_joint_objective_trades_error_for_time_and_bytes():
    table = drawn_table(seed=4)
    found = [allocate(table, None, None, efficiency) for efficiency in (0.0, 1.5, 100.0)]
    assert not found[0].picks.any()
    assert found[0].error < found[1].error <= found[2].error
    assert found[0].bytes > found[1].bytes >= found[2].bytes
    rows, costs = np.arange(8), (table.times / table.step + table.bytes / table.total) / 2
    worst = table.errors.max(1).sum()
    values = {tuple(p): table.errors[rows, p].sum() / worst + 1.5 * costs[rows, p].sum() for p in every(table)}
    assert values[tuple(found[1].picks)] == pytest.approx(min(values.values()), rel=1e-9)


def test_where_8_bits_are_the_fastest_that_is_said_and_4_come_of_bytes_alone():
    table = drawn_table(seed=6)
    table.times[:, 2] = table.times[:, 1] + 0.1
    by_time, by_bytes = allocate(table, 0.8, None), allocate(table, None, 0.5)
    assert set(by_time.picks) <= {0, 1} and 2 in by_bytes.picks
    assert "8 bits are the fastest on here: fewer save 0.0% of a step" in by_time.notes[0]
    table.times[0, 2] = table.times[0, 1] - 0.009 * table.step  # a difference that is next to none
    assert table.eight_bits_fastest is True and table.narrow_gain == pytest.approx(0.009)
    table.times[1, 2] = table.times[1, 1] - 0.009 * table.step
    assert not table.eight_bits_fastest and not allocate(table, 0.8, None).notes


def test_where_no_format_in_all_layers_is_faster_that_is_said_and_8_bits_are_not_called_the_fastest():
    """Even if they are in one layer, and fewer bits in none."""
    table = drawn_table(seed=6)
    table.times[:, 1:] = table.times[:, :1] + 0.05 * table.step
    table.times[0, 1] = table.times[0, 0] - 0.02 * table.step
    notes = allocate(table, None, 0.5).notes
    assert not table.eight_bits_fastest and len(notes) == 2
    assert notes[1].startswith("This choice takes 1.") and "it saves bytes, not time" in notes[1]
    assert "No format in all layers is faster than full precision on here: mixed, they save 2.0% of" in notes[0]
    table.times[:, 2] = table.times[:, 0] - 0.01 * table.step
    assert not table.full_precision_fastest
    assert all("No format" not in note for note in allocate(table, None, 0.5).notes)


def test_times_and_errors_of_other_layers_give_another_choice():
    """Else what was measured decides nothing."""
    table = drawn_table(layers=12, seed=9)
    picks = allocate(table, 0.6, None).picks
    order = np.random.default_rng(0).permutation(12)
    times = replace(table, times=table.times[order])
    times.outside, times.step = table.outside, table.outside + times.times[:, 0].sum()
    assert (allocate(times, 0.6, None).picks != picks).any()
    other = allocate(dealt_out(table, 0), 0.6, None).picks
    assert (other != picks).any() and table.error(other) > table.error(picks)


def test_errors_that_are_no_numbers_are_refused():
    table = drawn_table()
    table.errors[1, 1] = np.nan
    with pytest.raises(UserError, match="a layer's errors are no finite numbers"):
        type(table)(**vars(table))
