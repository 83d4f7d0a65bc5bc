"""Does every denoiser class of diffusers, and every pipeline, work when it is quantized? Tables: sweep/README.md.

    python scripts/sweep_models.py                                  # what is not in the output yet: minutes on a core
    python scripts/sweep_models.py --only "Flux*" "Wan*" --columns W8A8 LoRA
    python scripts/sweep_models.py --table                          # writes the tables into the page, runs nothing

A row holds one cell: what came of it, the reason, figures, seconds, and what it was made with. A failure never stops
the rest. Rows made with the same commit, versions, seed and backend are kept.
"""

from __future__ import annotations

import argparse
import contextlib
import fnmatch
import gc
import importlib.metadata
import io
import logging
import os
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE / "comparisons"), str(HERE / "sweep")]

MEMORY = "/dev/shm" if os.path.isdir("/dev/shm") else None  # offloading waits for each tensor to be on disk

import diffusers  # noqa: E402
import torch  # noqa: E402
from conditions import commit  # noqa: E402
from sweep.cells import FAILS, cell  # noqa: E402
from sweep.classes.case import Case  # noqa: E402
from sweep.classes.catalogue import CASES  # noqa: E402
from sweep.columns import columns  # noqa: E402
from sweep.lines import Lines  # noqa: E402
from sweep.report import check, write  # noqa: E402
from sweep.subject import Subject  # noqa: E402

from ptq4dm.errors import UserError, run  # noqa: E402

OUTPUT = HERE / "results" / "sweep.jsonl"
PAGE = HERE / "sweep" / "README.md"
PACKAGES = ("torch", "diffusers", "transformers", "accelerate", "peft")


def main(argv: list[str] | None = None) -> int:
    """Run the cells that are asked for and write the tables; returns how many fail."""
    options = parsed(argv)
    tables = {"class": classes(options)}
    if (HERE / "sweep" / "pipelines.py").is_file():
        tables["pipeline"] = pipelines()
    known = {name for table in tables.values() for name in table.columns}
    if unknown := set(options.columns or ()) - known:
        raise UserError(f"there is no column '{min(unknown)}'; choose from {', '.join(sorted(known))}.")
    if options.page:
        check(options.page)
    elif options.table:
        raise UserError("--table writes the tables into a page; name it with --page.")
    lines = Lines(options.output)
    if not options.table:
        quiet()
        for kind in options.kind:
            if kind in tables:
                sweep(kind, tables[kind], options, lines)
        lines.tidy()
    rows = [lines.rows[key] for key in sorted(lines.rows)]
    if options.page:
        write(options.page, rows, {kind: table.columns for kind, table in tables.items()})
    return sum(row["result"] == FAILS for row in rows)


def parsed(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", default=["*"], help="classes or pipelines, or patterns such as 'Flux*'")
    parser.add_argument("--columns", nargs="+", help="some columns, by name")
    parser.add_argument("--kind", nargs="+", choices=["class", "pipeline"], default=["class", "pipeline"])
    parser.add_argument("--output", type=Path, default=OUTPUT, help="rows, as JSON lines")
    parser.add_argument(
        "--page", type=Path, help="the page that gets the tables; default: that of the default output"
    )
    parser.add_argument("--backend", default="aot_eager", help="of torch.compile; inductor takes much longer")
    parser.add_argument("--seed", type=int, default=0, help="of inputs")
    parser.add_argument("--again", action="store_true", help="make rows that are there anew")
    parser.add_argument("--table", action="store_true", help="no run: write the tables into --page, print nothing")
    options = parser.parse_args(argv)
    if options.page is None and options.output.resolve() == OUTPUT:
        options.page = PAGE
    return options


@dataclass
class Table:
    """cases: (name, variant) -> a function: names of columns -> (name, cell) one after the other.
    columns: name -> what a cell needs to pass."""

    cases: dict[tuple[str, str], Callable[[list[str]], Iterator[tuple[str, dict[str, Any]]]]]
    columns: dict[str, str]


def classes(options: argparse.Namespace) -> Table:
    """Of every denoiser class."""
    known = columns(options.backend)

    def cells(case: Case) -> Callable[[list[str]], Iterator]:
        def run_them(names: list[str]) -> Iterator:
            with tempfile.TemporaryDirectory(dir=MEMORY) as folder:
                subject = Subject(case, Path(folder), options.seed)
                for name in names:
                    torch.manual_seed(options.seed)
                    yield name, cell(subject, known[name])

        return run_them

    cases = {(case.name, case.variant): cells(case) for case in CASES.values()}
    return Table(cases, {name: column.what for name, column in known.items()})


def pipelines() -> Table:
    """Of every pipeline ("its name, a variant"); its columns are run together."""
    from sweep import pipeline_cells

    def cells(build: Callable[[], Any]) -> Callable[[list[str]], Iterator]:
        return lambda names: ((name, one) for name, one in pipeline_cells.cells(build).items() if name in names)

    named = {tuple(name.partition(", ")[::2]): build for name, build in pipeline_cells.PIPELINES.items()}
    return Table({name: cells(build) for name, build in named.items()}, pipeline_cells.COLUMNS)


def sweep(kind: str, table: Table, options: argparse.Namespace, lines: Lines) -> None:
    """The cells of one table that are asked for and not made yet."""
    wanted = [name for name in table.columns if not options.columns or name in options.columns]
    made_with = {"seed": options.seed, "commit": commit(), "backend": options.backend, "versions": versions()}
    for (name, variant), cells in table.cases.items():
        label = f"{name} ({variant})" if variant else name
        if not any(fnmatch.fnmatch(text, pattern) for pattern in options.only for text in (label, name)):
            continue
        row = {"kind": kind, "class": name, "variant": variant, **made_with}
        missing = [column for column in wanted if options.again or not lines.holds({**row, "column": column})]
        if not missing:
            continue
        done = {}
        with contextlib.redirect_stderr(io.StringIO()):  # progress bars of what takes a second
            for column, one in cells(missing):
                done[column] = one
                lines.add({**row, "column": column, **one})
        print(summary(label, done), flush=True)
        gc.collect()


def summary(label: str, done: dict[str, dict[str, Any]]) -> str:
    """A line for the terminal, and one more for each cell that does not pass."""
    seconds = sum(one["seconds"] for one in done.values())
    rest = [f"    {name}: {one['result']}: {one['reason']}" for name, one in done.items() if one["reason"]]
    return "\n".join([f"{label}: {sum(one['result'] == 'ok' for one in done.values())} ok, {seconds:.1f} s", *rest])


def versions() -> dict[str, str]:
    return {name: importlib.metadata.version(name) for name in PACKAGES}


def quiet() -> None:
    """Without the warnings of libraries: what goes wrong is in the rows."""
    warnings.filterwarnings("ignore")
    diffusers.utils.logging.set_verbosity_error()
    diffusers.utils.logging.disable_progress_bar()
    for name in ("torch._dynamo", "torch._inductor", "accelerate"):
        logging.getLogger(name).setLevel(logging.ERROR)


if __name__ == "__main__":
    run(main)
