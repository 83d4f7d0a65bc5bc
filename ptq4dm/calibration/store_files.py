"""The files of a calibration store: what is read from them is looked through, and refused where it cannot be true."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import torch

from ..errors import DamagedFile
from ..files.atomic import replacing
from ..files.claim import digest
from ..files.crc import checksum
from ..files.missing import STORE, check_store
from ..files.outside import TensorFile, checked_object, described, outside, read_json, read_tensors
from ..files.tensors import write_tensors
from .call_files import AGAIN, MOST, check_run, load_calls
from .calls import Calls
from .input_statistics import HISTOGRAM_BINS, InputStatistics
from .old_files import load_rows
from .structures import dtype_named

META: dict[str, type | tuple[type, ...]] = {
    "config": dict,
    "fingerprint": dict,
    "num_train_timesteps": int,
    "num_batches": int,
    "complete": bool,
}
CONFIG: dict[str, type | tuple[type, ...]] = {
    "collector": str,
    "num_samples": int,
    "num_inference_steps": int,
    "mu": (int, float),
    "sigma": (int, float),
    "num_bins": int,
    "batch_size": int,
    "seed": int,
}
ASKED = ("version", "config", "dtype", "scheduler", "conditioning", "pipeline_kwargs", "fingerprint")  # digested
TRAINED = 1000  # steps that a scheduler counts which does not say how many
MOST_COUNT = 10**7  # steps, bins, batches: no store has more
VERSION = 2  # of the folder; 0.1.0 wrote no number


def read_meta(folder: Path) -> dict:
    """store.json. Raises UserError where it is missing, DamagedFile where it is damaged or not ours."""
    check_store(folder)
    path = Path(folder) / STORE
    meta = read_json(path, AGAIN)
    with outside(path, AGAIN):
        return _checked(meta)


def _checked(meta: Any) -> dict:
    if not (isinstance(meta, dict) and meta.keys() >= META.keys()):
        raise ValueError("it was not written by ptq4dm collect")
    if meta.get("version", VERSION) != VERSION:
        raise ValueError(f"it is of version {described(meta['version'])}, and this ptq4dm reads {VERSION}")
    checked_object(meta, META)
    config = checked_object(meta["config"], CONFIG)
    every = {**config, **{name: meta[name] for name in META}}
    counts = {name: value for name, value in every.items() if name.startswith("num_") or name == "batch_size"}
    for name, count in counts.items():
        if not 1 <= count <= MOST_COUNT:
            raise ValueError(f"its '{name}' is {described(count)}")
    if "version" in meta and (trained := _trained(meta)) and meta["num_train_timesteps"] not in trained:
        raise ValueError("its 'num_train_timesteps' is that of none of its schedulers")
    if not all(math.isfinite(config[name]) for name in ("mu", "sigma")):
        raise ValueError("its law of the timesteps holds NaN or infinity")
    if "version" not in meta:  # of 0.1.0
        checked_object(meta, {"shared": dict, "dtype": str})
        dtype_named(meta["dtype"].removeprefix("torch."))
    batches = -(-config["num_samples"] // config["batch_size"])
    if meta["num_batches"] not in (
        batches,
        batches + 1,
    ):  # one more where the law of the timesteps left a network out
        raise ValueError(f"{meta['num_batches']} batches cannot be all of {config['num_samples']} samples")
    for component, layers in fingerprints(meta).items():
        if not (component == "" or component.isidentifier()):  # it is part of a file's name
            raise ValueError(f"'{component}' is no name of a network")
        if not (isinstance(layers, dict) and layers and all(isinstance(one, str) for one in layers.values())):
            raise ValueError(f"its fingerprint of '{component}' is damaged")
    if not fingerprints(meta):
        raise ValueError("it tells of no network")
    if "run" in meta and meta["run"] != digest({name: meta.get(name) for name in ASKED}):
        raise ValueError("its settings are not those of the run that wrote it")
    return meta


def write_meta(folder: Path, meta: dict) -> None:
    with replacing(folder / "store.json") as temporary:
        temporary.write_text(json.dumps(meta, indent=1))


def fingerprints(meta: dict) -> dict[str, dict[str, str]]:
    """Network -> layer name -> fingerprint."""
    return meta["fingerprint"] if "version" in meta else {"": meta["fingerprint"]}


def batch_path(folder: Path, index: int) -> Path:
    return folder / f"batch-{index:05d}.safetensors"


def statistics_path(folder: Path, meta: dict, component: str) -> Path:
    first = next(iter(fingerprints(meta)))
    return folder / ("statistics.safetensors" if component == first else f"statistics-{component}.safetensors")


def recorded_calls(folder: Path, meta: dict, owner: object = None) -> dict[str, Calls]:
    """Network -> the calls of all batches. Raises DamagedFile, also where one is of another run than the store."""
    paths = []
    for i in range(meta["num_batches"]):  # one by one: who knows what number stands there
        paths.append(batch_path(folder, i))
        if not paths[-1].is_file():
            raise DamagedFile(f"{paths[-1]} is missing; {AGAIN}.")
    if "version" not in meta:
        return {"": load_rows(paths, meta["shared"], meta["num_train_timesteps"], meta["dtype"])}
    batches = [load_calls(path, owner, meta.get("run"), fingerprints(meta), _last(meta)) for path in paths]
    whole = {name: Calls() for name in fingerprints(meta)}
    for batch in batches:
        for name, calls in batch.items():
            whole[name].join(calls)
    return whole


def _last(meta: dict) -> float:
    """The largest timestep that a model of this store may have been called with."""
    return max(MOST, *(1.01 * n for n in [meta["num_train_timesteps"], *_trained(meta)] if n <= MOST_COUNT))


def _trained(meta: dict) -> list[int]:
    """How far each of a store's schedulers counts; none where the store does not tell."""
    schedulers = meta.get("scheduler")
    configs = schedulers.values() if isinstance(schedulers, dict) else ()
    counts = [one.get("num_train_timesteps") or TRAINED for one in configs if isinstance(one, dict)]
    return [int(n) for n in counts if type(n) in (int, float) and math.isfinite(n)]


def save_statistics(path: Path, statistics: InputStatistics, progress: int, run: str = "") -> None:
    """progress: batches of the measurement that are in it; run: see `save_calls`."""
    tensors = {**statistics.tensors(), "progress": torch.tensor(progress)}
    checks = {name: checksum(tensor) for name, tensor in tensors.items()}
    write_tensors(path, tensors, {"about": json.dumps({"checks": checks, "run": run})})


def load_statistics(path: Path, shape: tuple[int, int], run: str | None = None) -> tuple[InputStatistics, int]:
    """(statistics, batches of the measurement that are in it). shape: layers and bins; run: see `load_calls`.

    Raises DamagedFile.
    """
    names = {*InputStatistics(0, 0).tensors(), "progress"}

    def whole(file: TensorFile) -> tuple[InputStatistics, int]:
        about = checked_object(file.json("about"), {"checks": dict}) if "about" in file.header else {}
        check_run(about, run)
        if lacking := names ^ set(file.names):
            raise ValueError(f"'{min(lacking)}' is missing in it, or does not belong there")
        if file.shape("counts") != (*shape, HISTOGRAM_BINS):
            raise ValueError(
                f"its histograms are {list(file.shape('counts'))}, not of {shape[0]} layers, {shape[1]} bins"
            )
        tensors = file.tensors()
        for name in names if about else ():
            if checksum(tensors[name]) != about["checks"][name]:
                raise ValueError(f"the values of '{name}' are not those that were written")
        progress = int(tensors["progress"])
        if progress < 0:
            raise ValueError(f"it says that {progress} batches were measured")
        return InputStatistics.from_tensors(tensors), progress

    return read_tensors(path, whole, AGAIN)
