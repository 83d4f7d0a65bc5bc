"""Recorded calls in safetensors files: tensors as they are, everything else as JSON in the header.

    NAME/timestep, NAME/time   [U] float64 of the network NAME; NAME/groups [U] int64: the group of each unit
    NAME/G/I                   [n, ...] leaf I of the calls of group G: own tensors of its n units, in order
    NAME/G/I/shared            a leaf that the units of a group share

Files are read when calls are made, the rows that they need: a store of any size takes no memory. The header also has
checksums, of own tensors one for each unit, and names the run (`run`), so that no file of another run is taken.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..files.crc import checksum, checksums
from ..files.outside import TensorFile, checked_object, read_tensors
from ..files.tensors import write_tensors
from .calls import Calls, Group, Part, signature
from .structures import dtype_named, read_leaf, read_structure, write_leaf, write_structure

AGAIN = "collect again into an empty folder"
MOST = 1010.0  # the largest timestep of a model, unless its scheduler counts further


def save_calls(path: Path, recorded: dict[str, Calls], run: str = "") -> None:
    """Write the calls of some networks, by name; run: a digest of the settings that they were made with.

    Raises UserError where an argument is no tensor and nothing that JSON can hold.
    """
    tensors: dict[str, Tensor] = {}
    header: dict[str, dict] = {}
    for name, calls in recorded.items():
        groups = calls.places[:, 0].unique().tolist()
        numbers = torch.tensor([groups.index(group) for group in calls.places[:, 0].tolist()], dtype=torch.int64)
        clock = {f"{name}/timestep": calls.timestep, f"{name}/time": calls.time, f"{name}/groups": numbers}
        tensors |= clock
        checks: dict[str, Any] = {key: checksum(tensor) for key, tensor in clock.items()}
        described = []
        for number, place in enumerate(groups):
            group, units = calls.groups[place], calls.places[calls.places[:, 0] == place, 1].tolist()
            own = {f"{name}/{number}/{index}": tensor for index, tensor in group.read(units).items()}
            tensors |= own
            checks |= {key: checksums(tensor) for key, tensor in own.items()}
            shared = {i: leaf for i, leaf in enumerate(group.leaves) if isinstance(leaf, Tensor)}
            common = {f"{name}/{number}/{i}/shared": leaf for i, leaf in shared.items()}
            tensors |= common
            checks |= {key: checksum(tensor) for key, tensor in common.items()}
            described.append(
                {
                    "structure": write_structure(group.structure),
                    "leaves": [None if i in shared else write_leaf(leaf) for i, leaf in enumerate(group.leaves)],
                    "shared": sorted(shared),
                    "own": list(group.own),
                    "joined": group.joined,
                    "key": group.key,
                    "units": len(units),
                }
            )
        dtype = None if calls.dtype is None else str(calls.dtype).removeprefix("torch.")
        kinds = {key: _kind(tensors[key]) for key in checks}  # a checksum is of bytes, of whatever shape
        header[name] = {
            "dtype": dtype, "groups": described, "checks": checks, "kinds": kinds, "run": run, "file": path.name,
        }  # fmt: skip
    # One text: safetensors writes several in any order, and the same calls are to give the same bytes.
    write_tensors(path, tensors, {"calls": json.dumps(header)})


def load_calls(
    path: Path,
    owner: object = None,
    run: str | None = None,
    networks: Iterable[str] | None = None,
    most: float = MOST,
) -> dict[str, Calls]:
    """Network -> calls of a file, which is read again when they are made.

    owner: what has to live as long as the calls do (a temporary folder). run: the digest that the file must have;
    None takes any. networks: the names that there may be; None takes any. most: the largest timestep.

    Raises DamagedFile.
    """

    def whole(file: TensorFile) -> dict[str, Calls]:
        described = checked_object(file.json("calls"), {})
        if strange := set(described) - set(described if networks is None else networks):
            raise ValueError(f"it holds calls of '{min(strange)}', which the store does not know")
        expected: set[str] = set()
        found = {}
        for name, one in described.items():
            check_run(checked_object(one, {}), run)
            found[name] = _calls(path, file, name, one, expected, owner)
            check_times(found[name].timestep, found[name].time, name, most)
        if expected != set(file.names):
            raise ValueError(f"'{min(expected ^ set(file.names))}' is not told of in its header")
        return found

    return read_tensors(path, whole, AGAIN)


def check_run(described: dict, run: str | None) -> None:
    """Raises ValueError where a file is of another run than the store; files of old stores do not say."""
    if (run or "") != (described.get("run") or ""):
        raise ValueError("it was made by a run with other settings than the store's")


def checked(tensor: Tensor, name: str, check: Any) -> Tensor:
    """The tensor, if it is as its checksum says (None: nothing is known) and free of NaN and infinity.

    A mask that is added to scores may hold -inf, beside zeros and negative numbers. Raises ValueError.
    """
    if check is not None and checksum(tensor) != check:
        raise ValueError(f"the values of '{name}' are not those that were written")
    if tensor.is_floating_point() and not bool(tensor.float().isfinite().all()) and not bool((tensor <= 0).all()):
        raise ValueError(f"'{name}' holds NaN or infinity")
    return tensor


GROUP = {"structure": str, "leaves": list, "shared": list, "own": list, "joined": bool, "units": int}


def _calls(path: Path, file: TensorFile, name: str, described: Any, expected: set[str], owner: object) -> Calls:
    """The calls of one network; the names of its tensors go into `expected`."""
    described = checked_object(described, {"dtype": (str, type(None)), "groups": list})
    checks = checked_object(described["checks"], {}) if "checks" in described else None
    dtype = described["dtype"]
    calls = Calls(None if dtype is None else dtype_named(dtype))

    def tensor(key: str) -> Tensor:
        expected.add(key)
        return checked(file.tensor(key), key, None if checks is None else checks[key])

    timestep, time, groups = _clock(tensor, name, len(described["groups"]))
    order = torch.arange(len(groups))
    for number, one in enumerate(described["groups"]):
        one = checked_object(one, GROUP)
        mine = groups == number
        own, shared, count = one["own"], one["shared"], len(one["leaves"])
        places = [*own, *shared]
        if not all(type(i) is int and 0 <= i < count for i in places) or len(set(places)) != len(places):
            raise ValueError(f"group {number} of '{name}' tells of values that it does not have")
        if one["units"] != int(mine.sum()) or one["units"] < 1:
            raise ValueError(f"group {number} of '{name}' has {int(mine.sum())} units, not {one['units']}")
        leaves = [read_leaf(leaf) for leaf in one["leaves"]]
        for index in shared:
            leaves[index] = tensor(f"{name}/{number}/{index}/shared")
        keys = {index: f"{name}/{number}/{index}" for index in own}
        expected |= set(keys.values())
        rows = {index: file.like(key) for index, key in keys.items()}
        for index, like in rows.items():
            if like.ndim < 1 or len(like) != one["units"]:
                raise ValueError(f"'{keys[index]}' is {list(like.shape)}, and {one['units']} units are recorded")
        sums = {index: None if checks is None else _sums(checks[key], one["units"]) for index, key in keys.items()}
        part = Part(one["units"], partial(_rows, path, keys, sums, owner))
        structure = read_structure(one["structure"], count)
        group = Group(structure, leaves, tuple(own), one["joined"], [part])
        # Not the key in the file: groups of one key are one group, so it has to be true.
        group.key = signature(structure, group.own, group.joined, [rows[i] for i in own], leaves)
        order[mine] = torch.arange(len(calls), len(calls) + int(mine.sum()))
        calls.add(group, timestep[mine], time[mine])
    for key, kind in checked_object(described.get("kinds", {}), {}).items():  # files of before do not tell
        if key not in file.names or _kind(file.like(key)) != kind:
            raise ValueError(f"'{key}' is of another shape or dtype than was written")
    if described.get("file", path.name) != path.name:
        raise ValueError("it is another of the store's files, in this one's place")
    return calls[order]


def _kind(tensor: Tensor) -> list:
    """[dtype, *shape] of a tensor, as JSON holds them."""
    return [str(tensor.dtype).removeprefix("torch."), *tensor.shape]


def _clock(tensor: Any, name: str, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """(timestep, time, groups), each [U]; ValueError where they do not fit each other."""
    timestep, time, groups = (tensor(f"{name}/{what}") for what in ("timestep", "time", "groups"))
    shapes = [list(one.shape) for one in (timestep, time, groups)]
    if groups.ndim != 1 or shapes != [[len(groups)]] * 3:
        raise ValueError(f"timestep, time and groups of '{name}' are of {shapes}, not of one length")
    if not (timestep.is_floating_point() and time.is_floating_point() and groups.dtype == torch.int64):
        raise ValueError(f"timestep, time or groups of '{name}' are of another dtype")
    if bool(((groups < 0) | (groups >= count)).any()):
        raise ValueError(f"the groups of '{name}' go beyond the {count} that are there")
    return timestep, time, groups


def check_times(timestep: Tensor, time: Tensor, name: str, most: float = MOST) -> None:
    """Raises ValueError unless timesteps lie between -most and most, and times in [0, 1]."""
    if not bool((timestep.abs() <= most).all()):
        raise ValueError(f"a timestep of '{name}' is NaN or beyond {most:g}, the range of its scheduler")
    if not bool(((time >= 0) & (time <= 1)).all()):
        raise ValueError(f"a time of '{name}' is not in [0, 1]")


def _sums(found: Any, units: int) -> list[int]:
    if not isinstance(found, list) or len(found) != units:
        raise ValueError("its checksums are not those of its units")
    return found


def _rows(
    path: Path, keys: dict[int, str], sums: dict[int, list[int] | None], _: object, units: Tensor
) -> dict[int, Tensor]:
    """Some units' own tensors, read from the file; _: the owner, which lives as long as this can be called."""

    def picked(file: TensorFile) -> dict[int, Tensor]:
        found = {}
        for index, key in keys.items():
            found[index] = file.rows(key, units)
            known = sums[index]
            if known is not None and checksums(found[index]) != [known[unit] for unit in units.tolist()]:
                raise ValueError(f"the values of '{key}' are not those that were written")
            checked(found[index], key, None)
        return found

    return read_tensors(path, picked, AGAIN)
