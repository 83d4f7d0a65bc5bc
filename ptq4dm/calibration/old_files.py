"""Batches of version 0.1.0, whose calls were rows: sample, timestep, cond/* with a row each, shared/* of all rows.

Names are paths ("a/b" is entry b of the dict argument a, "a/0" the first tensor of the tuple a).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .call_files import reading
from .calls import Call, Calls, Group


def load_rows(paths: list[Path], plain: dict, num_train_timesteps: int, dtype: str) -> Calls:
    """The calls of all batches. plain: the shared arguments that are no tensors."""

    def whole(file: Any) -> dict[str, Tensor]:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
        if lacking := {"sample", "timestep"} - tensors.keys():
            raise KeyError(f"no {min(lacking)} in it")
        return tensors

    batches = [reading(path, whole) for path in paths]
    times = torch.cat([batch["timestep"] for batch in batches])
    unit = times.is_floating_point() and float(times.max()) <= 1.0
    calls = Calls(getattr(torch, dtype.removeprefix("torch.")))
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
