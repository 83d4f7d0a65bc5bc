"""What a verb prints: text, or with --json one JSON object, or with --quiet nothing; from the main process alone.

    say("...")                   a line of text for a reader
    result(layers=92, ...)       the same facts for a program: gathered, and printed as one object at the verb's end

Both flags are added to every verb by parser.py. Nothing but this decides what goes to stdout.
"""

from __future__ import annotations

import argparse
import json
import logging
import math
import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, redirect_stdout
from pathlib import Path
from typing import Any

from ..progress import quiet, shown


class _Printing:
    """How the verb that runs prints, and the facts that it gave so far."""

    def __init__(self, quiet: bool = False, json: bool = False):
        self.quiet, self.json = quiet, json
        self.facts: dict[str, Any] = {}


_now = _Printing()


def say(text: str) -> None:
    """Print a line for a reader, once however many processes there are; nothing with --quiet or --json."""
    if not (_now.quiet or _now.json) and main_process():
        tqdm = getattr(sys.modules.get("tqdm"), "tqdm", None)
        (print if tqdm is None else tqdm.write)(text)  # tqdm's way leaves a bar that is being drawn whole
        if sys.stdout is not None:
            sys.stdout.flush()


def result(**facts: Any) -> None:
    """Keep facts for the object that --json prints. A later fact of the same name takes the earlier one's place."""
    _now.facts |= facts


def say_run(folder: Path) -> None:
    """Say where a run of training lies, and what is in it: grids of samples are not always asked for."""
    grids = "sample grids, " if (folder / "samples").is_dir() else ""
    say(f"log, {grids}checkpoint: {folder}")


def main_process() -> bool:
    """Whether this process is the one that prints."""
    states = getattr(sys.modules.get("accelerate"), "PartialState", None)
    if states is not None and states._shared_state:
        return states().is_main_process
    return os.environ.get("RANK", "0") == "0"


@contextmanager
def printing(args: argparse.Namespace) -> Iterator[None]:
    """The block in which a verb runs: its bars, notes and results are shown as the flags say.

    Whatever other libraries print goes to stderr with --json, and nowhere with --quiet. Where the verb fails after it
    gave facts, --json prints these and the error, for figures that cost hours are not lost with the disk.
    """
    global _now
    before, stdout = _now, sys.stdout
    _now = mine = _Printing(getattr(args, "quiet", False), getattr(args, "json", False))
    try:
        with ExitStack() as stack:
            if mine.quiet:
                stack.enter_context(quiet())
                stack.enter_context(_no_warnings())
            if mine.quiet or mine.json:
                other = sys.stderr if mine.json else stack.enter_context(open(os.devnull, "w"))
                stack.enter_context(redirect_stdout(other))
            stack.enter_context(_no_foreign_bars())
            yield
    except BaseException as error:
        if mine.facts:
            result(error=str(error) or type(error).__name__)
            _print_facts(mine, stdout)
        raise
    else:
        _print_facts(mine, stdout)
    finally:
        _now = before


def _print_facts(mine: _Printing, stdout: Any) -> None:
    if mine.json and main_process():
        print(json.dumps(plain(mine.facts), indent=1, allow_nan=False), file=stdout, flush=True)


def plain(value: Any) -> Any:
    """Return a value as JSON has it: NaN and infinity are null, paths, dtypes and devices are text."""
    if value is None or isinstance(value, (bool, str)):
        return value
    if isinstance(value, int):
        return int(value)
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else None
    if isinstance(value, dict):
        return {str(name): plain(one) for name, one in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        return [plain(one) for one in value]
    if hasattr(value, "tolist"):  # a number or an array of numpy, a tensor
        return plain(value.tolist())
    return str(value)


@contextmanager
def _no_warnings() -> Iterator[None]:
    """No warnings, whether Python's or of loggers; errors stay."""
    before = logging.root.manager.disable
    logging.disable(max(before, logging.WARNING))
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


@contextmanager
def _no_foreign_bars() -> Iterator[None]:
    """Where our bars are not shown, those of diffusers, transformers and the hub are not shown either."""
    if "diffusers" not in sys.modules or shown():
        yield
        return
    from diffusers.utils import logging as diffusers_bars
    from huggingface_hub import utils as hub

    switches = [(diffusers_bars.is_progress_bar_enabled, diffusers_bars)]
    if "transformers" in sys.modules:  # imported later, it does as the hub's bars do
        from transformers.utils import logging as transformers_bars

        switches.append((transformers_bars.is_progress_bar_enabled, transformers_bars))
    on = [bars for enabled, bars in switches if enabled()]
    hub_on = not hub.are_progress_bars_disabled()
    for bars in on:
        bars.disable_progress_bar()
    if hub_on:
        hub.disable_progress_bars()
    try:
        yield
    finally:
        for bars in on:
            bars.enable_progress_bar()
        if hub_on:
            hub.enable_progress_bars()
