"""Damage without knowledge of a format: bits, lengths, pieces; and what is in a file's place."""

from __future__ import annotations

from collections.abc import Callable

from stress.change import FOLDER, PIPE, REMOVED, Case, Change, Link

BYTES: dict[str, Callable[[Case], Change | None]] = {}
PLACES: dict[str, Callable[[Case], Change | None]] = {}


def _add(table: dict, family: str) -> Callable:
    def add(function: Callable) -> Callable:
        table[f"{family} {function.__name__.strip('_')}"] = function
        return function

    return add


_bytes, _place = _add(BYTES, "bytes"), _add(PLACES, "place")


def _span(case: Case) -> tuple[int, int]:
    start = case.dice.randrange(len(case.data) + 1)
    return start, min(len(case.data), start + case.dice.choice((1, 2, 8, 64, 512)))


@_bytes
def flip(case: Case) -> Change | None:
    data = bytearray(case.data)
    for _ in range(case.dice.choice((1, 1, 1, 3, 20))):
        if data:
            data[case.dice.randrange(len(data))] ^= 1 << case.dice.randrange(8)
    return case.changed("bytes flip", bytes(data))


@_bytes
def cut(case: Case) -> Change | None:
    return case.changed("bytes cut", case.data[: case.dice.choice((0, 1, 7, 8, 9, case.dice.randrange(1 << 20)))])


@_bytes
def cut_end(case: Case) -> Change | None:
    return case.changed("bytes cut end", case.data[: -case.dice.choice((1, 2, 8, 100))])


@_bytes
def extend(case: Case) -> Change | None:
    more = case.dice.choice((b"\0", b"\n", b"}", bytes(8), case.dice.randbytes(50), case.data))
    return case.changed("bytes extend", case.data + more)


@_bytes
def front(case: Case) -> Change | None:
    more = case.dice.choice((b"\0", b"\xef\xbb\xbf", b" ", case.dice.randbytes(8)))
    return case.changed("bytes front", more + case.data)


@_bytes
def zero(case: Case) -> Change | None:
    start, end = _span(case)
    return case.changed("bytes zero", case.data[:start] + bytes(end - start) + case.data[end:])


@_bytes
def noise(case: Case) -> Change | None:
    start, end = _span(case)
    return case.changed("bytes noise", case.data[:start] + case.dice.randbytes(end - start) + case.data[end:])


@_bytes
def lose(case: Case) -> Change | None:
    start, end = _span(case)
    return case.changed("bytes lose", case.data[:start] + case.data[end:])


@_bytes
def swap(case: Case) -> Change | None:
    (a, b), (c, d) = sorted((_span(case), _span(case)))
    if b > c:
        return None
    data = case.data
    return case.changed("bytes swap", data[:a] + data[c:d] + data[b:c] + data[a:b] + data[d:])


@_bytes
def splice(case: Case) -> Change | None:
    other, place = case.dice.choice([*case.donors, *case.files.values()]), case.dice.random()
    return case.changed("bytes splice", case.data[: int(place * len(case.data))] + other[int(place * len(other)) :])


@_bytes
def other_file(case: Case) -> Change | None:
    return case.changed("bytes other file", case.dice.choice([*case.donors, *case.files.values()]), formed=True)


@_place
def missing(case: Case) -> Change | None:
    return Change("place missing", {case.path: REMOVED})


@_place
def folder(case: Case) -> Change | None:
    return Change("place folder", {case.path: FOLDER})


@_place
def pipe(case: Case) -> Change | None:
    return Change("place pipe", {case.path: PIPE})


@_place
def link(case: Case) -> Change | None:
    name = case.path.rpartition("/")[2]
    to = case.dice.choice(("/nothing/here", name, "/dev/null", "/dev/zero", "/proc/self/mem", "."))
    return Change(f"place link {to if to[0] in './' else 'to itself'}", {case.path: Link(to)})


@_place
def neighbour(case: Case) -> Change | None:
    """A file that nobody asked for beside: its name is no UTF-8, or like one of ours."""
    folder, _, name = case.path.rpartition("/")
    strange = case.dice.choice(("\udcff\udcfe", "x\udc80.safetensors", f"{name}\udce9", "a\nb.json", ".DS_Store"))
    strange = case.dice.choice((strange, "000009.png", "batch-00009.safetensors", f"{name}.index.json"))
    content = case.dice.choice((b"", case.data, case.dice.randbytes(100), REMOVED, FOLDER))
    return Change("place neighbour", {f"{folder}/{strange}" if folder else strange: content})


@_place
def exchanged(case: Case) -> Change | None:
    """Two files in each other's place."""
    alike = [n for n in case.files if n != case.path and n.rpartition(".")[2] == case.path.rpartition(".")[2]]
    if not alike:
        return None
    other = case.dice.choice(alike)
    return Change("place exchanged", {case.path: case.files[other], other: case.data}, formed=True)
