"""What the exact choice is held against: a greedy one, random ones, all where there are few, and dealt-out errors."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import product

import numpy as np

from .table import KEEP, Table


def every(table: Table) -> Iterator[np.ndarray]:
    """All picks of a small table."""
    for picks in product(*(np.flatnonzero(row) for row in table.allowed)):
        yield np.array(picks)


def greedy(table: Table, latency: float | None = None, size: float | None = None) -> np.ndarray | None:
    """From full precision on, the move that saves the most of what is too much for the error that it adds; until the
    budgets are kept. None where it gets stuck."""
    picks = table.uniform(KEEP)
    while (over := excess(table, picks, latency, size)) > 0:
        best, value = None, 0.0
        for moved in _moves(table, picks):
            saved = over - excess(table, moved, latency, size)
            added = max(table.error(moved) - table.error(picks), 1e-30)
            if saved > 0 and saved / added > value:
                best, value = moved, saved / added
        if best is None:
            return None
        picks = best
    return picks


def random_choices(
    table: Table, count: int, seed: int, latency: float | None = None, size: float | None = None
) -> list[np.ndarray]:
    """Random picks within the budgets that use them up: formats are drawn, then drawn moves are made that bring them
    within the budgets, then drawn moves that lower the error and stay there, as long as there are any."""
    draw = np.random.default_rng(seed)
    found: list[np.ndarray] = []
    for _ in range(20 * count):
        if len(found) == count:
            break
        picks = table.uniform(KEEP)
        for group in _groups(table):
            picks = _drawn(table, picks, group, draw)
        while (over := excess(table, picks, latency, size)) > 0:
            better = [one for one in _moves(table, picks) if excess(table, one, latency, size) < over]
            if not better:
                break
            picks = better[draw.integers(len(better))]
        if excess(table, picks, latency, size) > 0:
            continue
        found.append(_used_up(table, picks, draw, latency, size))
    return found


def dealt_out(table: Table, seed: int) -> Table:
    """The table with the errors of layers dealt out anew: a choice by it knows their sizes, not whose they are."""
    order = np.random.default_rng(seed).permutation(len(table.layers))
    return replace(table, errors=table.errors[order])


def excess(table: Table, picks: np.ndarray, latency: float | None, size: float | None) -> float:
    """By how much picks are over the budgets, in shares of these."""
    over = 0.0 if latency is None else max(0.0, table.latency(picks) / latency - 1)
    return over + (0.0 if size is None else max(0.0, table.size(picks) / size - 1))


def _groups(table: Table) -> list[list[int]]:
    """Layers that are moved together: tied ones, and each other by itself."""
    tied = {layer for group in table.ties for layer in group}
    return [*table.ties, *([layer] for layer in range(len(table.layers)) if layer not in tied)]


def _moves(table: Table, picks: np.ndarray) -> Iterator[np.ndarray]:
    """Picks with one group in another format."""
    for group in _groups(table):
        for label in range(len(table.labels)):
            if table.allowed[group, label].all() and (picks[group] != label).any():
                moved = picks.copy()
                moved[group] = label
                if table.fits(moved, None, None):
                    yield moved


def _drawn(table: Table, picks: np.ndarray, group: list[int], draw: np.random.Generator) -> np.ndarray:
    labels = np.flatnonzero(table.allowed[group].all(0))
    picks = picks.copy()
    picks[group] = draw.choice(labels)
    return picks


def _used_up(
    table: Table, picks: np.ndarray, draw: np.random.Generator, latency: float | None, size: float | None
) -> np.ndarray:
    while True:
        error = table.error(picks)
        better = [
            one for one in _moves(table, picks)
            if table.error(one) < error and excess(table, one, latency, size) == 0
        ]  # fmt: skip
        if not better:
            return picks
        picks = better[draw.integers(len(better))]
