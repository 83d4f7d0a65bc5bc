"""The rows that one_run.py puts beside each other: of papers, of what SVDQuant looks at, gains, and controls.

Names are those of scripts/comparisons/rows/. A new method's rows are added here.
"""

from __future__ import annotations

OHQ = "OHQ W8A8 and W4A8 g64 RTN, bytes 0.385"
SHARES = "MixLLM W4.4A8 g128"
TRAINED = "GradPTQ W4A8 per row, dynamic"
THREE_BITS = "GradPTQ W3A8 per row, dynamic"
MIXED = "GradPTQ W4.5A8 rows, dynamic"
PAPERS = {
    "PTQ4DM": ("PTQ4DM W8A8", "RTN W8A8", "PTQ4DM W8A8, mse ranges", "PTQ4DM W8A8, ranges shuffled"),
    "PTQ4DM with Hessian rounding": (
        "PTQ4DM W4A8 per row, gptq", "RTN W4A8 per row", "PTQ4DM W4A8 per row",
        "PTQ4DM W4A8 per row, gptq, Hessian shuffled",
    ),
    "SVDQuant": (
        "SVDQuant W4A8", "RTN in the bytes of SVDQuant W4A8", "SVDQuant W4A8, no branch", "SVDQuant W4A8, nearest",
        "SVDQuant W4A8, nearest, branch at random", "SVDQuant W4A4", "RTN in the bytes of SVDQuant W4A4",
        "SVDQuant W4A4, no branch", "SVDQuant W4A4, nearest", "SVDQuant W4A4, nearest, branch at random",
    ),
    "GradPTQ": tuple(
        what.format(name)
        for name in (TRAINED, THREE_BITS)
        for what in (
            "{}", "gptq as {}", "nearest as {}", "{}, begun at nearest", "{}, each layer by itself",
            "{}, flips at random",
        )
    ),
    "PD-Quant": tuple(
        f"PD-Quant W{bits}{what}"
        for bits in ("4A4", "8A8")
        for what in ("", ", mse ranges", ", lp ranges", ", output ranges", ", of other tuples")
    ) + tuple(f"PD-Quant W4A4, trained{what}" for what in ("", ", without prediction", ", flips at random")),
    "QoQ": (
        "QoQ W4A8 g128", "QoQ W4A8 g128, every pass off", "QoQ W4A8 g128, no rotation",
        "QoQ W4A8 g128, Hessian shuffled", "QoQ W4A8 g128, divisors shuffled",
    ),
    "MixPE": ("MixPE W4A8 g128", "RTN W4A8 g128, dynamic", "MixPE W4A8 g128, zero points shuffled"),
    "MixLLM": tuple(
        f"{SHARES}, {rounding}{what}"
        for rounding in ("nearest", "gptq")
        for what in ("", ", rows=0, g32", ", in each layer", ", permuted in each layer")
    ),
    "LUT-GEMM": tuple(
        f"LUT-GEMM q{bits} g128{what}"
        for bits in (2, 3)
        for what in ("", ", uniform g128", ", not refitted", ", nearest, scales shuffled")
    ),
    "SplitQuant": (
        "SplitQuant W2", "RTN W4A8 per row, all layers", "SplitQuant W2, clusters at random",
        "PTQ4DM W8A6, inputs split", "PTQ4DM W8A6, inputs split, parts at random",
    ),
    "OHQ": (
        OHQ, "RTN W8A8, dynamic", "RTN W4A8 g64, dynamic", f"{OHQ}, direct", f"{OHQ}, sensitivities permuted",
    ),
}  # fmt: skip
"""Paper -> its rows: the method, its baseline, what is left without an idea, and dealt out at random."""

GAINS = {
    "PTQ4DM": (("PTQ4DM W8A8", "RTN W8A8"), ("PTQ4DM W4A8 per row, gptq", "RTN W4A8 per row")),
    "SVDQuant": tuple((f"SVDQuant W4A{bits}", f"RTN in the bytes of SVDQuant W4A{bits}") for bits in (8, 4)),
    "GradPTQ": tuple((name, f"gptq as {name}") for name in (TRAINED, THREE_BITS)),
    "PD-Quant": (
        *(("PD-Quant W4A4", f"PD-Quant W4A4, {by} ranges") for by in ("mse", "lp", "output")),
        ("PD-Quant W8A8", "PD-Quant W8A8, mse ranges"),
        ("PD-Quant W4A4, trained", "PD-Quant W4A4, trained, without prediction"),
    ),
    "QoQ": (("QoQ W4A8 g128", "QoQ W4A8 g128, every pass off"),),
    "MixPE": (("MixPE W4A8 g128", "RTN W4A8 g128, dynamic"),),
    "MixLLM": tuple((f"{SHARES}, {by}", f"{SHARES}, {by}, rows=0, g32") for by in ("nearest", "gptq")),
    "LUT-GEMM": tuple((f"LUT-GEMM q{bits} g128", f"LUT-GEMM q{bits} g128, uniform g128") for bits in (2, 3)),
    "SplitQuant": (
        ("SplitQuant W2", "RTN W4A8 per row, all layers"),
        ("PTQ4DM W8A6, inputs split", "PTQ4DM W8A6, inputs split, inputs whole"),
    ),
    "OHQ": ((OHQ, f"{OHQ}, formats at random"),),
}
"""Paper -> (what it brings, what its bytes bring without it); SplitQuant's 2 bits beside more bytes."""

GROUPS = tuple(
    name
    for grid in ("RTN W4A8 g64, dynamic", "Codebook W4A8 g64")
    for name in (grid, f"{grid}, hadamard", f"{grid}, gptq")
) + ("Codebook W4A8 g64, gptq, hadamard",)
EVIDENCE = {
    f"W4A{bits}": (
        f"RTN as SVDQuant W4A{bits}", f"RTN in the bytes of SVDQuant W4A{bits}", f"Hadamard W4A{bits}",
        f"Hadamard W4A{bits}, gptq",
        *(GROUPS if bits == 8 else ()),
        *(f"SVDQuant W4A{bits}{what}" for what in (
            ", no data", ", no data, hadamard:64", ", 4 calls", ", 20 calls", "", ", nearest", ", no branch",
            ", no smoothing", ", hadamard:64", ", branch of inputs", ", branch of inputs, hadamard:64",
        )),
    )
    for bits in (8, 4)
}  # fmt: skip
"""Bits -> rows of what SVDQuant looks at, and of what it is compared with."""

CONTROLS = (
    *((f"PTQ4DM {bits}, ranges shuffled", f"PTQ4DM {bits}", f"RTN {bits}") for bits in ("W8A8", "W6A6")),
    *(
        (f"PTQ4DM {form}, gptq, {how}", f"PTQ4DM {form}, gptq", f"PTQ4DM {form}")
        for form in ("W8A8", "W4A8 per row", "W4A8 g64", "W4A8 g64 affine")
        for how in ("Hessian shuffled", "flips at random")
    ),
    *(
        (f"PTQ4DM W4.5A8 rows, {one}, shuffled in each layer", f"PTQ4DM W4.5A8 rows, {one}",
         f"PTQ4DM W4.5A8 rows, {one}, by random")
        for one in ("nearest", "gptq")
    ),
    *(
        (f"SVDQuant W4A{bits}, nearest, {how}", f"SVDQuant W4A{bits}, nearest",
         f"SVDQuant W4A{bits}, nearest, {none}")
        for bits in (8, 4)
        for how, none in (("branch at random", "no branch"), ("smoothing shuffled", "no smoothing"))
    ),
    *(
        (f"SVDQuant W4A{bits}, no data, branch at random", f"SVDQuant W4A{bits}, no data, one turn",
         f"SVDQuant W4A{bits}, no data, no branch")
        for bits in (8, 4)
    ),
    *(
        (f"QoQ W4A8 g128, {how}", "QoQ W4A8 g128", f"QoQ W4A8 g128, {none}")
        for how, none in (
            ("Hessian shuffled", "nearest"), ("flips at random", "nearest"), ("rotations shuffled", "no rotation"),
            ("divisors shuffled", "no smoothing"), ("order shuffled", "no reorder"),
        )
    ),
    ("MixPE W4A8 g128, zero points shuffled", "MixPE W4A8 g128", "RTN W4A8 g128, dynamic"),
    *(
        (f"{SHARES}, {one}, permuted in each layer", f"{SHARES}, {one}", f"{SHARES}, {one}, {none}")
        for one, none in (("nearest", "rows=0"), ("gptq", "rows=0"))
    ),
    *(
        (f"{name}, parts at random", name, f"{name}, inputs whole")
        for name in (f"PTQ4DM {form}, inputs split" for form in ("W8A8", "W8A6", "W8A4", "W4A6 per row", "W4A6 g128"))
    ),
    ("SplitQuant W2, clusters at random", "SplitQuant W2", "SplitQuant W2, one cluster"),
    *(
        (f"{name}, sensitivities permuted", name, f"{name}, formats at random")
        for name in (OHQ, OHQ.replace("RTN", "gptq"))
    ),
    *(
        (f"Codebook W4A8 g64, gptq, {how}", "Codebook W4A8 g64, gptq", "Codebook W4A8 g64")
        for how in ("Hessian shuffled", "flips at random")
    ),
    (
        "Codebook W4A8 g64, distances of levels shuffled", "Codebook W4A8 g64",
        "RTN W4A8 g64, dynamic, least error",
    ),
    *(
        (f"LUT-GEMM q{bits} g128, nearest, scales shuffled", f"LUT-GEMM q{bits} g128, nearest",
         f"LUT-GEMM q{bits} g128, nearest, greedy")
        for bits in (2, 3, 4)
    ),
    *(
        (f"QoQ W4A8 channel, {how}", "QoQ W4A8 channel", "QoQ W4A8 channel, every pass off")
        for how in ("Hessian shuffled", "flips at random")
    ),
    *(
        (f"{name}, flips at random", name, f"nearest as {name}")
        for name in (
            TRAINED, THREE_BITS, MIXED, "GradPTQ W4A8 g64, dynamic", "GradPTQ W8A8, dynamic", "GradPTQ W4A8 per row",
        )
    ),
    (f"{MIXED}, shuffled in each layer", MIXED, f"{MIXED}, by random"),
    *(
        (f"PD-Quant {bits}, of other tuples", f"PD-Quant {bits}", f"PD-Quant {bits}, mse ranges")
        for bits in ("W4A4", "W8A4", "W2A4", "W8A8")
    ),
    *(
        (f"PD-Quant {bits}, trained, flips at random", f"PD-Quant {bits}, trained", f"PD-Quant {bits}")
        for bits in ("W4A4", "W2A4")
    ),
)  # fmt: skip
"""Controls: (dealt out at random, as the method decides, without what is decided)."""

ALONE = (
    "MixPE W4A16 g128, zero points shuffled",
    *(f"SVDQuant W4A{bits}, 4 calls, nearest, smoothing shuffled" for bits in (8, 4)),
    *(f"{OHQ.replace('RTN', by)}, formats at random" for by in ("RTN", "gptq")),
)
"""Other controls: no row has all but what they deal out, or they are that row of another control."""
