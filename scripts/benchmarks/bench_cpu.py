"""One forward of a denoiser on a CPU by all that it can be run by, in one process: time and error.

    python scripts/benchmarks/bench_cpu.py [--model unet-cifar10] [--batch-sizes 16 1] --output cpu-unet.json

Candidates take turns, so that whatever else the machine does falls on all of them; a ratio is that of medians. NNCF
and OpenVINO are candidates where they are installed. Errors are |e_q - e|^2 / |e|^2, to the float32 model's output e,
on calls of held-out seeds in more steps than those of calibration; "low" is the mean of those below the lowest
timestep that calibration saw. Times come first, then errors; every round and every error is written when it is known:
a run that is stopped goes on where it was, and a table is printed of what there is. With --seconds no candidate is
made in the second half of them, and those that are not made are named.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import sys
import time
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "comparisons"))

import torch  # noqa: E402
from conditions import commit  # noqa: E402
from cpu_candidates import FIRST, Run, candidates  # noqa: E402
from cpu_subjects import Row, Subject, subject_of  # noqa: E402

from ptq4dm.errors import UserError, run  # noqa: E402
from ptq4dm.files.rows import Rows  # noqa: E402

GROUPS = ["compiled", "openvino", "nncf", "W8A8", "SVDQuant", "reference", "QoQ"]
CLOCKS = {"wall": time.perf_counter, "thread": time.thread_time}


@torch.no_grad()
def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", default="unet-cifar10", help="unet-cifar10, dit-cifar10 or latent-unet")
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[16, 1])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--clock", default="wall", choices=CLOCKS, help="thread: for one thread on a busy machine")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--groups", nargs="*", default=GROUPS, choices=GROUPS, help="candidates beside PyTorch's own")
    parser.add_argument("--nncf-rows", type=int, default=64, help="calls of one sample that NNCF calibrates on")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="no round starts later than that")
    parser.add_argument("--commit", default=None, help="of the code, where it is not in a git repository")
    parser.add_argument("--output", type=Path, required=True)
    args = parser.parse_args()
    begin = time.monotonic()
    if args.clock == "thread" and args.threads != 1:
        raise UserError("the clock of a thread is for --threads 1.")
    torch.set_num_threads(args.threads)
    settings = {"model": args.model, "threads": args.threads, "cpu": processor(), "nncf_rows": args.nncf_rows}
    settings |= {"commit": args.commit or commit()} | {
        name: version_of(name) for name in ("torch", "openvino", "nncf")
    }
    if args.clock != "wall":
        settings["clock"] = args.clock
    rows = Rows(args.output, settings, {"kind": str})

    subject = subject_of(args.model, args.nncf_rows)
    runs = made(subject, args.groups, begin + args.seconds / 2)
    warm = set()
    for i in range(args.rounds):
        for batch in args.batch_sizes:
            done = sum(row["kind"] == "round" and row["batch"] == batch for row in rows)
            if i < done or time.monotonic() - begin > args.seconds:
                continue
            row = subject.batch(batch)
            for call in list(runs.values()) * (0 if batch in warm else 3):
                call(row)
            warm.add(batch)
            turns = {name: (call, row, CLOCKS[args.clock]) for name, call in runs.items()}
            rows.add({"kind": "round", "batch": batch, "ms": {name: timed(*one) for name, one in turns.items()}})
    exact = [runs[FIRST](row) for row in subject.held_out]
    for name, call in runs.items():
        known = any(row["kind"] == "error" and row["candidate"] == name for row in rows)
        if not known and "compiled" not in name:  # compiled for each shape anew, and what it computes is the same
            rows.add({"kind": "error", "candidate": name, **errors(call, exact, subject)})
    print(table(rows))


def made(subject: Subject, groups: list[str], until: float) -> dict[str, Run]:
    """The candidates that can be made, none begun after `until`; what is not made is named on stderr."""
    runs: dict[str, Run] = {}
    for name, make in candidates(subject, groups):
        begin = time.monotonic()
        if begin > until:
            print(f"left out: {name}: half of the time is over", file=sys.stderr, flush=True)
            continue
        try:
            runs[name] = make()
            runs[name](subject.held_out[0])
        except UserError as error:
            runs.pop(name, None)
            print(f"left out: {name}: {error}", file=sys.stderr, flush=True)
        else:
            print(f"made in {time.monotonic() - begin:.0f} s: {name}", file=sys.stderr, flush=True)
    return runs


def timed(call: Run, row: Row, clock: Callable[[], float]) -> float:
    begin = clock()
    call(row)
    return (clock() - begin) * 1e3


def errors(call: Run, exact: list[torch.Tensor], subject: Subject) -> dict[str, float]:
    """The median and the mean over held-out calls, and the mean over those below the lowest calibrated time."""
    pairs = [(call(row), b, float(row[1].max())) for row, b in zip(subject.held_out, exact, strict=True)]
    found = [(float((a - b).square().sum() / b.square().sum()), at) for a, b, at in pairs]
    every = [error for error, _ in found]
    low = [error for error, at in found if at < subject.lowest]
    return {"median": statistics.median(every), "mean": statistics.mean(every), "low": statistics.mean(low)}


def table(rows: list[dict]) -> str:
    """A line for each batch and candidate: the median time, how many times as fast as `FIRST`, and the errors."""
    error_of = {row["candidate"]: row for row in rows if row["kind"] == "error"}
    rounds = [row for row in rows if row["kind"] == "round"]
    lines = []
    for batch in dict.fromkeys(row["batch"] for row in rounds):
        times = [row["ms"] for row in rounds if row["batch"] == batch]
        lines += [
            "",
            f"batch {batch} ({len(times)} rounds) | ms | x | median error | mean | low times",
            "|---" * 6 + "|",
        ]
        base = statistics.median(one[FIRST] for one in times)
        for name in dict.fromkeys(name for one in times for name in one):
            spent = statistics.median(one[name] for one in times if name in one)
            found = error_of.get(name)
            parts = (
                [f"{found[key]:.1e}" for key in ("median", "mean", "low")] if found and name != FIRST else [""] * 3
            )
            lines.append(" | ".join([name, f"{spent:.1f}", f"{base / spent:.2f}", *parts]))
    return "\n".join(f"| {line} |" if line and line[0] != "|" else f"{line}" for line in lines)


def version_of(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def processor() -> str:
    """The processor's name, and what it has for products of integers and bfloat16."""
    file = Path("/proc/cpuinfo")
    lines = file.read_text().splitlines() if file.is_file() else []
    facts = dict(line.split(":", 1) for line in lines if ":" in line)
    facts = {key.strip(): value.strip() for key, value in facts.items()}
    flags = [one for one in ("avx512_vnni", "avx512_bf16", "amx_int8") if one in facts.get("flags", "").split()]
    return f"{facts.get('model name', platform.processor())} ({', '.join(flags)})"


if __name__ == "__main__":
    run(main)
