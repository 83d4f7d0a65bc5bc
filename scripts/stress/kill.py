"""Every command is killed, many times, and run again: is the result the same to the bit, with nothing left behind?

    python scripts/stress/kill.py --kills 300                                  # kill -9; goes on where it was stopped
    python scripts/stress/kill.py --signal TERM --verbs collect quantize --kills 50
    python scripts/stress/kill.py --pairs 100                                  # two runs at once into one folder

Half of the kills come at a random moment, half before one of the calls that touch files. README.md beside this file
says what the outcomes mean. Exit status 1 where any is bad.
"""

from __future__ import annotations

import argparse
import os
import shutil
import signal
import sys
import tempfile
from pathlib import Path
from random import Random

os.environ |= {"TQDM_DISABLE": "1", "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE.parent / "comparisons")]

import torch  # noqa: E402
from conditions import commit  # noqa: E402
from stress.lines import Lines  # noqa: E402
from stress.pairs import PAIRED, PairTrial  # noqa: E402
from stress.table import table  # noqa: E402
from stress.trial import BAD, GOOD, Trial  # noqa: E402
from stress.verbs import VERBS, make_inputs  # noqa: E402

from ptq4dm.cli.main import verb_module  # noqa: E402
from ptq4dm.errors import UserError, run  # noqa: E402

RESULTS = HERE.parent / "results"
MEMORY = "/dev/shm" if os.path.isdir("/dev/shm") else None
SIGNALS = {"KILL": signal.SIGKILL, "TERM": signal.SIGTERM, "INT": signal.SIGINT}


def main(argv: list[str] | None = None) -> int:
    """Kill, go on, compare, print the table; returns how many trials are bad."""
    options = parsed(argv)
    if unknown := set(options.verbs or ()) - set(VERBS):
        raise UserError(f"there is no verb '{min(unknown)}'; choose from {', '.join(VERBS)}.")
    torch.set_num_threads(1)
    for name in ("collect", "quantize", "generate", "evaluate", "distill", "bench"):
        verb_module(name)
    folder = Path(tempfile.mkdtemp(prefix="ptq4dm-kill-", dir=MEMORY))
    try:
        inputs = folder / "inputs"
        make_inputs(inputs)
        return sweep(options, folder, inputs)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def parsed(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=60, help="trials, shared out among the verbs in turn")
    parser.add_argument("--pairs", type=int, help="trials of two runs at once instead")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--verbs", nargs="+", help="some verbs, by name")
    parser.add_argument("--signal", choices=SIGNALS, default="KILL")
    parser.add_argument("--only", type=int, metavar="K", help="one trial again; its folder is shown and kept")
    parser.add_argument(
        "--output", type=Path, help="results/kill.jsonl, kill-term.jsonl, kill-int.jsonl, pairs.jsonl"
    )
    return parser.parse_args(argv)


def sweep(options: argparse.Namespace, folder: Path, inputs: Path) -> int:
    """All trials that are not in the output yet."""
    pairs = options.pairs is not None
    names = options.verbs or list(PAIRED if pairs else VERBS)
    trials = {n: (PairTrial if pairs else Trial)(n, VERBS[n], folder, inputs) for n in names}
    settings = {"seed": options.seed, "verbs": names, "commit": commit()}
    settings |= {} if pairs else {"signal": options.signal}
    if options.only is not None:
        name = names[options.only % len(names)]
        dice = Random(f"{options.seed}/{options.only}")
        print(trials[name].run(dice, SIGNALS[options.signal], keep=Path(tempfile.mkdtemp(prefix="trial-"))))
        return 0
    more = "" if options.signal == "KILL" else f"-{options.signal.lower()}"
    output = options.output or RESULTS / ("pairs.jsonl" if pairs else f"kill{more}.jsonl")
    lines = Lines(output, settings)
    done = {line["number"] for line in lines}
    for number in range(options.pairs if pairs else options.kills):
        if number in done:
            continue
        name = names[number % len(names)]
        found = trials[name].run(Random(f"{options.seed}/{number}"), SIGNALS[options.signal])
        lines.add({"number": number, "verb": name, **found})
        if found["outcome"] in BAD:
            print(number, name, *found.values(), sep=" | ", file=sys.stderr)
    counts: dict[str, dict[str, int]] = {}
    for line in lines:
        row = counts.setdefault(line["verb"], {})
        row[line["outcome"]] = row.get(line["outcome"], 0) + 1
    print(table(counts, (*GOOD, *BAD), "verb"))
    print(f"{sum(len(line.get('kills', ())) for line in lines)} kills")
    return sum(line["outcome"] in BAD for line in lines)


if __name__ == "__main__":
    run(lambda: sys.exit(min(1, main())))
