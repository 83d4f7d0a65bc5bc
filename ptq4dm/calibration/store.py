"""The calibration store: recorded tuples and layer statistics in a folder of safetensors and JSON.

store.json                 configuration, layer names and fingerprints, number of batches
batch-00000.safetensors    one recorded batch each: sample, timestep, cond/*, shared/*
statistics.safetensors     see input_statistics.InputStatistics
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn, cast

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from ..errors import UserError
from ..files.atomic import replacing
from ..layers.view import find_layers
from .input_statistics import InputStatistics
from .record import Calls


@dataclass
class CalibrationStore:
    """Measurements that `collect` made of one model.

    fingerprint: layer name -> fingerprint of its weight, in the order of the statistics' first axis.
    calls: the recorded tuples, sorted by falling timestep.
    """

    config: dict
    fingerprint: dict[str, str]
    num_train_timesteps: int
    calls: Calls | None = None
    statistics: InputStatistics | None = None

    def recorded(self) -> Calls:
        """The recorded tuples. Raises UserError where the store holds statistics only."""
        if self.calls is None:
            raise UserError("the calibration store holds no recorded calls, only statistics; collect again.")
        return self.calls

    def input_of(self, layer: str, bins: list[int] | None = None) -> tuple[Tensor, float, float, float]:
        """(histogram, limit, low, high) of a layer's input, over some or all timestep bins."""
        if layer not in self.fingerprint:
            raise UserError(f"the calibration store has no statistics of layer '{layer}'; collect again.")
        if self.statistics is None:
            raise UserError("the calibration store holds no statistics, only recorded calls; collect again.")
        return self.statistics.merged(list(self.fingerprint).index(layer), bins)

    def check_model(self, model: nn.Module) -> None:
        """Raises UserError unless this store was collected from this model (on meta: from its architecture)."""
        found = fingerprint(model)
        if list(found) != list(self.fingerprint) or any(v not in ("", self.fingerprint[k]) for k, v in found.items()):
            self.raise_foreign()

    def raise_foreign(self) -> NoReturn:
        raise UserError(
            "the calibration store was collected from another model (or other weights); "
            "collect one from this model with `ptq4dm collect`."
        )

    @classmethod
    def load(cls, folder: str | Path) -> CalibrationStore:
        folder = Path(folder)
        meta = read_meta(folder)
        if not meta.get("complete"):
            raise UserError(
                f"the calibration store {folder} is not finished; run the same `ptq4dm collect` again "
                "and it goes on where it stopped."
            )
        store = cls(meta["config"], meta["fingerprint"], meta["num_train_timesteps"])
        parts = [load_calls(folder, i, meta["shared"]) for i in range(meta["num_batches"])]
        store.calls = Calls.concatenate(parts)
        store.statistics, _ = load_statistics(folder)
        return store


def layer_fingerprint(weight: Tensor) -> str:
    """Names a weight by its shape and 64 of its values, as bfloat16.

    So a model in float32 and in bfloat16 has one name, and so has one stored in float16, whatever it is loaded as.
    Weights stored in float32 get another name as float16, where they are rounded twice.
    """
    flat = weight.detach().reshape(-1)
    picked = flat[:: max(1, len(flat) // 64)][:64].to("cpu", torch.float32).to(torch.bfloat16)
    data = f"{tuple(weight.shape)}".encode() + picked.view(torch.int16).numpy().tobytes()
    return hashlib.sha256(data).hexdigest()[:16]


def fingerprint(model: nn.Module) -> dict[str, str]:
    """layer name -> fingerprint of its weight; empty strings while a model is on the meta device."""
    weights = {view.name: cast(Tensor, view.module.weight) for view in find_layers(model)}
    return {name: "" if weight.is_meta else layer_fingerprint(weight) for name, weight in weights.items()}


# --- files --------------------------------------------------------------------------------------------------


META = {"config", "fingerprint", "num_train_timesteps", "num_batches", "shared", "complete"}


def read_meta(folder: Path) -> dict:
    """store.json; UserError if it is missing, damaged or not ours."""
    try:
        meta = json.loads((Path(folder) / "store.json").read_text())
        if not (isinstance(meta, dict) and meta.keys() >= META):
            raise ValueError("it was not written by ptq4dm collect")
        return meta
    except FileNotFoundError:
        raise UserError(
            f"{folder} is not a calibration store (no store.json); make one with `ptq4dm collect`."
        ) from None
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read {folder}/store.json ({error}); collect again into an empty folder.") from None


def write_meta(folder: Path, meta: dict) -> None:
    with replacing(folder / "store.json") as temporary:
        temporary.write_text(json.dumps(meta, indent=1))


def read_tensors(path: Path, needed: set[str]) -> dict[str, Tensor]:
    """Tensors of a safetensors file; UserError naming the file if it is missing, damaged or lacks `needed` ones."""
    try:
        with safe_open(path, "pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
        if lacking := needed - tensors.keys():
            raise SafetensorError(f"no {min(lacking)} in it")
        return tensors
    except FileNotFoundError:
        raise UserError(f"{path} is missing; collect again into an empty folder.") from None
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path} is damaged ({error}); collect again into an empty folder.") from None


def write_tensors(path: Path, tensors: dict[str, Tensor]) -> None:
    with replacing(path) as temporary:
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, temporary)


def batch_path(folder: Path, index: int) -> Path:
    return folder / f"batch-{index:05d}.safetensors"


def save_calls(folder: Path, index: int, calls: Calls) -> dict:
    """Write one batch; returns what of its shared arguments is plain JSON."""
    shared = {f"shared/{k}": v for k, v in calls.shared.items() if isinstance(v, Tensor)}
    conditioning = {f"cond/{k}": v for k, v in calls.conditioning.items()}
    tensors = {"sample": calls.sample, "timestep": calls.timestep, **conditioning, **shared}
    write_tensors(batch_path(folder, index), tensors)
    return calls.plain


def load_calls(folder: Path, index: int, plain: dict) -> Calls:
    tensors = read_tensors(batch_path(folder, index), {"sample", "timestep"})
    entries = lambda kind: {k[len(kind) :]: v for k, v in tensors.items() if k.startswith(kind)}  # noqa: E731
    return Calls(tensors["sample"], tensors["timestep"], entries("cond/"), {**plain, **entries("shared/")})


def save_statistics(folder: Path, statistics: InputStatistics, progress: int) -> None:
    """progress: batches of the measurement that are in it."""
    write_tensors(folder / "statistics.safetensors", {**statistics.tensors(), "progress": torch.tensor(progress)})


def load_statistics(folder: Path) -> tuple[InputStatistics, int]:
    names = {*InputStatistics(0, 0).tensors(), "progress"}
    tensors = read_tensors(folder / "statistics.safetensors", names)
    return InputStatistics.from_tensors(tensors), int(tensors["progress"])
