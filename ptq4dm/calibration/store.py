"""The calibration store: recorded calls and layer statistics in a folder of safetensors and JSON.

store.json                 configuration, layer names and fingerprints by network, number of batches, the run's digest
batch-00000.safetensors    one recorded batch each, see call_files.py
statistics.safetensors     of the first network, see input_statistics.py; statistics-NAME.safetensors of others
"""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import NoReturn, cast

import torch
from torch import Tensor, nn

from ..checks import check_fields, checked
from ..errors import UserError
from ..layers.view import find_layers
from .calls import Calls
from .input_statistics import InputStatistics
from .store_files import fingerprints, load_statistics, read_meta, recorded_calls, statistics_path


@dataclass(repr=False)
class CalibrationStore:
    """Measurements that `collect` made of one network, and of the others of its pipeline.

    fingerprint: layer name -> fingerprint of its weight, in the order of the statistics' first axis.
    calls: the recorded calls, sorted by falling timestep.
    component: the network's name in its pipeline; "" of a model by itself. others: stores of further networks.
    """

    config: dict
    fingerprint: dict[str, str]
    num_train_timesteps: int
    calls: Calls | None = None
    statistics: InputStatistics | None = None
    component: str = ""
    others: dict[str, CalibrationStore] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check_fields(self, "CalibrationStore")

    def __repr__(self) -> str:
        tuples = "no" if self.calls is None else len(self.calls)
        parts = [f"{self.component or 'model'}: {tuples} tuples, {len(self.fingerprint)} layers"]
        return f"CalibrationStore({'; '.join([*parts, *(repr(one)[17:-1] for one in self.others.values())])})"

    @property
    def components(self) -> dict[str, CalibrationStore]:
        """Name -> store of each network that was calibrated."""
        return {self.component: self, **self.others}

    def recorded(self) -> Calls:
        """The recorded calls. Raises UserError where the store holds statistics only."""
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

    def fits(self, model: nn.Module) -> bool:
        """Whether this store was collected from this model (on meta: from its architecture)."""
        found = fingerprint(model)
        return list(found) == list(self.fingerprint) and all(v in ("", self.fingerprint[k]) for k, v in found.items())

    def check_model(self, model: nn.Module) -> None:
        """Raises UserError unless this store was collected from this model (on meta: from its architecture)."""
        if not self.fits(model):
            self.raise_foreign()

    def of(self, model: nn.Module, component: str = "") -> CalibrationStore:
        """The store of one network: of the component of that name, else of the one that was collected from it.

        Raises UserError where it is of none.
        """
        if component in self.components and self.components[component].fits(model):
            return self.components[component]
        found = next((store for store in self.components.values() if store.fits(model)), None)
        return found or self.raise_foreign()

    def raise_foreign(self) -> NoReturn:
        raise UserError(
            "the calibration store was collected from another model (or other weights); collect one from this model, "
            "with ptq4dm.collect or `ptq4dm collect`."
        )

    @classmethod
    @checked
    def load(cls, folder: str | os.PathLike, owner: object = None) -> CalibrationStore:
        """Open a store. Calls stay on disk until they are made; owner: what has to live as long.

        Raises UserError where there is no finished store, DamagedFile where its files are not what was written.
        """
        folder = Path(folder)
        meta = read_meta(folder)
        if not meta.get("complete"):
            raise UserError(
                f"the calibration store {folder} is not finished; run the same `ptq4dm collect` again "
                "and it goes on where it stopped."
            )
        recorded = recorded_calls(folder, meta, owner)
        stores = {}
        for name, calls in recorded.items():
            store = cls(meta["config"], fingerprints(meta)[name], meta["num_train_timesteps"], calls, component=name)
            shape = len(store.fingerprint), meta["config"]["num_bins"]
            store.statistics, _ = load_statistics(statistics_path(folder, meta, name), shape, meta.get("run"))
            stores[name] = store
        first, *rest = stores.values()
        first.others = {store.component: store for store in rest}
        return first


def layer_fingerprint(weight: Tensor) -> str:
    """Names a weight by its shape and 64 of its values, as bfloat16.

    So a model in float32 and in bfloat16 has one name, and so has one stored in float16, whatever it is loaded as.
    Weights stored in float32 get another name as float16, where they are rounded twice.
    """
    flat = weight.detach().reshape(-1)
    picked = flat[:: max(1, len(flat) // 64)][:64].to("cpu", torch.float32).to(torch.bfloat16)
    data = f"{tuple(weight.shape)}".encode() + picked.view(torch.int16).numpy().tobytes()
    return hashlib.sha256(data).hexdigest()[:16]


def source_of(model: nn.Module) -> str:
    """A digest of a model's class and of the fingerprints of its layers."""
    text = json.dumps([type(model).__name__, fingerprint(model)])
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def fingerprint(model: nn.Module) -> dict[str, str]:
    """layer name -> fingerprint of its weight; empty strings while a model is on the meta device."""
    weights = {view.name: cast(Tensor, view.module.weight) for view in find_layers(model)}
    return {name: "" if weight.is_meta else layer_fingerprint(weight) for name, weight in weights.items()}
