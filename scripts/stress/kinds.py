"""The kinds of files that are read, each with its loader, by name. Files named kinds_*.py register theirs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stress.leaves import Leaves, strange

KINDS: dict[str, Kind] = {}


@dataclass
class Kind:
    """Files that a loader reads.

    make: writes them into an empty folder; what it returns is `state`, given to the loader. load: (folder, state) ->
    all that the loader gives, dicts and lists of values and tensors. wrong: (found, right) -> a few words on what no
    honest file gives, "" where there is nothing. guarded: whether a checksum guards what is at a path of the leaves:
    it must never be another. named: whether a refusal must name the file. weight: how often it is drawn.
    """

    name: str
    make: Callable[[Path], Any]
    load: Callable[[Path, Any], Any]
    wrong: Callable[[Leaves, Leaves], str] = strange
    guarded: Callable[[str], bool] = lambda path: False
    weight: int = 4
    named: bool = True


def kind(name: str, make: Callable, **more: Any) -> Callable:
    """Decorator of a loader: make it a kind."""

    def add(load: Callable) -> Callable:
        KINDS[name] = Kind(name, make, load, **more)
        return load

    return add
