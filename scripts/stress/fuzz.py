"""Damaged files: does every loader refuse them in a sentence, and never load something else without a word?

    python scripts/stress/fuzz.py --inputs 100000                     # goes on where it was stopped
    python scripts/stress/fuzz.py --kinds plan store --inputs 2000 --output out/fuzz.jsonl
    python scripts/stress/fuzz.py --only 4711 --seed 0                # one input again, with its traceback

Input k of a seed is always the same file. A line of the output has the counts of some inputs and each bad one whole.
What the outcomes mean, and what no check can see: README.md beside this file. Exit status 1 where any input is bad.
"""

from __future__ import annotations

import argparse
import logging
import os
import shutil
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path

os.environ |= {"TQDM_DISABLE": "1", "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE.parent / "comparisons")]

import torch  # noqa: E402
from conditions import commit  # noqa: E402
from safetensors.torch import save_file  # noqa: E402
from stress import (  # noqa: E402, F401 (they register)
    kinds_calibration,
    kinds_foreign,
    kinds_interchange,
    kinds_packed,
    kinds_results,
)
from stress.judge import BAD, GOOD, Subject, drawn, judged  # noqa: E402
from stress.kinds import KINDS  # noqa: E402
from stress.lines import Lines  # noqa: E402
from stress.table import table  # noqa: E402
from stress.worker import results  # noqa: E402

from ptq4dm.errors import UserError, run  # noqa: E402

OUTPUT = HERE.parent / "results" / "fuzz.jsonl"
MEMORY = "/dev/shm" if os.path.isdir("/dev/shm") else None
CHUNK = 500


def main(argv: list[str] | None = None) -> int:
    """Try inputs and print the table; returns how many are bad."""
    options = parsed(argv)
    if unknown := set(options.kinds) - set(KINDS):
        raise UserError(f"there is no kind '{min(unknown)}'; choose from {', '.join(KINDS)}.")
    quiet()
    folder = Path(tempfile.mkdtemp(prefix="ptq4dm-fuzz-", dir=MEMORY))
    try:
        outside = folder / "outside"
        outside.mkdir()
        save_file({"x": torch.full((4,), 7.0)}, outside / "secret.safetensors", {"format": "pt"})

        def subjects() -> dict[str, Subject]:
            return {name: Subject.of(KINDS[name], folder / f"k{n:02d}") for n, name in enumerate(options.kinds)}

        if options.only is not None:
            return repeat(options, subjects(), outside)
        return sweep(options, subjects, outside)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def parsed(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--inputs", type=int, default=2000, help="how many, from number 0")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kinds", nargs="+", default=list(KINDS), help="kinds of files, all otherwise")
    parser.add_argument("--only", type=int, metavar="K", help="repeat one input in this process and show all of it")
    parser.add_argument("--output", type=Path, default=OUTPUT)
    return parser.parse_args(argv)


def quiet() -> None:
    """What libraries say of damaged files is not asked for."""
    import diffusers

    warnings.simplefilter("ignore")
    diffusers.utils.logging.disable_progress_bar()
    diffusers.utils.logging.set_verbosity(logging.CRITICAL)
    torch.set_num_threads(1)


def sweep(options: argparse.Namespace, make: Callable[[], dict[str, Subject]], outside: Path) -> int:
    """All inputs that are not in the output yet; files are made where there are such."""
    lines = Lines(options.output, {"seed": options.seed, "kinds": sorted(options.kinds), "commit": commit()})
    done = {line["first"] for line in lines}
    missing = [first for first in range(0, options.inputs, CHUNK) if first not in done]
    subjects = make() if missing else {}
    for first in missing:
        began, counts, bad = time.monotonic(), {}, []
        numbers = range(first, min(first + CHUNK, options.inputs))
        for result in results(numbers, options.seed, subjects, outside):
            row = counts.setdefault(result.kind, {})
            row[result.outcome] = row.get(result.outcome, 0) + 1
            if result.outcome in BAD:
                bad.append(result.to_dict())
        seconds = round(time.monotonic() - began, 1)
        lines.add({"first": first, "last": numbers[-1], "counts": counts, "seconds": seconds, "bad": bad})
        print(f"{numbers[-1] + 1} inputs, {len(bad)} of the last {len(numbers)} bad, {seconds} s", file=sys.stderr)
    print(table(summed([line["counts"] for line in lines]), (*GOOD, *BAD), "kind"))
    bad = [one for line in lines for one in line["bad"]]
    for one in sorted(bad, key=lambda one: (one["kind"], one["outcome"], one["place"], one["change"]))[:200]:
        print(*(one[name] for name in ("number", "kind", "outcome", "change", "file", "detail", "place")), sep=" | ")
    return len(bad)


def summed(counts: list[dict[str, dict[str, int]]]) -> dict[str, dict[str, int]]:
    """The sums of many counts, by kind and outcome."""
    whole: dict[str, dict[str, int]] = {}
    for one in counts:
        for kind, row in one.items():
            into = whole.setdefault(kind, {})
            for outcome, number in row.items():
                into[outcome] = into.get(outcome, 0) + number
    return whole


def repeat(options: argparse.Namespace, subjects: dict[str, Subject], outside: Path) -> int:
    """One input again; a traceback is shown whole."""
    subject, change, path = drawn(options.seed, options.only, subjects, outside)
    for name, new in change.files.items():
        print(f"{name}: {new[:400]!r}" if isinstance(new, bytes) else f"{name}: {new}")
    result = judged(options.only, subject, change, path, outside)
    print(result)
    if result.outcome == "traceback":
        subject.place.put(change)
        subject.kind.load(subject.place.folder, subject.state)
    return int(result.outcome in BAD)


if __name__ == "__main__":
    run(lambda: sys.exit(min(1, main())))
