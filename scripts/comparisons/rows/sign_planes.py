"""Rows of LUT-GEMM."""

from __future__ import annotations

import itertools
from functools import partial

import controls_steps

from ptq4dm import LUTGEMMConfig
from rows.row import Row


def sign_planes() -> list[Row]:
    """LUT-GEMM, of the layers that are fed embeddings alone: planes, what they are without the fits, and
    uniform grids of as many bits a weight and more, in the same layers and kernels; then both by group size."""
    rows: list[Row] = []
    beside = {2: (128, 32), 3: (128, 64), 4: (128,)}
    known = {(bits, size) for bits, sizes in beside.items() for size in sizes}
    for bits, others in beside.items():
        name, recipe = f"LUT-GEMM q{bits} g128", partial(LUTGEMMConfig, bits=bits)
        fitted, even = (partial(recipe, planes=planes, refits=0) for planes in ("fitted", "uniform"))
        near = partial(fitted, rounding="nearest")
        rows += [
            *(
                Row(f"{name}, uniform g{size}{mark}", "baseline", partial(even, group_size=size, **more), name)
                for mark, more in (("", {}), (", nearest", {"rounding": "nearest"}))
                for size in others
            ),
            Row(name, "method", recipe),
            Row(f"{name}, not refitted", "ablation", fitted, name),
            Row(f"{name}, refitted from fitted", "ablation", partial(recipe, planes="fitted"), name),
            Row(f"{name}, 32 tuples", "ablation", partial(recipe, num_tuples=32), name),
            Row(f"{name}, nearest", "ablation", near, name),
            Row(f"{name}, nearest, greedy", "ablation", partial(near, rounds=0), name),
            Row(f"{name}, nearest, plain least squares", "ablation", partial(near, emphasis=0.0), name),
            Row(f"{name}, nearest, scales shuffled", "shuffled", near, name, packed=controls_steps.shuffle_scales),
        ]
    curve = []
    for bits, size in itertools.product((1, 2, 3, 4), (32, 64, 128, None)):
        name, recipe = f"LUT-GEMM q{bits} {f'g{size}' if size else 'row'}", partial(LUTGEMMConfig, bits=bits)
        if bits == 1 or size != 128:
            curve.append(Row(name, "ablation", partial(recipe, group_size=size), "LUT-GEMM q2 g128"))
        if bits > 1 and (bits, size) not in known:
            even = partial(recipe, group_size=size, planes="uniform", refits=0)
            curve.append(Row(f"{name}, uniform", "baseline", even, "LUT-GEMM q2 g128"))
    return [*rows, *curve]
