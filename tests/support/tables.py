"""Small tables of costs with drawn entries."""

import numpy as np

from ptq4dm.budgets.table import KEEP, Table


def drawn_table(layers=8, formats=3, seed=0, ties=()):
    """A table whose formats are quicker, smaller and worse the higher their number, with entries that are drawn."""
    draw = np.random.default_rng(seed)
    falling = np.linspace(1, 0.3, formats)
    times = draw.uniform(5, 50, (layers, 1)) * falling * draw.uniform(0.8, 1.2, (layers, formats))
    sizes = np.round(draw.uniform(100, 900, (layers, 1)) * falling)
    errors = np.sort(draw.uniform(0, 1e-3, (layers, formats)) ** 2, axis=1)
    errors[:, 0] = 0
    widths = np.array([32, 8, 4, 3][:formats])
    words = ["float", "int8 per token", "int8 per token", "int4"][:formats]
    outside = 20.0
    return Table(
        [f"layer{k}" for k in range(layers)], [KEEP, "w8", "w4", "w3"][:formats], times, 0.01 * times, sizes, errors,
        np.ones((layers, formats), bool), np.broadcast_to(widths, (layers, formats)), [words] * layers,
        [list(group) for group in ties], outside + times[:, 0].sum(), outside, sizes[:, 0].sum() + 50, 50, "here",
    )  # fmt: skip
