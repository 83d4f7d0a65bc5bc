"""Rows of codebooks: 16 fitted levels against uniform ones in the same bytes, alone and under rotated inputs."""

from __future__ import annotations

import copy
from functools import partial

import controls_steps

from ptq4dm import PTQ4DMConfig, RTNConfig
from ptq4dm.layers.plan import FLOAT_INPUTS, Int4Plan, Plan
from rows.row import Row, shuffled_rounding


def codebooks() -> list[Row]:
    """Inputs in 8 bits, found in each call, or as they come. A codebook of the whole weight takes 16 bytes, one of
    each row as much as scales of 16 bits in groups of K / 8 inputs take: uniform grids in groups of 64 and 128 stand
    beside."""
    four, name, rows = {"weight_bits": 4, "activations": "dynamic"}, "Codebook W4A8 g64", []
    for size in (64, 128):
        own = f"Codebook W4A8 g{size}"
        uniform = partial(RTNConfig, group_size=size, **four)
        least = partial(PTQ4DMConfig, objective="mse", group_size=size, **four)
        book = partial(RTNConfig, weight_grid="codebook", group_size=size, **four)
        rows += [
            Row(f"RTN W4A8 g{size}, dynamic, least error", "baseline", least, name),
            Row(f"RTN W4A8 g{size}, dynamic, hadamard", "baseline", partial(uniform, transforms=("hadamard",)), name),
            Row(f"RTN W4A16 g{size}, least error", "baseline", least, name, plan=weight_only),
            Row(own, "method" if own == name else "ablation", book, "" if own == name else name),
            Row(f"{own} by row", "ablation", partial(book, codebook_of="row"), name),
            Row(f"{own}, hadamard", "ablation", partial(book, transforms=("hadamard",)), name),
            Row(f"Codebook W4A16 g{size}", "ablation", partial(book, activation_bits=FLOAT_INPUTS), name),
        ]
    uniform = partial(RTNConfig, group_size=64, **four)
    rows += [Row("RTN W4A8 g64, dynamic", "baseline", uniform, name)]  # in groups of 128 it stands beside MixPE
    book = partial(RTNConfig, weight_grid="codebook", group_size=64, **four)
    gptq = partial(book, rounding="gptq")
    weighted = partial(PTQ4DMConfig, objective="output", weight_grid="codebook", group_size=64, **four)
    return [
        *rows,
        Row(f"{name}, weighted by inputs", "ablation", weighted, name),
        Row(f"{name}, levels of a normal distribution", "ablation", book, name, packed=controls_steps.normal_levels),
        Row(f"{name}, distances of levels shuffled", "shuffled", book, name, packed=controls_steps.shuffle_levels),
        Row("RTN W4A8 g64, dynamic, gptq", "baseline", partial(uniform, rounding="gptq"), f"{name}, gptq"),
        Row(f"{name}, gptq", "method", gptq),
        Row(f"{name}, gptq, hadamard", "ablation", partial(gptq, transforms=("hadamard",)), f"{name}, gptq"),
        *shuffled_rounding(f"{name}, gptq", gptq),
    ]


def weight_only(model, plan: Plan, store, seed: int) -> Plan:
    """Inputs of layers with uniform weights of 4 bits stay floats, which is no choice of PTQ4DMConfig."""
    plan = copy.deepcopy(plan)
    for layer in plan.layers.values():
        if isinstance(layer, Int4Plan):
            layer.activation_bits = FLOAT_INPUTS
    return plan
