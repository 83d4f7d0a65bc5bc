"""The table of pipelines: what `pipeline_columns.py` says of each, as cells of the sweep.

It and the catalogue `pipelines.py` are scripts of their own: import this file only where this folder is on the path.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import pipeline_columns
from pipelines import PIPELINES

from .cells import answered, one_line

# In the order in which they are run, and what a cell needs to pass.
COLUMNS = {
    "float": "the pipeline itself runs offline, in full precision",
    "collect": "calls of its denoisers are collected",
    "W8A8": f"denoisers' outputs on recorded calls are off by at most {pipeline_columns.BOUND:g}",
    "all": "every network that is run at each step is quantized",
    "save": "saved and loaded, denoisers give the same to the bit",
    "run": "the quantized pipeline runs, with finite outputs",
}


def cells(build: Callable[[], Any]) -> dict[str, dict[str, Any]]:
    """column -> {"result", "reason", "figures", "seconds"} of one pipeline; seconds are shared out evenly."""
    start = time.perf_counter()
    try:
        answers = pipeline_columns.columns(build())
    except Exception as error:
        answers = dict.fromkeys(COLUMNS, f"n/a not built: {one_line(error)}")
    seconds = round((time.perf_counter() - start) / len(answers), 2)
    return {name: {**answered(answer), "seconds": seconds} for name, answer in answers.items()}


__all__ = ["COLUMNS", "PIPELINES", "cells"]
