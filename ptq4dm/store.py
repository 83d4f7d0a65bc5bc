"""The calibration store: recorded tuples and layer statistics in a folder of safetensors and JSON.

store.json                 configuration, layer names and fingerprints, number of batches
batch-00000.safetensors    one recorded batch each: sample, timestep, cond/*, shared/*
statistics.safetensors     see statistics.InputStatistics
"""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from .errors import UserError
from .layers import find_layers
from .record import Calls
from .statistics import InputStatistics


@dataclass
class CalibrationStore:
    """What `collect` measured of one model.

    fingerprint: layer name -> fingerprint of its weight, in the order of the statistics' first axis.
    calls: the recorded tuples, sorted by falling timestep.
    """

    config: dict
    fingerprint: dict[str, str]
    num_train_timesteps: int
    calls: Calls | None = None
    statistics: InputStatistics | None = None

    def input_of(self, layer: str, bins: list[int] | None = None) -> tuple[Tensor, float, float, float]:
        """(histogram, limit, low, high) of a layer's input, over some or all timestep bins."""
        if layer not in self.fingerprint:
            raise UserError(f"the calibration store has no statistics of layer '{layer}'; collect again.")
        return self.statistics.merged(list(self.fingerprint).index(layer), bins)

    def check_model(self, model: nn.Module) -> None:
        """Raises UserError unless this store was collected from this model (on meta: from its architecture)."""
        found = fingerprint(model)
        if list(found) != list(self.fingerprint) or any(v not in ("", self.fingerprint[k]) for k, v in found.items()):
            self.raise_foreign()

    def raise_foreign(self):
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
        store.statistics = InputStatistics.from_tensors(read_tensors(folder / "statistics.safetensors"))
        return store


def layer_fingerprint(weight: Tensor) -> str:
    """Names a weight by its shape and 64 of its values (as bfloat16, so that dtypes of one model agree)."""
    flat = weight.detach().reshape(-1)
    picked = flat[:: max(1, len(flat) // 64)][:64].to("cpu", torch.float32).to(torch.bfloat16)
    data = f"{tuple(weight.shape)}".encode() + picked.view(torch.int16).numpy().tobytes()
    return hashlib.sha256(data).hexdigest()[:16]


def fingerprint(model: nn.Module) -> dict[str, str]:
    """layer name -> fingerprint of its weight; empty strings while a model is on the meta device."""
    views = find_layers(model)
    return {v.name: "" if v.module.weight.is_meta else layer_fingerprint(v.module.weight) for v in views}


# --- files --------------------------------------------------------------------------------------------------


def read_meta(folder: Path) -> dict:
    try:
        return json.loads((Path(folder) / "store.json").read_text())
    except FileNotFoundError:
        raise UserError(
            f"{folder} is not a calibration store (no store.json); make one with `ptq4dm collect`."
        ) from None
    except (OSError, json.JSONDecodeError) as error:
        raise UserError(f"cannot read {folder}/store.json: {error}.") from None


def write_meta(folder: Path, meta: dict) -> None:
    temporary = folder / "store.json.part"
    temporary.write_text(json.dumps(meta, indent=1))
    os.replace(temporary, folder / "store.json")


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Tensors of a safetensors file; UserError naming the file if it is missing or damaged."""
    try:
        with safe_open(path, "pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
    except FileNotFoundError:
        raise UserError(f"{path} is missing; collect again into an empty folder.") from None
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path} is damaged ({error}); delete it and collect again.") from None


def write_tensors(path: Path, tensors: dict[str, Tensor]) -> None:
    temporary = path.with_name(path.name + ".part")
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, temporary)
    os.replace(temporary, path)


def batch_path(folder: Path, index: int) -> Path:
    return folder / f"batch-{index:05d}.safetensors"


def save_calls(folder: Path, index: int, calls: Calls) -> dict:
    """Write one batch; returns what of its shared arguments is plain JSON."""
    shared = {f"shared/{k}": v for k, v in calls.shared.items() if isinstance(v, Tensor)}
    conditioning = {f"cond/{k}": v for k, v in calls.conditioning.items()}
    tensors = {"sample": calls.sample, "timestep": calls.timestep, **conditioning, **shared}
    write_tensors(batch_path(folder, index), tensors)
    return {k: v for k, v in calls.shared.items() if not isinstance(v, Tensor)}


def load_calls(folder: Path, index: int, plain: dict) -> Calls:
    tensors = read_tensors(batch_path(folder, index))
    entries = lambda kind: {k[len(kind) :]: v for k, v in tensors.items() if k.startswith(kind)}  # noqa: E731
    try:
        shared = {**plain, **entries("shared/")}
        return Calls(tensors["sample"], tensors["timestep"], entries("cond/"), shared)
    except KeyError as error:
        raise UserError(f"{batch_path(folder, index)} is not a calibration batch (no {error}).") from None
