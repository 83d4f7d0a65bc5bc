"""What is still read of the calls of modules that are over, wherever the walk stands.

    read after step p  <-  made by the glue between modules before p  <-  given by a module that is over at p

The glue runs again, the modules do not; so what their outputs are needed for goes through the glue alone. Where
Python looks at values in the glue, other calls may go other ways, and read something else.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from .dataflow import Dataflow


@dataclass(frozen=True)
class Needed:
    """keys: of the calls that are over, in their order. reads: (key, leaf of the output) of what is still read; None
    where that depends on what modules give, so that nothing is sure. opened: modules that may not be kept whole.
    varies: whether it depends on what the model is given."""

    keys: list[str]
    reads: frozenset[tuple[str, int]] | None
    opened: frozenset[str]
    varies: bool


def needed_after(flow: Dataflow, stops: Collection[str]) -> Needed:
    """What is needed when the first of some modules is called."""
    stop = next((call.start for call in flow.calls if call.module in stops), len(flow.steps) - 1)
    opened = {call.module for call in flow.calls[1:] if call.end >= 0 and not call.kept}
    while True:
        over = _over(flow, stop, opened)
        reads, escaped = _read(flow, stop, over)
        if not escaped:
            varies, unsure = _decided(flow, stop, over)
            keys = [flow.calls[one].key for one in over]
            return Needed(keys, None if unsure else frozenset(reads), frozenset(opened), varies)
        opened |= escaped


def _over(flow: Dataflow, stop: int, opened: Collection[str]) -> list[int]:
    """The numbers of the largest calls that have ended and may be kept."""
    over: list[int] = []
    waiting = [0]
    while waiting:
        number = waiting.pop()
        call = flow.calls[number]
        if number and 0 <= call.end <= stop and call.module not in opened:
            over.append(number)
        elif call.start < stop or not number:
            waiting += reversed(call.inner)
    return over


def _read(flow: Dataflow, stop: int, over: list[int]) -> tuple[set[tuple[str, int]], set[str]]:
    """(key and leaf of what is read after a step, the modules of which more is read than what they gave)."""
    around = _around(flow, over)
    waiting = [one for step in flow.steps[stop:] for one in step.reads if one < stop]
    waiting += [i for i, step in enumerate(flow.steps[:stop]) if step.decides and around[step.inside] is None]
    reads: set[tuple[str, int]] = set()
    escaped: set[str] = set()
    seen: set[int] = set()
    while waiting:
        if (number := waiting.pop()) in seen:
            continue
        seen.add(number)
        step = flow.steps[number]
        call = around[step.inside]
        if call is None:
            waiting += step.reads
        elif step.leaves and step.inside == call:
            reads |= {(flow.calls[call].key, leaf) for leaf in step.leaves}
        else:
            escaped.add(flow.calls[call].module)
    return reads, escaped


def _decided(flow: Dataflow, stop: int, over: list[int]) -> tuple[bool, bool]:
    """(whether Python looks at values in the glue, whether at some that a module made)."""
    around = _around(flow, over)
    glue = {i for i, call in enumerate(flow.calls) if around[i] is None and (call.start < stop or not i)}
    waiting = [i for i, step in enumerate(flow.steps) if step.decides and step.inside in glue]
    varies, seen = bool(waiting), set[int]()
    while waiting:
        if (number := waiting.pop()) not in seen:
            seen.add(number)
            step = flow.steps[number]
            if step.leaves or step.inside not in glue:
                return True, True
            waiting += step.reads
    return varies, False


def _around(flow: Dataflow, over: list[int]) -> list[int | None]:
    """Of each call the one that is over that it is or is inside of."""
    ends, found = set(over), list[int | None]()
    for number, call in enumerate(flow.calls):
        found.append(number if number in ends else found[call.parent] if number else None)
    return found
