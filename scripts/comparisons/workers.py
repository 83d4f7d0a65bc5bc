"""Rows of a table measured one after another, by one process or by several of one machine that share them.

    left, failed = measure_rows([Row("dit-cifar10", "W4A8: base", key)], results, measure, args, make_bench)

Several processes (--workers) take rows in turn from one list and GPUs in turn from CUDA_VISIBLE_DEVICES. Each writes
what it measured into a file of its own beside the output, `table.worker-3.json` beside `table.json`; at the end all
rows are in the output, and those of a command that was killed are put there by the next.
"""

from __future__ import annotations

import multiprocessing
import os
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from long_runs import Deadline

from ptq4dm.errors import UserError
from ptq4dm.files.outside import read_object
from ptq4dm.files.rows import Rows


@dataclass(frozen=True)
class Task:
    """A row to measure. name: what messages call it. key: what `measure` knows it by; other processes get it, too.

    kind, work: how long it takes is judged by rows of its kind (by all, while there are none) in proportion to their
        work, as `Deadline` does.
    """

    model: str
    name: str
    key: Any
    kind: str = ""
    work: float = 1.0


class Turns:
    """The tasks, each given to one process only. Iterating takes the next that nobody has taken."""

    def __init__(self, tasks: list[Task]) -> None:
        self.tasks, self.taken = tasks, multiprocessing.get_context("spawn").Value("i", 0)

    def __iter__(self) -> Iterator[Task]:
        while True:
            with self.taken.get_lock():
                place = self.taken.value
                self.taken.value += 1
            if place >= len(self.tasks):
                return
            yield self.tasks[place]


def measure_rows(
    tasks: list[Task], results: Rows, measure: Callable, args, make_bench: Callable
) -> tuple[int, dict[str, str]]:
    """Measure tasks into `results`: (rows not begun for want of time, task -> why it could not be measured).

    measure: (bench, key, all rows that are there now) -> the row. make_bench: (model, args) -> bench. With
        args.workers above 1 both are functions of a file, which other processes import.
    args: has device, minutes and workers, too.
    """
    turns, deadlines = Turns(tasks), {task.kind: Deadline(args.minutes) for task in tasks}
    failed: dict[str, str] = {}
    if args.workers == 1 or len(tasks) < 2:
        left = _measure(turns, deadlines, results, results, measure, args, make_bench, failed.__setitem__)
        return left, failed
    spawn, running = multiprocessing.get_context("spawn"), []
    count = min(args.workers, len(tasks))
    for place in range(count):
        path = shard_path(results.path, place)
        receive, send = spawn.Pipe(duplex=False)
        work = turns, deadlines, path, results, measure, args, make_bench
        process = spawn.Process(target=_worker, args=(send, *work))
        with _environment(place, count, args.device):
            process.start()
        send.close()
        running.append((place, process, receive))
    dead = {}
    for place, process, receive in running:
        with suppress(EOFError):
            while True:
                name, why = receive.recv()
                failed[name] = why
        process.join()
        if process.exitcode:
            dead[f"worker {place}"] = f"it ended with status {process.exitcode}; what it was at is still to do"
    before = len(results)
    join_shards(results)
    return len(tasks) - (len(results) - before) - len(failed), failed | dead


def check_workers(args) -> None:
    """Raises UserError where `args.workers` processes cannot work on `args.device`."""
    if args.workers < 1:
        raise UserError(f"--workers must be 1 or more, not {args.workers}.")
    device = torch.device(args.device)
    if args.workers > 1 and device.type == "cuda" and (device.index is not None or not gpus()):
        raise UserError("--workers takes all GPUs in turn: give --device cuda, on a machine that has one.")


def join_shards(results: Rows) -> None:
    """Put the rows of workers that are beside the output into it, and take their files away."""
    paths = sorted(results.path.parent.glob(f"{results.path.stem}.worker-*.json"))
    shards = [Rows(path, results.settings) for path in paths]  # refuses those of other settings before any is joined
    for path, shard in zip(paths, shards, strict=True):
        for row in shard:
            if row not in results:
                results.add(row)
        path.unlink()


def shard_path(output: Path, place: int) -> Path:
    """The file of the `place`-th worker."""
    return output.with_name(f"{output.stem}.worker-{place}.json")


@contextmanager
def _environment(place: int, count: int, device: str) -> Iterator[None]:
    """A process that is started in the block sees one GPU, and has its share of the CPU's threads."""
    changes = {}
    if "OMP_NUM_THREADS" not in os.environ:
        changes["OMP_NUM_THREADS"] = str(max(1, torch.get_num_threads() // count))
    if torch.device(device).type == "cuda":
        cards = gpus()
        changes["CUDA_VISIBLE_DEVICES"] = cards[place % len(cards)]
    before = {name: os.environ.get(name) for name in changes}
    os.environ.update(changes)
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name)
            os.environ.update({} if value is None else {name: value})


def gpus() -> list[str]:
    """The GPUs that this process may use, as CUDA_VISIBLE_DEVICES names them."""
    seen = os.environ.get("CUDA_VISIBLE_DEVICES")
    return seen.split(",") if seen else [str(i) for i in range(torch.cuda.device_count())]


def _worker(send, turns, deadlines, path: Path, results: Rows, measure, args, make_bench) -> None:
    own = Rows(path, results.settings)
    _measure(turns, deadlines, own, results, measure, args, make_bench, lambda *words: send.send(words))


def _measure(
    turns: Turns, deadlines: dict, own: Rows, results: Rows, measure, args, make_bench, tell: Callable
) -> int:
    """Measure what is this process's turn into `own`, and say so: how many tasks there was no time for.

    deadlines: by kind. results: of the whole table. tell: told of each task that fails, (its name, why).
    """
    bench, left, parent = None, 0, multiprocessing.parent_process()
    for task in turns:
        if parent is not None and not parent.is_alive():
            break  # killed; who takes its place goes on with what is written
        own_kind, longest = deadlines[task.kind], max(deadlines.values(), key=lambda one: one.longest.value)
        if (own_kind if own_kind.longest.value else longest).passed(task.work):
            left += 1
            continue  # a shorter one may fit
        label = f"{task.model}: {task.name}"
        if bench is None or bench.model != task.model:
            bench = None  # its memory first
            bench = make_bench(task.model, args)
        known = results if own is results else Known(results, own.path)
        try:
            row = measure(bench, task.key, known)
        except Exception as error:  # told, and no end of the other rows
            if not isinstance(error, UserError):
                traceback.print_exc()
            why = str(error) or type(error).__name__
            tell(label, why)
            print(f"failed: {label}: {why}", flush=True)
            continue
        own.add(row | ({"workers": args.workers} if args.workers > 1 else {}))  # whose times are of a busy machine
        deadlines[task.kind].took(row["seconds"], task.work)
        error = f"error {row['eps_error']:.3e}, " if row.get("eps_error") else ""
        print(f"{label}: {error}{row['seconds']:.0f} s", flush=True)
    return left


class Known:
    """All rows that are there now: those of the output, and what the workers have written so far."""

    def __init__(self, results: Rows, own: Path) -> None:
        self.results, self.folder = results, own.parent
        self.pattern = f"{results.path.stem}.worker-*.json"

    def __iter__(self) -> Iterator[dict]:
        yield from self.results
        for path in sorted(self.folder.glob(self.pattern)):
            yield from read_object(path, {"rows": list}, "delete it")["rows"]
