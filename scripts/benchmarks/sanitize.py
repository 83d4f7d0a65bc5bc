"""Run the kernels' GPU tests under compute-sanitizer: no access out of bounds, and no race, in any kernel.

    python scripts/benchmarks/sanitize.py [--tools memcheck racecheck] [--each 2] [--only hopper] [--output FILE]

Of each test of `tests/kernels/` that needs a GPU so many cases run, spread over its parameters; those of Gluon's
kernels come first. torch's allocator is told to keep nothing, so that what lies behind a tensor is nobody's: tests
that capture a CUDA graph, which may not ask for memory, are left out. A line of JSON a tool: the tests that passed,
what it found, and, where its tests did not run to their end without a failure, why there is no answer (`wrong`). Exit
status 1 where it found anything, or did not run to the end.
"""

from __future__ import annotations

import argparse
import inspect
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

from ptq4dm.errors import UserError, run

REPOSITORY = Path(__file__).resolve().parents[2]
ROOMS = ("w4", "w8a8", "lut", "attention", "shift")  # of tests/kernels: those with kernels in Triton or Gluon
CHOSEN = "PTQ4DM_SANITIZE"  # what the plugin is told: one text, never empty, for compute-sanitizer drops empty ones
FOUND = 86  # the exit status that a tool is told to give where it found something
SUMMARY = re.compile(r"(?:ERROR|RACECHECK) SUMMARY: (.*)")


def pytest_collection_modifyitems(items: list) -> None:
    """As a plugin of pytest: keep some cases of each test that needs a GPU, Gluon's first."""
    chosen, of_each = json.loads(os.environ[CHOSEN]), defaultdict(list)
    for item in items:
        if item.get_closest_marker("gpu") and chosen["only"] in item.nodeid and not _captures(item.function):
            of_each[item.nodeid.split("[")[0]].append(item)
    kept = [case for cases in of_each.values() for case in _spread(cases, chosen["each"])]
    items[:] = sorted(kept, key=lambda item: "hopper" not in item.nodeid)


def _captures(test) -> bool:
    return "cuda.graph(" in inspect.getsource(test)


def pytest_runtest_logreport(report) -> None:
    """As a plugin: note what passed at once, for a tool may take longer than it is given."""
    if report.when == "call" and report.passed:
        with Path(json.loads(os.environ[CHOSEN])["passed"]).open("a") as file:
            print(report.nodeid, file=file)


def _spread(cases: list, count: int) -> list:
    """`count` of them, the middle one of as many equal parts: parameters at the ends are often the trivial ones."""
    count = min(count, len(cases))
    return [cases[(2 * i + 1) * len(cases) // (2 * count)] for i in range(count)]


def checked(tool: str, args) -> dict:
    """What one tool of compute-sanitizer says of the tests."""
    command = [
        args.sanitizer, "--tool", tool, "--error-exitcode", str(FOUND), "--print-limit", "20", sys.executable, "-m",
        "pytest", "-p", "sanitize", "-p", "no:cacheprovider", "-q", *args.tests,
    ]  # fmt: skip
    args.output.parent.mkdir(parents=True, exist_ok=True)
    passed, log = (args.output.with_name(f"{args.output.stem}-{tool}.{kind}") for kind in ("passed", "log"))
    passed.write_text("")
    here = {
        "PYTHONPATH": os.pathsep.join(filter(None, [str(Path(__file__).parent), os.environ.get("PYTHONPATH")])),
        "PYTORCH_NO_CUDA_MEMORY_CACHING": "1",
        CHOSEN: json.dumps({"each": args.each, "only": args.only, "passed": str(passed.resolve())}),
    }
    with log.open("w") as file:
        options = {"cwd": REPOSITORY, "env": os.environ | here, "stdout": file, "stderr": file}
        tests = subprocess.Popen(command, start_new_session=True, **options)
        try:
            status: int | str = tests.wait(args.seconds)
        except subprocess.TimeoutExpired:
            os.killpg(tests.pid, signal.SIGKILL)  # the tool, and the tests that it has started
            tests.wait()
            status = f"stopped after {args.seconds:g} s"
    text, names = log.read_text(errors="replace"), passed.read_text().splitlines()
    found = [line for line in text.splitlines() if line.startswith("=========")]
    if status != 0:
        print("\n".join([*text.splitlines()[-30:], *found[:60]]), file=sys.stderr)
    summary = SUMMARY.findall(text)
    problems = sum("Invalid" in line or "hazard" in line for line in found)
    row = {"summary": summary[-1] if summary else None, "problems": problems, "status": status, "passed": names}
    reason = wrong(row)
    return row | ({"wrong": reason} if reason else {})


def wrong(row: dict) -> str:
    """Why a tool's row is no proof that there is nothing to find; empty where it is one. What a tool sums up counts
    only if tests ran under it: it finds no errors in tests that never began, either."""
    if row["problems"] or row["status"] == FOUND:
        return f"found something: {row['summary'] or 'it was stopped before it summed up'}"
    if not row["passed"]:
        return f"no test passed under it: it did not run ({_ending(row['status'])})"
    if row["status"] != 0:
        return f"not all tests passed under it ({_ending(row['status'])}); those that did: {len(row['passed'])}"
    return "" if row["summary"] else "it did not sum up"


def _ending(status: int | str) -> str:
    return status if isinstance(status, str) else f"exit status {status}"


def main() -> None:
    from bench_common import Lines, made_with  # not at the top: this file is a plugin in pytest, which needs none

    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--tools", nargs="+", choices=("memcheck", "racecheck", "initcheck"), default=["memcheck"])
    parser.add_argument("--each", type=int, default=2, help="cases of each test")
    parser.add_argument("--only", default="", help="tests whose name holds this")
    rooms = [f"tests/kernels/{room}" for room in ROOMS]
    parser.add_argument("--tests", nargs="+", default=rooms, help="files or folders of tests; all rooms with kernels")
    parser.add_argument("--seconds", type=float, default=600, help="that a tool may take")
    parser.add_argument(
        "--sanitizer", default=shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
    )
    parser.add_argument("--output", type=Path, default=Path("out/sanitize.jsonl"))
    args = parser.parse_args()
    if not shutil.which(args.sanitizer):
        raise UserError(f"there is no {args.sanitizer}; it comes with CUDA's toolkit (--sanitizer says where it is).")
    facts = made_with()
    lines, reasons = Lines(args.output, facts), []
    for tool in args.tools:
        row = checked(tool, args)
        lines.add({"tool": tool, "each": args.each, "only": args.only} | row)
        reasons += [f"{tool}: {row['wrong']}"] if "wrong" in row else []
    print("\n".join(reasons), file=sys.stderr, end="\n" if reasons else "")
    sys.exit(bool(reasons))


if __name__ == "__main__":
    run(main)
