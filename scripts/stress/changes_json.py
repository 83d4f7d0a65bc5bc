"""Damage of JSON values: in JSON files and lines, in headers of safetensors files, in texts of PNG files."""

from __future__ import annotations

import json
import struct
import zlib
from collections.abc import Callable, Iterator
from typing import Any

from stress.change import Case, Change

NESTED = 100_000
RAW = {
    "nan": ["NaN"],
    "infinity": ["Infinity", "-Infinity", "1e999"],
    "huge": ["9" * 5000, "1" + "0" * 30, "1e308", "-1e308", "2147483648", "9223372036854775808", "1e-320"],
    "range": ["0", "-1", "1", "2", "3", "16", "1000", "-0.0", "0.5", "1.5", "-7.25", "1e9"],
    "retype": ["null", "true", '"8"', '""', "[]", "{}", "[1]", '{"a": 1}', "8.0", '"x"', "[[]]", '[null, "é"]'],
    "unicode": ['"\\ud800"', '"\\u0000"', '"é\\u202e"', '"a\\nb"', '"' + "x" * 5000 + '"', '"../../x"', '"/etc/x"'],
    "nest": ["[" * NESTED + "]" * NESTED, '{"a":' * NESTED + "0" + "}" * NESTED, "[" * NESTED],
}
MARK = "\ue000mark\ue000"


def changed_json(case: Case, text: str, donors: list[Any]) -> tuple[str, str] | None:
    """(what was done, the new text), of a text that is one JSON value; None where it is none."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return None
    nodes = list(_nodes(value))
    if not nodes:
        return "replace", case.dice.choice(RAW["retype"])
    dice = case.dice
    holder, key = dice.choice(nodes)
    what = dice.choice((*RAW, "range", "delete", "twice", "other", "add", "order", "near", "whole", "rename"))
    if what in RAW:
        holder[key] = MARK
        return what, _dumped(value).replace(json.dumps(MARK), dice.choice(RAW[what]))
    if what == "whole":
        return what, dice.choice(RAW[dice.choice(list(RAW))])
    if what == "twice":
        if not isinstance(holder, dict):
            return None
        text = json.dumps(key) + ": " + dice.choice((_dumped(holder[key]), "0", "null"))
        holder[MARK] = 0
        return what, _dumped(value).replace(f"{json.dumps(MARK)}: 0", text)
    _in_place(what, holder, key, case, nodes, donors)
    return what, _dumped(value)


def _in_place(what: str, holder: Any, key: Any, case: Case, nodes: list, donors: list[Any]) -> None:
    dice, old = case.dice, holder[key]
    if what == "delete":
        del holder[key]
    elif what == "other":
        there, name = dice.choice(nodes)
        holder[key] = json.loads(_dumped(dice.choice([there[name], *donors])))
    elif what == "add":
        if isinstance(holder, dict):
            holder[dice.choice(("x", "format", "adapters", "é", "__class__", "version"))] = dice.choice(
                (1, None, "x")
            )
        else:
            holder.insert(key, old)
    elif what == "rename" and isinstance(holder, dict):
        holder[f"{key}x"] = holder.pop(key)
    elif what == "order" and isinstance(holder, dict):
        items = list(holder.items())
        dice.shuffle(items)
        holder.clear()
        holder.update(items)
    elif isinstance(old, bool):
        holder[key] = not old
    elif isinstance(old, (int, float)):
        holder[key] = dice.choice((old + 1, old - 1, -old, old * 2, old / 3, float(old)))
    elif isinstance(old, str):
        holder[key] = dice.choice((old[:-1], old + "x", old.upper()))
    elif isinstance(old, list):
        holder[key] = dice.choice((old[:-1], old[::-1], old * 2))
    else:
        holder[key] = None


def _nodes(value: Any) -> Iterator[tuple[Any, Any]]:
    """(holder, key) of every value within another."""
    for key in value if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ():
        yield value, key
        yield from _nodes(value[key])


def _dumped(value: Any) -> str:
    return json.dumps(value, indent=1)


# ---------------------------------------------------------------------- where JSON is


def json_file(case: Case) -> Change | None:
    """Of a .json file, of one line of a .jsonl file."""
    try:
        text = case.data.decode()
    except UnicodeDecodeError:
        return None
    if case.path.endswith(".jsonl"):
        lines = text.splitlines()
        number = case.dice.randrange(len(lines)) if lines else 0
        found = changed_json(case, lines[number], []) if lines else None
        if found is None:
            return None
        lines[number] = found[1].replace("\n", " ")
        return case.changed(f"json {found[0]}", "".join(f"{line}\n" for line in lines).encode(), formed=True)
    found = changed_json(case, text, [])
    return found and case.changed(f"json {found[0]}", found[1].encode(), formed=True)


def header(case: Case) -> Change | None:
    """Of the header of a safetensors file: names, dtypes, shapes and places of tensors."""
    text, body = split_safetensors(case.data)
    found = changed_json(case, text, [])
    if found is None:
        return None
    return case.changed(f"header {found[0]}", joined_safetensors(found[1], body), formed=True)


def inner(case: Case) -> Change | None:
    """Of a JSON text in the header of a safetensors file, or in a PNG file."""
    if case.path.endswith(".png"):
        return _png_text(case)
    text, body = split_safetensors(case.data)
    head = json.loads(text)
    texts = head.get("__metadata__") or {}
    if not texts:
        return None
    name = case.dice.choice(sorted(texts))  # safetensors writes them in any order
    found = changed_json(case, texts[name], [])
    if found is None:
        return None
    texts[name] = found[1]
    return case.changed(f"inner {found[0]}", joined_safetensors(json.dumps(head), body), formed=True)


def split_safetensors(data: bytes) -> tuple[str, bytes]:
    (length,) = struct.unpack("<Q", data[:8])
    return data[8 : 8 + length].decode(), data[8 + length :]


def joined_safetensors(header: str, body: bytes) -> bytes:
    head = header.encode()
    return struct.pack("<Q", len(head)) + head + body


def _png_text(case: Case) -> Change | None:
    data, place = case.data, 8
    while place + 8 <= len(data):
        (length,), kind = struct.unpack(">I", data[place : place + 4]), data[place + 4 : place + 8]
        if kind == b"tEXt":
            keyword, _, text = data[place + 8 : place + 8 + length].partition(b"\0")
            found = changed_json(case, text.decode("latin-1"), [])
            if found is None:
                return None
            content = kind + keyword + b"\0" + found[1].encode("latin-1", "replace")
            chunk = struct.pack(">I", len(content) - 4) + content + struct.pack(">I", zlib.crc32(content))
            return case.changed(f"inner {found[0]}", data[:place] + chunk + data[place + 12 + length :], formed=True)
        place += 12 + length
    return None


JSON: dict[str, Callable[[Case], Change | None]] = {"json": json_file, "header": header, "inner": inner}
