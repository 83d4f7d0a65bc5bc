"""Whole calls of a module, as they were made: their arguments with their structure, in groups of one signature.

A unit of calibration is a call. Where the rows of a call are known to be calls of their own (images of one batch),
each row is a unit, and rows of one group are put into one call again, however many. Nothing here guesses which axis
that is: who records says so.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from ..pipelines.denoiser import time_names


@dataclass(frozen=True)
class Call:
    """Arguments of one call of a module."""

    args: tuple
    kwargs: dict[str, Any]

    def flat(self) -> tuple[list, pytree.TreeSpec]:
        """(leaves, structure): tensors and plain values, and the tuples, lists and dicts that hold them."""
        return pytree.tree_flatten((self.args, self.kwargs))

    @staticmethod
    def nested(leaves: Sequence, structure: pytree.TreeSpec) -> Call:
        """The inverse of `flat`: new containers, so that a model may change what it is given."""
        args, kwargs = pytree.tree_unflatten(leaves, structure)
        return Call(tuple(args), dict(kwargs))

    def map(self, change: Callable[[Tensor], Tensor]) -> Call:
        """The same call with each tensor changed."""
        leaves, structure = self.flat()
        return Call.nested([change(leaf) if isinstance(leaf, Tensor) else leaf for leaf in leaves], structure)


@dataclass
class Part:
    """Units that lie in one place, in memory or in a file.

    count: units. load: [n] numbers of units -> leaf index -> [n, ...] tensor, what the units have of their own.
    """

    count: int
    load: Callable[[Tensor], dict[int, Tensor]]

    @staticmethod
    def of(tensors: dict[int, Tensor], count: int) -> Part:
        """A part in memory: leaf index -> [count, ...] tensor."""
        return Part(count, lambda units: {index: tensor[units] for index, tensor in tensors.items()})


@dataclass
class Group:
    """Calls of one signature: all but the own tensors of each unit is the same.

    structure: containers of (args, kwargs). leaves: the values in them; those of `own` are None.
    own: indices of the leaves that each unit has of its own. joined: units are rows of one call, which lie along the
        first axis of each own tensor; else a unit is a call, and own tensors have one axis more, in front.
    """

    structure: pytree.TreeSpec
    leaves: list
    own: tuple[int, ...]
    joined: bool
    parts: list[Part] = field(default_factory=list)

    @staticmethod
    def of(
        leaves: Sequence, structure: pytree.TreeSpec, own: dict[int, Tensor], *, joined: bool, count: int
    ) -> Group:
        """A group of `count` units in memory: leaves of a call, and leaf index -> [count, ...] tensor of its own."""
        shared = [None if i in own else leaf for i, leaf in enumerate(leaves)]
        return Group(structure, shared, tuple(own), joined, [Part.of(own, count)])

    @cached_property
    def key(self) -> str:
        """A digest of the signature, shapes of own tensors included: groups of one key are one group."""
        first = self.parts[0].load(torch.zeros(1, dtype=torch.int64))
        return signature(self.structure, self.own, self.joined, [first[i] for i in self.own], self.leaves)

    def read(self, units: Sequence[int]) -> dict[int, Tensor]:
        """leaf index -> own tensors [len(units), ...] of some units, by number; each part is opened once."""
        starts = [0]
        for part in self.parts:
            starts.append(starts[-1] + part.count)
        wanted = torch.as_tensor(list(units))
        found: dict[int, Tensor] = {}
        for part, start, end in zip(self.parts, starts, starts[1:], strict=False):
            here = ((wanted >= start) & (wanted < end)).nonzero().flatten()
            if not len(here):
                continue
            for index, picked in part.load(wanted[here] - start).items():
                if index not in found:
                    found[index] = picked.new_empty(len(wanted), *picked.shape[1:])
                found[index][here] = picked
        return found

    def call(self, units: Sequence[int]) -> Call:
        """The one call of some units: of rows any number, else of one."""
        own = self.read(units)
        leaves = list(self.leaves)
        for index, tensor in own.items():
            leaves[index] = tensor if self.joined else tensor[0]
        return Call.nested([leaf.clone() if isinstance(leaf, Tensor) else leaf for leaf in leaves], self.structure)


def signature(
    structure: pytree.TreeSpec, own: Sequence[int], joined: bool, tensors: Sequence[Tensor], leaves: Sequence
) -> str:
    """A digest of all that the calls of a group have in common; tensors: [n, ...] of each leaf of `own`, any n."""
    digest = hashlib.sha256(repr((structure, tuple(own), joined)).encode())
    digest.update(repr([(tuple(one.shape[1:]), one.dtype) for one in tensors]).encode())
    for leaf in leaves:
        digest.update(_bytes(leaf))
    return digest.hexdigest()


class Calls:
    """Recorded units, in the order in which they were recorded.

    timestep: [U] float64, one number for each unit of what its model was called with (the largest of a tensor).
    time: [U] float64 in [0, 1], where that lies in the range of the scheduler; 1 is pure noise.
    dtype: of the model that was recorded; source: a digest of its layers, "" where nobody knows.

    `calls[k]`, `calls[2:5]` and `calls[index tensor]` pick units; `calls.call()` is the arguments of one call.
    """

    def __init__(self, dtype: torch.dtype | None = None, source: str = "") -> None:
        self.groups: list[Group] = []
        self.places = torch.zeros(0, 2, dtype=torch.int64)  # group and number in it, of each unit
        self.timestep = self.time = torch.zeros(0, dtype=torch.float64)
        self.dtype, self.source = dtype, source

    def __len__(self) -> int:
        return len(self.places)

    def add(self, group: Group, timestep: Tensor, time: Tensor) -> None:
        """Add the units of a group; timestep, time: [U], as in `Calls`."""
        if not len(timestep):
            return
        one = Calls(self.dtype)
        rows = torch.arange(len(timestep))
        one.groups, one.places = [group], torch.stack([torch.zeros_like(rows), rows], 1)
        one.timestep, one.time = timestep.double(), time.double()
        self.join(one)

    def join(self, other: Calls) -> None:
        """Add all units of other calls after these, wherever they lie: nothing is read."""
        self.dtype, self.source = self.dtype or other.dtype, self.source or other.source
        places = other.places.clone()
        for number, group in enumerate(other.groups):
            known = next((i for i, one in enumerate(self.groups) if one.key == group.key), len(self.groups))
            if known == len(self.groups):
                self.groups.append(Group(group.structure, group.leaves, group.own, group.joined))
                self.groups[known].key = group.key
            start = sum(part.count for part in self.groups[known].parts)
            self.groups[known].parts += group.parts
            mine = other.places[:, 0] == number
            places[mine, 0], places[mine, 1] = known, places[mine, 1] + start
        self.places = torch.cat([self.places, places])
        self.timestep = torch.cat([self.timestep, other.timestep])
        self.time = torch.cat([self.time, other.time])

    @staticmethod
    def together(parts: Sequence[Calls]) -> Calls:
        """The units of several recordings, one after the other."""
        whole = Calls()
        for part in parts:
            whole.join(part)
        return whole

    def __getitem__(self, units: int | slice | Tensor | Sequence[int]) -> Calls:
        if isinstance(units, int):
            units = slice(units, None if units == -1 else units + 1)
        picked = Calls(self.dtype, self.source)
        picked.groups = self.groups
        picked.places, picked.timestep, picked.time = self.places[units], self.timestep[units], self.time[units]
        return picked

    @property
    def shared(self) -> dict[str, Any]:
        """What the units of the first group have in common, by the places of arguments ("img_ids", "0", "a/b")."""
        if not len(self):
            return {}
        group = self.groups[int(self.places[0, 0])]
        numbered = pytree.tree_unflatten(list(range(len(group.leaves))), group.structure)
        paths, _ = pytree.tree_flatten_with_path(numbered)
        names = {
            i: "/".join(str(getattr(key, "key", getattr(key, "idx", key))) for key in path[1:]) for path, i in paths
        }
        return {name: group.leaves[i] for i, name in names.items() if i not in group.own}

    @property
    def joined(self) -> bool:
        """Whether all units are rows."""
        return all(self.groups[group].joined for group in self.places[:, 0].unique().tolist())

    def batches(self, size: int) -> Iterator[Calls]:
        """The same units as calls to be made: group by group, of rows at most `size` at a time."""
        for group in dict.fromkeys(self.places[:, 0].tolist()):
            rows = (self.places[:, 0] == group).nonzero().flatten()
            for part in rows.split(size if self.groups[group].joined else 1):
                yield self[part]

    def call(self) -> Call:
        """The one call that these units are. Raises ValueError where they are several."""
        groups = self.places[:, 0].unique()
        if len(groups) != 1 or not (self.groups[int(groups[0])].joined or len(self) == 1):
            raise ValueError(f"{len(self)} units in {len(groups)} groups are not one call; see Calls.batches.")
        return self.groups[int(groups[0])].call(self.places[:, 1].tolist())

    def __repr__(self) -> str:
        joined = sum(int(self.groups[group].joined) for group, _ in self.places.tolist())
        return f"Calls({len(self)} units: {joined} rows, {len(self) - joined} whole calls)"


def whole_call(call: Call, timestep: float, time: float) -> tuple[Group, Tensor, Tensor]:
    """What `Calls.add` takes, of one call that is a unit."""
    leaves, structure = call.flat()
    own = tuple(i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor))
    tensors = {i: leaves[i][None] for i in own}
    number = torch.tensor([timestep], dtype=torch.float64)
    group = Group.of(leaves, structure, tensors, joined=False, count=1)
    return group, number, torch.tensor([time], dtype=torch.float64)


def rows_of_call(
    call: Call, own: Sequence[int], rows: Tensor, timestep: float, time: float
) -> tuple[Group, Tensor, Tensor]:
    """What `Calls.add` takes, of some rows of a call. own: the leaves whose first axis are the rows."""
    leaves, structure = call.flat()
    tensors = {i: leaves[i][rows.to(leaves[i].device)] for i in own}
    rest = [None if i in tensors else leaf for i, leaf in enumerate(leaves)]
    group = Group(structure, rest, tuple(own), True, [Part.of(tensors, len(rows))])
    number = torch.full((len(rows),), timestep, dtype=torch.float64)
    return group, number, torch.full_like(number, time)


def calls_of_rows(*args: Any, timestep: Tensor | None = None, shared: dict | None = None, **kwargs: Any) -> Calls:
    """Calls made by hand: each tensor of args and kwargs has a row for each unit; `shared` are arguments of all.

    timestep: [U], also an argument of the model; times above 1 are thousandths.
    """
    if timestep is not None:
        kwargs = {"timestep": timestep, **kwargs}
    own = [leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
    leaves, structure = Call(args, {**kwargs, **(shared or {})}).flat()
    tensors = {i: leaf for i, leaf in enumerate(leaves) if any(leaf is one for one in own)}
    number = torch.zeros(len(own[0])) if timestep is None else timestep.double().cpu()
    scale = 1000.0 if float(number.max()) > 1 else 1.0
    calls = Calls(own[0].dtype if own[0].is_floating_point() else None)
    group = Group.of(leaves, structure, tensors, joined=True, count=len(own[0]))
    calls.add(group, number, number / scale)
    return calls


# --- the time of a call ---------------------------------------------------------------------------------------


def timestep_of(arguments: dict[str, Any]) -> float | None:
    """One number of a call's arguments by name: the largest time in them; None where there is none."""
    numbers = [
        float(torch.as_tensor(leaf).max())
        for name in time_names(list(arguments))
        for leaf in pytree.tree_leaves(arguments[name])
        if isinstance(leaf, (int, float)) or (isinstance(leaf, Tensor) and leaf.numel())
    ]
    return max(numbers, default=None)


def parameter_place(model: nn.Module) -> tuple[torch.device, torch.dtype]:
    """Where a model is and its dtype."""
    parameter = next(model.parameters())
    return parameter.device, getattr(model, "dtype", parameter.dtype)


def _bytes(leaf: Any) -> bytes:
    if not isinstance(leaf, Tensor):
        return repr((type(leaf).__name__, leaf)).encode()
    data = leaf.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()
    return repr((leaf.dtype, tuple(leaf.shape))).encode() + data
