"""Files of other libraries: Nunchaku's checkpoints; and files of kernel settings, which users may carry about."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from stress.kinds import kind
from stress.kinds_packed import wrong_packed
from stress.leaves import Leaves
from stress.models import CALIBRATION, tiny_dit

import ptq4dm
from ptq4dm.errors import UserError
from ptq4dm.kernels.runtime.settings import DamagedSettings, formatted, settings_in
from ptq4dm.svdquant import export_nunchaku_lite, load_nunchaku_lite


def _nunchaku(folder: Path) -> None:
    pipe = tiny_dit(128)
    recipe = ptq4dm.SVDQuantConfig(
        rank=16,
        num_tuples=2,
        smoothing=0.5,
        rounding="nearest",
        refinements=1,
        roles={"*attn*": "w4", "*ff*": "w4", "*": "keep"},
    )
    ptq4dm.quantize(pipe, recipe, ptq4dm.collect(pipe, CALIBRATION))
    export_nunchaku_lite(pipe.transformer, folder, torch.bfloat16)


@kind("nunchaku", _nunchaku, wrong=wrong_packed, weight=2)
def load_nunchaku(folder: Path, _: Any) -> dict:
    model = load_nunchaku_lite(folder)
    return {"tensors": model.state_dict(), "plan": ptq4dm.quantization_config(model).plan.to_dict()}


def _tuned(folder: Path) -> None:
    table = {
        "device": "NVIDIA H100",
        "w8a8": [[64, 64, 64, {"block_m": 64, "num_warps": 4}]],
        "conv": {"small": {"a": 1}},
    }
    (folder / "nvidia-h100.json").write_text(formatted(table))


def _wrong_settings(found: Leaves, right: Leaves) -> str:
    """Which values a kernel takes is for its launch to say: a size may not be below zero or a fraction."""
    values = {name: value for name, value in found.items() if not name.endswith("#")}
    bad = [name for name, value in values.items() if isinstance(value, float) or (type(value) is int and value < 0)]
    return f"{bad[0]} is {values[bad[0]]}" if bad else ""


@kind("kernel settings", _tuned, wrong=_wrong_settings, weight=4)
def load_tuned(folder: Path, _: Any) -> dict:
    try:
        return settings_in(folder / "nvidia-h100.json")
    except DamagedSettings as error:  # kernels do not know of users; the command line tells both alike
        raise UserError(str(error)) from error
