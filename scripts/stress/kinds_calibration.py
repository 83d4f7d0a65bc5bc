"""Calibration stores, plans, recipes."""

from __future__ import annotations

import json
import math
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from stress.kinds import kind
from stress.leaves import Leaves, strange
from stress.models import CALIBRATION, tiny_unet
from torch.utils import _pytree as pytree

import ptq4dm
from ptq4dm.files.outside import outside, read_json
from ptq4dm.quantization.components import load_plans
from ptq4dm.svdquant.layers.plan import SVDQPlan
from ptq4dm.transforms.base import TransformPlan


def _store(folder: Path) -> Any:
    pipe = tiny_unet()
    ptq4dm.collect(pipe, CALIBRATION, folder)
    return pipe


def _wrong_store(found: Leaves, right: Leaves) -> str:
    """Times out of the scheduler's range, lengths that do not agree, statistics that nothing can have."""
    times = [value for name, value in found.items() if name.endswith("/timestep")]
    if any(bool(((t < 0) | (t >= found["/num_train_timesteps"])).any()) for t in times):
        return "a timestep is out of range"
    counts, low, high = (found[f"/statistics/{name}"] for name in ("counts", "low", "high"))
    if bool((counts < 0).any()):
        return "a negative count"
    if counts.shape[:2] != low.shape or low.shape != high.shape:
        return "statistics of other shapes"
    if bool((low > high)[counts.sum(-1) > 0].any()):
        return "a lowest value above the highest"
    return strange(found, right)


@kind("store", _store, wrong=_wrong_store, weight=8)
def load_store(folder: Path, pipe: Any) -> dict:
    store = ptq4dm.CalibrationStore.load(folder)
    calls = [
        {"timestep": batch.timestep, "time": batch.time, "leaves": pytree.tree_flatten(vars(batch.call()))[0]}
        for batch in store.recorded().batches(16)
    ]
    return {
        "config": store.config, "fingerprint": store.fingerprint, "num_train_timesteps": store.num_train_timesteps,
        "component": store.component, "calls": calls, "statistics": store.statistics.tensors(),
    }  # fmt: skip


@kind("store, quantized with", _store, wrong=lambda found, right: _wrong_layers(found, right), weight=1)
def quantize_with(folder: Path, pipe: Any) -> dict:
    """What `quantize` makes with a store: plans and reports of the layers."""
    fresh = tiny_unet()
    report = ptq4dm.quantize(fresh, ptq4dm.PTQ4DMConfig(objective="max"), ptq4dm.CalibrationStore.load(folder))
    plan = ptq4dm.quantization_config(fresh.unet).plan
    return {"plan": plan.to_dict(), "sqnr": {row["layer"]: row["sqnr"] for row in report.layers}}


def _wrong_layers(found: Leaves, right: Leaves) -> str:
    return strange(found, right) or wrong_plan(found, right)


# ---------------------------------------------------------------------- plans

BITS = {"/weight_bits": range(2, 9), "/activation_bits": (*range(2, 9), 16, 32)}


def wrong_plan(found: Leaves, right: Leaves) -> str:
    """Bits, scales and zero points that no grid has."""
    for name, value in found.items():
        for ending, allowed in BITS.items():
            if name.endswith(ending) and (type(value) is not int or value not in allowed):
                return f"{name} is {value!r}"
        if (
            name.endswith("/input_scale")
            and value is not None
            and not (type(value) in (int, float) and 0 < value < math.inf)
        ):
            return f"{name} is {value!r}"
        if (
            name.endswith("/input_zero_point")
            and value is not None
            and (type(value) is not int or not -128 <= value <= 127)
        ):
            return f"{name} is {value!r}"
    return strange(found, right)


def _plan(recipe: Any, rooms: str = "") -> Any:
    def make(folder: Path) -> None:
        pipe = tiny_unet()
        ptq4dm.quantize(pipe, recipe, ptq4dm.collect(tiny_unet(), CALIBRATION))
        plan = ptq4dm.quantization_config(pipe.unet).plan
        if rooms:
            whole = {"components": {name: plan.to_dict() for name in rooms.split()}}
            (folder / "plan.json").write_text(json.dumps(whole, indent=1))
        else:
            plan.save(folder / "plan.json")

    return make


STATIC = ptq4dm.PTQ4DMConfig(objective="max")


@kind("plan", _plan(STATIC), wrong=wrong_plan, weight=12)
def load_plan(folder: Path, _: Any) -> dict:
    return ptq4dm.Plan.load(folder / "plan.json").to_dict()


@kind("plans of several networks", _plan(STATIC, "transformer transformer_2"), wrong=wrong_plan, weight=6)
def load_several(folder: Path, _: Any) -> dict:
    return {name: plan.to_dict() for name, plan in load_plans(folder / "plan.json").items()}


@kind("plan, followed", _plan(STATIC), wrong=wrong_plan, weight=1, named=False)
def follow(folder: Path, _: Any) -> dict:
    """A plan is followed and the model called."""
    pipe = tiny_unet()
    ptq4dm.quantize(pipe, ptq4dm.RTNConfig(plan=ptq4dm.Plan.load(folder / "plan.json")))
    with torch.no_grad():
        answer = pipe.unet(torch.ones(1, 3, 8, 8), 5).sample
    return {"plan": ptq4dm.quantization_config(pipe.unet).plan.to_dict(), "answer": answer}


def _smoothed(folder: Path) -> None:
    """A plan with a transform, whose tensors lie beside it."""
    change = TransformPlan("smooth", ["a", "b"], {"alpha": 0.5}, {"divisors": torch.linspace(0.5, 2, 8)})
    plan = ptq4dm.Plan("rtn", {"a": ptq4dm.layers.plan.LayerPlan(), "b": ptq4dm.layers.plan.Int4Plan()}, [change])
    plan.save(folder / "plan.json")


@kind("plan with transforms", _smoothed, wrong=wrong_plan, weight=6)
def load_transforms(folder: Path, _: Any) -> dict:
    plan = ptq4dm.Plan.load(folder / "plan.json")
    return {"plan": plan.to_dict(), "tensors": plan.tensors()}


def _recipes(folder: Path) -> None:
    plan = ptq4dm.Plan("svdquant", {"a": SVDQPlan(), "b": ptq4dm.layers.plan.Int4Plan(group_size=32)})
    for recipe in (STATIC, ptq4dm.RTNConfig(weight_bits=4, group_size=32), ptq4dm.SVDQuantConfig(plan=plan)):
        (folder / f"{recipe.method}.json").write_text(recipe.to_json_string())


def _wrong_recipe(found: Leaves, right: Leaves) -> str:
    """Smoothing is a word or alpha, and both are right; of all else the type is known."""
    found = dict(found)
    smoothing = found.pop("/svdquant.json/smoothing", "search")
    if type(smoothing) in (int, float) and not 0 <= smoothing <= 1:
        return f"smoothing is {smoothing!r}"
    return wrong_plan(found, right)


@kind("recipe", _recipes, wrong=_wrong_recipe, weight=8, named=False)
def load_recipes(folder: Path, _: Any) -> dict:
    """The recipe of a model's config.json; from_dict knows of no file, so its message need not name it."""
    found = {}
    for path in sorted(folder.glob("*.json")):
        data = read_json(path)
        with outside(path):
            recipe = ptq4dm.QuantConfig.from_dict(data)
        found[path.name] = {k: asdict(v) if isinstance(v, ptq4dm.Plan) else v for k, v in recipe.to_dict().items()}
    return found
