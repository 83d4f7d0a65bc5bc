"""Folders of quantized pipelines, as `ptq4dm quantize` leaves them, in each format; and in shards."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from stress.kinds import kind
from stress.kinds_calibration import wrong_plan
from stress.leaves import Leaves, strange
from stress.models import CALIBRATION, tiny_dit, tiny_unet

import ptq4dm
from ptq4dm.layers.base import is_quantized
from ptq4dm.quantization.saving import original_of, save_quantized

RTN, SVDQ = ptq4dm.RTNConfig, ptq4dm.SVDQuantConfig
NOT_COMPARED = ("quantization_config", "_name_or_path")  # the plan is, by itself; the other is the folder
DIFFUSERS = ("/config/", "/scheduler/")  # what diffusers' own configs say is for diffusers to look at
DYNAMIC = {"activations": "dynamic"}
FORMATS: dict[str, tuple[Callable, Any]] = {
    "int8 static": (tiny_unet, ptq4dm.PTQ4DMConfig(objective="max")),
    "int8 dynamic": (tiny_dit, RTN(**DYNAMIC)),
    "fp8": (tiny_dit, RTN(format="fp8")),
    "int4 in groups": (tiny_dit, RTN(weight_bits=4, group_size=32, **DYNAMIC)),
    "int4 affine": (tiny_dit, RTN(weight_bits=4, affine=True, **DYNAMIC)),
    "progressive": (tiny_dit, RTN(weight_bits=4, group_size=32, weight_grid="progressive", **DYNAMIC)),
    "codebook": (tiny_dit, RTN(weight_bits=4, group_size=32, weight_grid="codebook", **DYNAMIC)),
    "power": (tiny_dit, RTN(weight_bits=4, weight_grid="power", **DYNAMIC)),
    "sign planes": (tiny_dit, ptq4dm.LUTGEMMConfig(rest="rtn activations=dynamic")),
    "rows of two widths": (tiny_dit, RTN(weight_bits=4, average_bits=5.0, num_tuples=2, **DYNAMIC)),
    "inputs in parts": (tiny_unet, ptq4dm.PTQ4DMConfig(objective="max", split_inputs=True)),
    "clusters of values": (tiny_dit, ptq4dm.SplitQuantConfig()),
    "clusters of values, three tensors": (tiny_dit, ptq4dm.SplitQuantConfig(form="literal")),
    "svdquant": (tiny_dit, SVDQ(rank=4, num_tuples=2, smoothing=0.5, rounding="nearest", refinements=1)),
}


def _saved(build: Callable, recipe: Any, shards: str | None = None) -> Callable[[Path], None]:
    def make(folder: Path) -> None:
        pipe = build()
        report = ptq4dm.quantize(pipe, recipe, ptq4dm.collect(build(), CALIBRATION))
        if shards:
            network = pipe.unet if hasattr(pipe, "unet") else pipe.transformer
            whole = network.save_pretrained
            network.save_pretrained = lambda *args, **kwargs: whole(*args, **{**kwargs, "max_shard_size": shards})
        save_quantized(pipe, {"model": "original", **report.to_dict()}, folder)

    return make


def load_folder(folder: Path, _: Any) -> dict:
    """All that a loaded pipeline computes with, and what its record says."""
    pipe = ptq4dm.load_pipeline(folder)
    network = pipe.unet if hasattr(pipe, "unet") else pipe.transformer
    recipe = ptq4dm.quantization_config(network)
    layers = {name for name, module in network.named_modules() if is_quantized(module)}
    tensors = network.state_dict()
    return {
        "packed": {name: t for name, t in tensors.items() if name.rpartition(".")[0] in layers},
        "plain": {name: t for name, t in tensors.items() if name.rpartition(".")[0] not in layers},
        "plan": None if recipe is None else recipe.plan.to_dict(),
        "config": {k: v for k, v in dict(network.config).items() if k not in NOT_COMPARED},
        "scheduler": dict(pipe.scheduler.config),
        "kinds": [type(pipe).__name__, type(network).__name__, type(pipe.scheduler).__name__],
        "original": original_of(str(folder)),
    }  # fmt: skip


def called(folder: Path, _: Any) -> dict:
    """A loaded pipeline's picture, too; one that overflows is refused, and nobody knows by which file."""
    pipe = ptq4dm.load_pipeline(folder)
    extra = {"conditioning": {"class_labels": [1]}} if hasattr(pipe, "transformer") else {}
    picture = ptq4dm.sample(pipe, [1], num_inference_steps=2, progress=False, **extra)
    return {**load_folder(folder, None), "picture": picture}


def wrong_packed(found: Leaves, right: Leaves) -> str:
    """Scales that are not above zero, codes and plans that do not belong together."""
    if {name for name in found if name.startswith("/packed/")} != {n for n in right if n.startswith("/packed/")}:
        return "other tensors in its layers"
    for name, value in found.items():
        scale = name.endswith(("weight_scale", "input_scale", "wscales", "exponent")) and isinstance(
            value, torch.Tensor
        )
        if scale and not bool((value.float() > 0).all()):
            return f"{name} is not above zero"
        before = right.get(name)
        if isinstance(value, torch.Tensor) and isinstance(before, torch.Tensor) and value.shape != before.shape:
            return f"{name} has another shape"
    ours = {name: value for name, value in found.items() if not name.startswith(DIFFUSERS)}
    return wrong_plan(ours, right) or strange(ours, right)


def verified(folder: Path, _: Any) -> dict:
    """A folder that was looked through whole: all of a quantized network's tensors have a checksum."""
    ptq4dm.verify(folder)
    return load_folder(folder, None)


for name, (build, recipe) in FORMATS.items():
    guarded = {"wrong": wrong_packed, "guarded": lambda path: path.startswith("/packed/")}
    kind(f"packed {name}", _saved(build, recipe), weight=1, **guarded)(load_folder)
kind("packed in shards", _saved(tiny_dit, RTN(**DYNAMIC), "40KB"), weight=1, **guarded)(load_folder)
kind("packed, called", _saved(tiny_unet, FORMATS["int8 static"][1]), weight=1, named=False, **guarded)(called)
kind(
    "packed, verified",
    _saved(tiny_dit, RTN(**DYNAMIC)),
    weight=1,
    wrong=wrong_packed,
    guarded=lambda path: path.startswith(("/packed/", "/plain/")),
)(verified)
