"""Rows of LUT-GEMM."""

from __future__ import annotations

from functools import partial

import controls_steps

from ptq4dm import LUTGEMMConfig
from rows.row import Row


def sign_planes() -> list[Row]:
    """LUT-GEMM, of the layers that are fed embeddings alone: planes, what they are without the fits, and
    uniform grids of as many bits a weight and more, in the same layers and kernels; then planes by group size."""
    rows = []
    for bits, others in ((2, (128, 32)), (3, (128, 64)), (4, (128,))):
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
    curve = [(bits, size) for bits in (1, 2, 3, 4) for size in (32, 64, 128, None) if bits == 1 or size != 128]
    return [
        *rows,
        *(
            Row(f"LUT-GEMM q{bits} {f'g{size}' if size else 'row'}", "ablation",
                partial(LUTGEMMConfig, bits=bits, group_size=size), "LUT-GEMM q2 g128")
            for bits, size in curve
        ),
    ]  # fmt: skip
