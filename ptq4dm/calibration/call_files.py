"""Recorded calls in safetensors files: tensors as they are, everything else as JSON in the header.

    NAME/timestep, NAME/time   [U] float64 of the network NAME; NAME/groups [U] int64: the group of each unit
    NAME/G/I                   [n, ...] leaf I of the calls of group G: own tensors of its n units, in order
    NAME/G/I/shared            a leaf that the units of a group share

Files are read when calls are made, the rows that they need: a store of any size takes no memory.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.utils import _pytree as pytree

from ..errors import UserError
from ..files.atomic import replacing
from .calls import Calls, Group, Part


def write_tensors(path: Path, tensors: dict[str, Tensor], header: dict[str, str] | None = None) -> None:
    """Write a safetensors file that is whole at any time."""
    with replacing(path) as temporary:
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, temporary, header)


def reading(path: Path, use: Callable[[Any], Any]) -> Any:
    """use(open safetensors file). Raises UserError, naming the file, if it is missing or damaged."""
    try:
        with safe_open(path, "pt") as file:
            return use(file)
    except FileNotFoundError:
        raise UserError(f"{path} is missing; collect again into an empty folder.") from None
    except (SafetensorError, OSError, ValueError, KeyError, TypeError, AttributeError, RuntimeError) as error:
        raise UserError(f"{path} is damaged ({error}); collect again into an empty folder.") from None


def save_calls(path: Path, recorded: dict[str, Calls]) -> None:
    """Write the calls of some networks, by name.

    Raises UserError where an argument is no tensor and nothing that JSON can hold.
    """
    tensors: dict[str, Tensor] = {}
    header: dict[str, dict] = {}
    for name, calls in recorded.items():
        groups = calls.places[:, 0].unique().tolist()
        numbers = torch.tensor([groups.index(group) for group in calls.places[:, 0].tolist()], dtype=torch.int64)
        tensors |= {f"{name}/timestep": calls.timestep, f"{name}/time": calls.time, f"{name}/groups": numbers}
        described = []
        for number, place in enumerate(groups):
            group, units = calls.groups[place], calls.places[calls.places[:, 0] == place, 1].tolist()
            own = group.read(units)
            tensors |= {f"{name}/{number}/{index}": tensor for index, tensor in own.items()}
            shared = {i: leaf for i, leaf in enumerate(group.leaves) if isinstance(leaf, Tensor)}
            tensors |= {f"{name}/{number}/{i}/shared": leaf for i, leaf in shared.items()}
            described.append(
                {
                    "structure": _structure(group.structure),
                    "leaves": [None if i in shared else _written(leaf) for i, leaf in enumerate(group.leaves)],
                    "shared": sorted(shared),
                    "own": list(group.own),
                    "joined": group.joined,
                    "key": group.key,
                    "units": len(units),
                }
            )
        dtype = None if calls.dtype is None else str(calls.dtype).removeprefix("torch.")
        header[name] = {"dtype": dtype, "groups": described}
    write_tensors(path, tensors, {"calls": json.dumps(header)})


def load_calls(path: Path, owner: object = None) -> dict[str, Calls]:
    """Network -> calls of a file, which is read again when they are made.

    owner: what has to live as long as the calls do (a temporary folder). Raises UserError for a damaged file.
    """

    def whole(file: Any) -> dict[str, Calls]:
        described = json.loads(file.metadata()["calls"])
        return {name: _calls(path, file, name, one, owner) for name, one in described.items()}

    return reading(path, whole)


def _calls(path: Path, file: Any, name: str, described: dict, owner: object) -> Calls:
    dtype = described["dtype"]
    calls = Calls(None if dtype is None else getattr(torch, dtype))
    timestep, time, groups = (file.get_tensor(f"{name}/{what}") for what in ("timestep", "time", "groups"))
    order = torch.arange(len(groups))
    for number, one in enumerate(described["groups"]):
        leaves = [_read(leaf) for leaf in one["leaves"]]
        for index in one["shared"]:
            leaves[index] = file.get_tensor(f"{name}/{number}/{index}/shared")
        keys = {index: f"{name}/{number}/{index}" for index in one["own"]}
        part = Part(one["units"], partial(_rows, path, keys, owner))
        structure = pytree.treespec_loads(one["structure"])
        group = Group(structure, leaves, tuple(one["own"]), one["joined"], [part])
        group.key = one["key"]
        mine = groups == number
        order[mine] = torch.arange(len(calls), len(calls) + int(mine.sum()))
        calls.add(group, timestep[mine], time[mine])
    return calls[order]


def _rows(path: Path, keys: dict[int, str], _: object, units: Tensor) -> dict[int, Tensor]:
    """Some units' own tensors, read from the file; _: the owner, which lives as long as this can be called."""

    def picked(file: Any) -> dict[int, Tensor]:
        found = {}
        for index, key in keys.items():
            slices = file.get_slice(key)
            found[index] = torch.cat([slices[unit : unit + 1] for unit in units.tolist()])
        return found

    return reading(path, picked)


def _structure(structure: pytree.TreeSpec) -> str:
    try:
        return pytree.treespec_dumps(structure)
    except (NotImplementedError, TypeError, ValueError) as error:
        raise UserError(f"the model is called with containers that cannot be kept in a file ({error}).") from None


def _written(leaf: Any) -> Any:
    """JSON of a value that is no tensor."""
    if isinstance(leaf, torch.Size):
        return {"size": list(leaf)}
    for kind in (torch.dtype, torch.device):
        if isinstance(leaf, kind):
            return {kind.__name__: str(leaf).removeprefix("torch.")}
    if isinstance(leaf, (bool, int, float, str)) or leaf is None:
        return leaf
    raise UserError(
        f"the model is called with a {type(leaf).__name__}, which cannot be kept in a file; tensors, numbers, "
        "strings and tuples, lists and dicts of them can."
    )


def _read(leaf: Any) -> Any:
    if not isinstance(leaf, dict):
        return leaf
    kind, value = next(iter(leaf.items()))
    return {"size": torch.Size, "device": torch.device, "dtype": lambda name: getattr(torch, name)}[kind](value)
