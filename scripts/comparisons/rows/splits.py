"""Rows of split inputs and of split values."""

from __future__ import annotations

from functools import partial

import controls_split

from ptq4dm import PTQ4DMConfig, RTNConfig, SplitQuantConfig
from rows.row import Row


def split_inputs() -> list[Row]:
    """A static grid for each part of concatenated inputs; models that concatenate nothing have no such row."""
    rows = []
    for label, options in {
        **{f"W8A{bits}": {"activation_bits": bits} for bits in (8, 6, 4)},
        "W4A6 per row": {"weight_bits": 4, "activation_bits": 6},
        "W4A6 g128": {"weight_bits": 4, "activation_bits": 6, "group_size": 128},
    }.items():
        name, whole = f"PTQ4DM {label}, inputs split", partial(PTQ4DMConfig, **options)
        recipe = partial(whole, split_inputs=True)
        rows += [
            Row(name, "method", recipe),
            Row(f"{name}, inputs whole", "ablation", whole, name),
            Row(f"{name}, parts at random", "shuffled", recipe, name, packed=controls_split.random_parts),
        ]
    return rows


def split_values() -> list[Row]:
    """SplitQuant: at the bits of a code, as the paper compares; and beside grids of groups that take the same bytes.

    Codes of a layer's clusters are 3.6 bits a weight, three layers 6; the model's ends are quantized like the rest.
    """
    name, three = "SplitQuant W2", partial(SplitQuantConfig, form="literal")
    grids = partial(RTNConfig, activations="dynamic", first_last="same")
    by_bits = {
        "W3A8 g64 affine": {"weight_bits": 3, "group_size": 64, "affine": True},
        "W4A8 per row": {"weight_bits": 4}, "W4A8 g64 affine": {"weight_bits": 4, "group_size": 64, "affine": True},
        "W6A8": {"weight_bits": 6},
    }  # fmt: skip
    return [
        Row(name, "method", SplitQuantConfig),
        Row(f"{name}, three layers", "ablation", three, name),
        Row(f"{name}, one cluster a tensor", "ablation", partial(three, clusters=1, granularity="tensor"), name),
        Row(f"{name}, one cluster", "ablation", partial(three, clusters=1), name),
        Row(f"{name}, clusters a tensor", "ablation", partial(SplitQuantConfig, granularity="tensor"), name),
        Row(f"{name}, three layers, clusters a tensor", "ablation", partial(three, granularity="tensor"), name),
        Row(f"{name}, codes of 4 bits", "ablation", partial(SplitQuantConfig, weight_bits=4), name),
        Row(f"{name}, clusters at random", "shuffled", SplitQuantConfig, name,
            packed=controls_split.shuffle_clusters),
        *(Row(f"RTN {label}, all layers", "baseline", partial(grids, **one), name) for label, one in by_bits.items()),
    ]  # fmt: skip
