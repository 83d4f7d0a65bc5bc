"""Cells of the table: run one, and say in a line what came of it."""

from __future__ import annotations

import time
from typing import Any

from .columns import Column, called
from .subject import FLOAT, Subject

OK, FAILS, NOT_APPLICABLE = "ok", "fails", "n/a"


def cell(subject: Subject, column: Column) -> dict[str, Any]:
    """{"result", "reason", "figures", "seconds"} of one column of one case.

    A format that the class could not be quantized to counts in the column of that format, and is left out of the
    columns of what is done with it; where none is left they fail.
    """
    start = time.perf_counter()
    result, reason, figures = OK, "", {}
    kinds = list(column.kinds)
    if not column.quantizes:
        kinds = [kind for kind in kinds if not failure(subject.model, kind)]
    if not kinds:
        result, reason = FAILS, f"not quantized: {failure(subject.model, column.kinds[0])}"
    for kind in kinds:
        try:
            found = column.run(subject, kind)
            figures |= {f"{kind} {name}": round(value, 6) for name, value in found.items()}
        except Exception as error:
            result, reason = FAILS, f"{kind}: {one_line(error)}" if len(column.kinds) > 1 else one_line(error)
            break
    if result == FAILS:
        in_float = failure(called, subject, FLOAT) or (not column.quantizes and failure(column.run, subject, FLOAT))
        if in_float:
            result, reason = NOT_APPLICABLE, f"float: {in_float}"
    return {"result": result, "reason": reason, "figures": figures, "seconds": round(time.perf_counter() - start, 2)}


def failure(function: Any, *arguments: Any) -> str:
    """What a call raises, in a line; "" where it works."""
    try:
        function(*arguments)
    except Exception as error:
        return one_line(error)
    return ""


def one_line(error: Exception) -> str:
    """An error's class and the beginning of its message."""
    text = " ".join(str(error).split())
    kind = "" if type(error).__name__ in ("UserError", "Wrong") else f"{type(error).__name__}: "
    return kind + (text if len(text) <= 160 else text[:157] + "...")


def answered(answer: str) -> dict[str, Any]:
    """{"result", "reason", "figures"} of a pipeline's answer: "ok", "ok 0.01" (an error), "ok what", "n/a why",
    "FAIL why", or "-" where a column before it failed."""
    word, _, rest = answer.partition(" ")
    if word == "ok":
        number = rest.replace(".", "", 1).isdigit()
        return {"result": OK, "reason": "", "figures": {"error": float(rest)} if number else {}}
    if word == "-":
        return {"result": FAILS, "reason": "a column before it failed", "figures": {}}
    return {"result": NOT_APPLICABLE if word == "n/a" else FAILS, "reason": rest, "figures": {}}
