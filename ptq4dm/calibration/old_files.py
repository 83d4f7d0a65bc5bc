"""Batches of version 0.1.0, whose calls were rows: sample, timestep, cond/* with a row each, shared/* of all rows.

Names are paths ("a/b" is entry b of the dict argument a, "a/0" the first tensor of the tuple a).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..files.outside import TensorFile, read_tensors
from .call_files import AGAIN, MOST, check_times, checked
from .calls import Call, Calls, Group
from .structures import dtype_named


def load_rows(paths: list[Path], plain: dict, num_train_timesteps: int, dtype: str) -> Calls:
    """The calls of all batches. plain: the shared arguments that are no tensors. Raises DamagedFile."""

    def whole(file: TensorFile) -> dict[str, Tensor]:
        tensors = {name: checked(tensor, name, None) for name, tensor in file.tensors().items()}
        if lacking := {"sample", "timestep"} - tensors.keys():
            raise ValueError(f"no {min(lacking)} in it")
        rows = {name: t for name, t in tensors.items() if not name.startswith("shared/")}
        if strange := next((n for n in rows if n not in ("sample", "timestep") and not n.startswith("cond/")), None):
            raise ValueError(f"'{strange}' does not belong in it")
        if (
            len({len(tensor) if tensor.ndim else -1 for tensor in rows.values()}) != 1
            or tensors["timestep"].ndim != 1
        ):
            raise ValueError("its tensors are not of one length")
        timestep = tensors["timestep"].double()
        check_times(timestep, torch.zeros_like(timestep), "the model", max(MOST, 1.01 * num_train_timesteps))
        return tensors

    batches = [read_tensors(path, whole, AGAIN) for path in paths]
    times = torch.cat([batch["timestep"] for batch in batches])
    unit = times.is_floating_point() and float(times.max()) <= 1.0
    calls = Calls(dtype_named(dtype.removeprefix("torch.")))
    for batch in batches:
        sample, timestep = batch["sample"], batch["timestep"]
        rows = {name[5:]: tensor for name, tensor in batch.items() if name.startswith("cond/")}
        shared = {name[7:]: tensor for name, tensor in batch.items() if name.startswith("shared/")}
        arguments = _nested({**plain, **shared, **rows})
        arguments.pop("return_dict", None)
        kwargs = {"timestep": timestep, **arguments, "return_dict": False}
        leaves, structure = Call((sample,), kwargs).flat()
        own = {id(tensor) for tensor in (sample, timestep, *rows.values())}
        tensors = {i: leaf for i, leaf in enumerate(leaves) if id(leaf) in own}
        group = Group.of(leaves, structure, tensors, joined=True, count=len(sample))
        calls.add(group, timestep.double(), timestep.double() / (1 if unit else num_train_timesteps))
    return calls


def _nested(flat: dict[str, Any]) -> Any:
    """Arguments from their paths; sequences become tuples."""
    entries: dict[str, dict] = {}
    for name, value in flat.items():
        outer, _, inner = name.partition("/")
        entries.setdefault(outer, {})[inner] = value
    nested = {name: inner[""] if "" in inner else _nested(inner) for name, inner in entries.items()}
    places = [str(i) for i in range(len(nested))]
    return tuple(nested[place] for place in places) if nested and nested.keys() == set(places) else nested
