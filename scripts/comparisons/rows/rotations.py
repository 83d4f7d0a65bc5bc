"""Rows of rotated inputs (ConvRot, arXiv 2512.03673), and of a branch of inputs (DiRotQ, arXiv 2605.16732)."""

from __future__ import annotations

from functools import partial

from ptq4dm import RTNConfig, SVDQuantConfig
from rows.row import Row

USUAL = "hadamard:64"
OTHERS = ("hadamard:16", "hadamard:256", "sylvester:64")


def rotations() -> list[Row]:
    """Round to nearest and SVDQuant with and without a rotation, W8A8 and at 4 bits; other groups and the other kind.

    A rotation without calibration is a baseline: nothing is decided, so that nothing could be shuffled. Directions of
    inputs are dealt at random in tests/svdquant/test_rotated.py.
    """
    rows = []
    for activations, rtn in (("static", "RTN W8A8"), ("dynamic", "RTN W8A8, dynamic")):
        recipe = partial(RTNConfig, activations=activations, transforms=(USUAL,))
        rows.append(Row(f"{rtn}, {USUAL}", "baseline", recipe))
    for activations in ("int8", "int4"):
        bits = f"W4A{activations[3:]}"
        of, name = f"SVDQuant {bits}", f"Hadamard {bits}"
        plain = partial(SVDQuantConfig, activations=activations, rank=0)
        alone = partial(plain, evidence="none")  # whose own baseline is "<of>, no data, no branch"
        looks = partial(plain, smoothing="none", transforms=(USUAL,))
        rows += [
            Row(name, "baseline", partial(alone, transforms=(USUAL,)), f"{of}, no data"),
            *(
                Row(f"{name}, {one}", "baseline", partial(alone, transforms=(one,)), f"{of}, no data")
                for one in OTHERS
            ),
            Row(f"{name}, gptq", "baseline", looks, of),
        ]
        recipe = partial(SVDQuantConfig, activations=activations)
        turned = partial(recipe, transforms=(USUAL,))
        inputs = partial(recipe, subspace="inputs")
        rows += [
            Row(f"{of}, {USUAL}", "ablation", turned, of),
            Row(f"{of}, {USUAL}, no smoothing", "ablation", partial(turned, smoothing="none"), of),
            Row(f"{of}, no data, {USUAL}", "ablation", partial(turned, evidence="none"), f"{of}, no data"),
            Row(f"{of}, branch of inputs", "ablation", inputs, of),
            Row(f"{of}, branch of inputs, {USUAL}", "ablation", partial(inputs, transforms=(USUAL,)), of),
            Row(f"{of}, branch of inputs, {USUAL}, no smoothing", "ablation",
                partial(inputs, transforms=(USUAL,), smoothing="none"), of),
        ]  # fmt: skip
    return rows
