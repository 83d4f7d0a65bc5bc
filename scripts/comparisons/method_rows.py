"""The rows of the table of all methods. A new method adds its rows here: itself, its baselines, ablations, controls.

    Row("Mine W4A8", "method", lambda: MineConfig())
    Row("Mine W4A8, idea taken out", "ablation", lambda: MineConfig(idea=False), of="Mine W4A8")
    Row("Mine W4A8, shuffled", "shuffled", lambda: MineConfig(), of="Mine W4A8", packed=my_control)

Beside every method stand full precision, round to nearest at the same bits, and round to nearest at the same stored
bytes (for W8A8 those are one row).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import controls
import controls_split
import controls_steps
from budgets import at_bytes_of
from controls_trained import flip_trained

from ptq4dm import (
    GradPTQConfig,
    LUTGEMMConfig,
    MixLLMConfig,
    MixPEConfig,
    OHQConfig,
    PDQuantConfig,
    PTQ4DMConfig,
    QoQConfig,
    RTNConfig,
    SplitQuantConfig,
    SVDQuantConfig,
)
from ptq4dm.quantization.recipe import QuantConfig

KINDS = ("method", "baseline", "ablation", "shuffled")


@dataclass(frozen=True)
class Row:
    """One model quantized in one way.

    name: unique in the table. kind: one of KINDS. recipe: makes the config; None for full precision.
    of: the method that the row stands beside; empty for methods and for what stands beside all.
    plan: changes the plan, (model, plan, store, seed) -> plan. packed: changes the quantized model, (model, exact,
        store, seed). Shuffled controls are one or both of them (controls.py).
    needs: what the recipe waits for, where that is not in the library yet: the row is then left out, and this said.
    """

    name: str
    kind: str
    recipe: Callable[[], QuantConfig] | None
    of: str = ""
    plan: Callable | None = None
    packed: Callable | None = None
    needs: str = ""


def svdquant(**options) -> Callable[[], QuantConfig]:
    return partial(SVDQuantConfig, **options)


def eight_bits() -> list[Row]:
    rows = [
        Row("full precision", "baseline", None),
        Row("RTN W8A8", "baseline", RTNConfig),
        Row("RTN W8A8, dynamic", "baseline", partial(RTNConfig, activations="dynamic")),
    ]
    for bits in (8, 6):  # at 6, simulated, ranges matter more
        name, of = f"PTQ4DM W{bits}A{bits}", dict(weight_bits=bits, activation_bits=bits)
        recipe = partial(PTQ4DMConfig, **of)
        if bits != 8:
            rows.append(Row(f"RTN W{bits}A{bits}", "baseline", partial(RTNConfig, **of), name))
        shuffle = {"plan": controls.shuffle_input_ranges, "packed": controls.shuffle_weight_ranges}
        rows += [
            Row(name, "method", recipe),
            Row(f"{name}, mse ranges", "ablation", partial(recipe, objective="mse"), name),
            Row(f"{name}, ranges shuffled", "shuffled", recipe, name, **shuffle),
        ]
    return rows


def hessian_rounding() -> list[Row]:
    """Rounding and ranges that look at what layers are fed, in 8 bits."""
    name, gptq = "PTQ4DM W8A8, gptq", partial(PTQ4DMConfig, rounding="gptq")
    return [
        Row(name, "method", gptq),
        Row(f"{name}, max ranges", "ablation", partial(RTNConfig, rounding="gptq"), name),
        *_shuffled_rounding(name, gptq),
        Row("PTQ4DM W8A8, output ranges", "ablation", partial(PTQ4DMConfig, objective="output"), "PTQ4DM W8A8"),
    ]


def four_bits() -> list[Row]:
    """4-bit weights as a format of its own, inputs in 8 bits: one scale per row, and one per group; affine ones."""
    rows = []
    choices = {"per row": {}, "g64": {"group_size": 64}, "g64 affine": {"group_size": 64, "affine": True}}
    for label, choice in choices.items():
        four = {"weight_bits": 4, **choice}
        name, gptq = f"PTQ4DM W4A8 {label}, gptq", partial(PTQ4DMConfig, rounding="gptq", **four)
        rows += [
            Row(f"RTN W4A8 {label}", "baseline", partial(RTNConfig, **four), name),
            Row(name, "method", gptq),
            Row(f"PTQ4DM W4A8 {label}", "ablation", partial(PTQ4DMConfig, **four), name),
            Row(f"{name}, dynamic", "ablation", partial(gptq, activations="dynamic"), name),
            *_shuffled_rounding(name, gptq),
        ]
    row, after = (
        {"weight_bits": 4, "objective": "output"},
        {"weight_bits": 4, "rounding": "gptq", "prefix": "quantized"},
    )
    return [
        *rows,
        Row("PTQ4DM W4A8 per row, output ranges", "ablation", partial(PTQ4DMConfig, **row), rows[1].name),
        Row("PTQ4DM W4A8 per row, output ranges, gptq", "ablation", partial(PTQ4DMConfig, rounding="gptq", **row),
            rows[1].name),
        Row("PTQ4DM W4A8 per row, gptq, after quantized blocks", "ablation", partial(PTQ4DMConfig, **after),
            rows[1].name),
    ]  # fmt: skip


def important_rows() -> list[Row]:
    """Rows of 8 bits among those of 4, by importance, at 4.5 bits a weight: by each score, and by a draw.

    Scores that are dealt out anew over all rows are a draw ("by random"); the shuffled control keeps layers' shares.
    """
    rows = []
    for rounding in ("gptq", "nearest"):
        four = {"weight_bits": 4, "activations": "dynamic", "objective": "mse", "rounding": rounding}
        recipe = partial(PTQ4DMConfig, average_bits=4.5, **four)
        name = f"PTQ4DM W4.5A8 rows, {rounding}"
        rows += [
            Row(f"PTQ4DM W4A8 per row, mse, dynamic, {rounding}", "baseline", partial(PTQ4DMConfig, **four), name),
            Row(name, "method", recipe),
            *(
                Row(f"{name}, by {score}", "ablation", partial(recipe, importance=score), name)
                for score in ("endpoint", "gradient", "magnitude", "random")
            ),
            Row(f"{name}, shuffled in each layer", "shuffled", recipe, name, plan=controls.shuffle_rows),
        ]
    return rows


def salient_rows() -> list[Row]:
    """MixLLM: a tenth of all rows in 8 bits, by two scores; by others and in each layer alike; and none, with smaller
    groups instead, in fewer bytes (64) and in more (32). With Hessian rounding groups are clipped."""
    rows = []
    for rounding, clip in (("gptq", "output"), ("nearest", "none")):
        recipe = partial(MixLLMConfig, rounding=rounding, clip=clip)
        name, none = f"MixLLM W4.4A8 g128, {rounding}", partial(recipe, rows=0.0)
        by = {
            "in each layer": controls_steps.rows_of(controls_steps.salience_of(recipe), 0.1, each=True),
            "by norm": controls_steps.rows_of(controls_steps.row_norms, 0.1),
            **{f"random {i}": controls_steps.rows_of(controls_steps.draw_of(i), 0.1) for i in range(5)},
        }
        rows += [
            Row(name, "method", recipe),
            Row(f"{name}, rows=0", "ablation", none, name),
            Row(f"{name}, by fisher", "ablation", partial(recipe, importance="fisher"), name),
            *(Row(f"{name}, {label}", "ablation", none, name, plan=change) for label, change in by.items()),
            Row(f"{name}, permuted in each layer", "shuffled", recipe, name, plan=controls.shuffle_rows),
            *(Row(f"{name}, rows=0, g{size}", "baseline", partial(none, group_size=size), name) for size in (64, 32)),
        ]
    return rows


def _shuffled_rounding(name: str, recipe: Callable[[], QuantConfig]) -> list[Row]:
    return [
        Row(f"{name}, flips at random", "shuffled", recipe, name, plan=controls.shuffle_rounding),
        Row(f"{name}, Hessian shuffled", "shuffled", recipe, name, plan=controls.shuffle_hessian),
    ]


def low_rank() -> list[Row]:
    """SVDQuant; its shuffled controls are of one turn, rounded to nearest (see `controls.split_anew`)."""
    rows = []
    for activations in ("int8", "int4"):
        name = f"SVDQuant W4A{activations[3:]}"
        make = partial(svdquant, activations=activations)
        plain = {"rank": 0, "smoothing": "none", "rounding": "nearest"}
        turn = {"rounding": "nearest", "refinements": 0}
        fill = at_bytes_of(make(), RTNConfig)
        rows += [
            Row(f"RTN as {name}", "baseline", make(**plain), name),
            Row(f"RTN in the bytes of {name}", "baseline", make(**plain), name, plan=fill),
            Row(name, "method", make()),
            Row(f"{name}, no branch", "ablation", make(rank=0), name),
            Row(f"{name}, no smoothing", "ablation", make(smoothing="none"), name),
            Row(f"{name}, nearest", "ablation", make(**turn), name),
            Row(f"{name}, nearest, no branch", "ablation", make(rank=0, **turn), name),
            Row(f"{name}, nearest, no smoothing", "ablation", make(smoothing="none", **turn), name),
            Row(f"{name}, nearest, smoothing shuffled", "shuffled", make(**turn), name,
                packed=controls.shuffle_smoothing),
            Row(f"{name}, nearest, branch at random", "shuffled", make(**turn), name, packed=controls.random_branch),
        ]  # fmt: skip
    return rows


def prediction_difference() -> list[Row]:
    """PD-Quant's choice of input ranges. Rows of one width share their weight codes; scales of inputs differ."""
    rows = []
    for weight_bits, activation_bits in ((4, 4), (8, 4), (8, 8), (2, 4)):
        of = {"weight_bits": weight_bits, "activation_bits": activation_bits}
        name, mse = f"PD-Quant W{weight_bits}A{activation_bits}", partial(PTQ4DMConfig, objective="mse", **of)
        rows += [
            Row(name, "method", partial(PDQuantConfig, **of)),
            Row(f"{name}, mse ranges", "ablation", mse, name),
        ]
        others = {f"{objective} ranges": objective for objective in ("lp", "max", "output")}
        for label, objective in {**others, "of other tuples": "prediction, of other tuples"}.items():
            ranges = controls.input_ranges_of(partial(PTQ4DMConfig, objective=objective, **of))
            kind = "ablation" if label in others else "shuffled"
            rows.append(Row(f"{name}, {label}", kind, mse, name, plan=ranges))
    return rows


def trained_blocks() -> list[Row]:
    """GradPTQ on uniform grids of least squared error, beside nearest and Hessian rounding on the same grids."""
    widths = {
        "W4A8 per row, dynamic": {"activations": "dynamic"},
        "W3A8 per row, dynamic": {"activations": "dynamic", "weight_bits": 3},
        "W4A8 g64, dynamic": {"activations": "dynamic", "group_size": 64},
        "W8A8, dynamic": {"activations": "dynamic", "weight_bits": 8},
        "W4A8 per row": {"activations": "static"},
    }
    rows = [row for label, options in widths.items() for row in _trained(f"GradPTQ {label}", options)]
    static, mixed = "GradPTQ W4A8 per row", "GradPTQ W4.5A8 rows, dynamic"
    recipe = partial(GradPTQConfig, activations="dynamic", average_bits=4.5)
    return [
        *rows,
        Row(f"{static}, rounding alone", "ablation", partial(GradPTQConfig, train=("rounding",)), static),
        Row(f"{static}, ranges alone", "ablation", partial(GradPTQConfig, train=("ranges",)), static),
        *_trained(mixed, {"activations": "dynamic", "average_bits": 4.5}),
        Row(f"{mixed}, by random", "ablation", partial(recipe, importance="random"), mixed),
        Row(f"{mixed}, shuffled in each layer", "shuffled", recipe, mixed, plan=controls.shuffle_rows),
    ]


def _trained(name: str, options: dict) -> list[Row]:
    """A method that trains blocks, what it trains taken apart, and as many flips elsewhere."""
    recipe = partial(GradPTQConfig, **options)
    shared = {"weight_bits": 4, "num_tuples": 256, "objective": "mse"} | options
    return [
        *(
            Row(f"{rounding} as {name}", "baseline", partial(PTQ4DMConfig, rounding=rounding, **shared), name)
            for rounding in ("nearest", "gptq")
        ),
        Row(name, "method", recipe),
        Row(f"{name}, each layer by itself", "ablation", partial(recipe, unit="layer"), name),
        Row(f"{name}, begun at nearest", "ablation", partial(recipe, start="nearest", learning_rate=1e-2), name),
        Row(f"{name}, flips at random", "shuffled", recipe, name, packed=flip_trained),
    ]


def trained_prediction() -> list[Row]:
    """PD-Quant's training of blocks, with and without the error in the model's prediction."""
    rows = []
    for bits in (4, 2):
        name = f"PD-Quant W{bits}A4, trained"
        recipe = partial(PDQuantConfig, weight_bits=bits, activation_bits=4, rounding="learned", num_tuples=128)
        rows += [
            Row(name, "method", recipe),
            Row(f"{name}, without prediction", "ablation", partial(recipe, prediction=0.0), name),
            Row(f"{name}, flips at random", "shuffled", recipe, name, packed=flip_trained),
        ]
    return rows


def progressive_bits() -> list[Row]:
    """QoQ: each pass off, every pass off, the same weights on direct scales, and each decision dealt at random."""
    name, every = "QoQ W4A8 g128", {"rotation": "inputs", "smoothing": 0.3, "reorder": True, "clip": "none"}
    off = {"rotation": "none", "smoothing": "none", "reorder": False, "clip": "none"}
    recipe, plain = partial(QoQConfig, **every), partial(QoQConfig, **off)
    direct = partial(RTNConfig, weight_bits=4, group_size=128, affine=True, activations="dynamic")
    passes = {
        "no rotation": {"rotation": "none"}, "values rotated": {"rotation": "values"},
        "no smoothing": {"smoothing": "none"}, "no reorder": {"reorder": False}, "nearest": {"rounding": "nearest"},
        "clip by weights": {"clip": "mse"}, "clip by outputs": {"clip": "output"},
    }  # fmt: skip
    rows = [
        Row(f"{name}, every pass off", "baseline", partial(plain, rounding="nearest"), name),
        Row("RTN W4A8 g128 affine, dynamic", "baseline", direct, name),
        Row(name, "method", recipe),
        *(Row(f"{name}, {label}", "ablation", partial(recipe, **one), name) for label, one in passes.items()),
        Row(f"{name}, rounding alone", "ablation", plain, name),
        Row(f"{name}, rounding alone, direct scales", "ablation", partial(direct, rounding="gptq"), name),
        Row(f"{name}, all layers rotated", "ablation", recipe, name, plan=controls_steps.rotate_all),
        *_shuffled_rounding(name, recipe),
        Row(f"{name}, rotations shuffled", "shuffled", recipe, name, plan=controls_steps.shuffle_rotation),
        Row(f"{name}, divisors shuffled", "shuffled", recipe, name, plan=controls_steps.shuffle_divisors),
        Row(f"{name}, order shuffled", "shuffled", recipe, name, plan=controls_steps.shuffle_order),
    ]
    name, rows_of_4 = "QoQ W4A8 channel", partial(QoQConfig, variant="channel", clip="output")
    return [
        *rows,
        Row(f"{name}, every pass off", "baseline", partial(plain, variant="channel", rounding="nearest"), name),
        Row(name, "method", rows_of_4),
        Row(f"{name}, no clip", "ablation", partial(rows_of_4, clip="none"), name),
        *_shuffled_rounding(name, rows_of_4),
    ]


def post_group() -> list[Row]:
    """MixPE: 4-bit weights with zero points in groups, under inputs of 8 bits and of 16.

    Its arithmetic rounds nothing, so that its errors are those of the grid: what is dealt at random are zero points.
    """
    rows = []
    for bits in (8, 16):
        name, recipe = f"MixPE W4A{bits} g128", partial(MixPEConfig, activation_bits=bits)
        rows += [
            Row(name, "method", recipe),
            Row(f"{name}, gptq", "ablation", partial(recipe, rounding="gptq"), name),
            Row(f"{name}, zero points shuffled", "shuffled", recipe, name, packed=controls_steps.shuffle_zeros),
        ]
    symmetric = partial(RTNConfig, weight_bits=4, group_size=128, activations="dynamic")
    return [Row("RTN W4A8 g128, dynamic", "baseline", symmetric, "MixPE W4A8 g128"), *rows]


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
            Row(f"{name}, refitted from uniform", "ablation", partial(recipe, planes="uniform"), name),
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


def measured_allocation() -> list[Row]:
    """Formats mixed under a budget of bytes, between 8 bits and 4 in all layers; times do not count there."""
    rows = []
    eight = "rtn activations=dynamic"
    for label, four in {
        "RTN": "rtn weight_bits=4 activations=dynamic group_size=64",
        "gptq": "ptq4dm weight_bits=4 activations=dynamic group_size=64 objective=mse rounding=gptq",
    }.items():
        name = f"OHQ W8A8 and W4A8 g64 {label}, bytes 0.385"
        options = {"candidates": (eight, four), "bytes": 0.385, "rounds": 1, "timed_batch": 1, "costs": ""}
        recipe = partial(OHQConfig, scale="weights" if label == "RTN" else "outputs", **options)
        rows += [
            Row(name, "method", recipe),
            *(
                Row(f"{name}, {word}", "ablation", partial(recipe, **change), name)
                for word, change in {
                    "direct": {"sensitivity": "direct", "scale": OHQConfig.scale}, "noise": {"inputs": "noise"},
                    "errors of outputs": {"scale": "outputs"}, "errors of weights": {"scale": "weights"},
                }.items()
                if change != {"scale": recipe().scale}
            ),
            Row(f"{name}, greedy", "ablation", recipe, name, plan=controls.chosen_by(recipe, controls.greedily)),
            Row(f"{name}, sensitivities permuted", "shuffled", recipe, name,
                plan=controls.chosen_by(recipe, controls.permuted_errors)),
            Row(f"{name}, formats at random", "shuffled", recipe, name,
                plan=controls.chosen_by(recipe, controls.at_random)),
        ]  # fmt: skip
    return rows


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


def all_rows() -> list[Row]:
    """In the order in which they are printed."""
    return [
        *eight_bits(), *hessian_rounding(), *four_bits(), *important_rows(), *salient_rows(), *low_rank(),
        *prediction_difference(),
        *trained_blocks(), *trained_prediction(), *progressive_bits(), *post_group(), *sign_planes(),
        *measured_allocation(), *split_inputs(), *split_values(),
    ]  # fmt: skip
