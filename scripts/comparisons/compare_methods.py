"""The table of all methods: what each costs in quality and gains in bytes and time, its controls beside it.

    python scripts/comparisons/compare_methods.py --model dit-cifar10 --output out/methods.json
    python scripts/comparisons/compare_methods.py --device cuda --num-paired 256 --steps 50 --num-fid 10000
        --model unet-cifar10 dit-cifar10 --minutes 50 --output out/methods.json
    python scripts/comparisons/compare_methods.py --device cuda --workers 8 --output out/methods.json
    python scripts/comparisons/compare_methods.py --rows "SVDQuant*" "full precision" --kinds method baseline

The rows are those of method_rows.py and rows/: methods; baselines (full precision, round to nearest at the same bits
and at the same stored bytes); ablations, a method with one idea taken out; and shuffled controls, a method with its
decisions dealt out at random, whose gain must vanish (controls.py). All have the same models, calibration and
held-out seeds.

Columns: PSNR of same-seed images with its 95 % interval, and noise prediction error, both against full precision on
seeds that calibration never saw; feature-FID (--num-fid); bytes of all tensors in float16 and their share of the
unquantized model's; time of one step over that of full precision, the two taken in turns, eager in float32 and, on a
GPU with --compiled, compiled in bfloat16; seconds and memory of quantization; kernels. Rows in the output are not
made again. Processes that share the rows (--workers) time no steps; their seconds are those of a busy machine. With
--no-images there are no PSNR and no times.
"""

from __future__ import annotations

import argparse
import copy
import time
from pathlib import Path

import torch
from conditions import bytes_of_float16, calibration_folder, free_memory, in_dtype, made_on, tensor_float32, watched
from long_runs import add_options, named, shard_of
from method_rows import KINDS, Row, all_rows
from methods_report import draw, markdown
from paired import held_out
from planted import pipeline
from rows.row import CALLED
from workers import Task, check_workers, join_shards, measure_rows

import ptq4dm
from ptq4dm.calibration.calls import Calls
from ptq4dm.errors import UserError, run
from ptq4dm.evaluation.compare import step_times
from ptq4dm.files.rows import Rows
from ptq4dm.layers.plan import Plan
from ptq4dm.pipelines.denoiser import denoiser
from ptq4dm.quantization.planning import make_plan
from ptq4dm.quantization.transforming import transformed

SETTINGS = ("steps", "num_paired", "num_fid", "calibration_samples", "seed")
MODELS = ("unet-cifar10", "dit-cifar10")


class Bench:
    """One model, its calibration and its truth, each made once."""

    def __init__(self, model: str, args, pipe=None):
        """pipe: the model's pipeline, where it is there already."""
        self.model, self.args = model, args
        self.cuda = torch.device(args.device).type == "cuda"
        self.pipe = pipe or pipeline(model, args.device)
        if self.cuda:
            denoiser(self.pipe).to(memory_format=torch.channels_last)
        config = ptq4dm.CalibrationConfig(
            "solver", args.calibration_samples, args.steps, batch_size=args.batch_size, seed=args.seed
        )
        self.store = ptq4dm.collect(self.pipe, config, calibration_folder(args, model, "solver", config))
        self.truth = held_out(self.pipe, args.num_paired, args.steps, args.batch_size)

    def measure(self, row: Row) -> dict:
        """The row with its figures and their conditions, as JSON holds them."""
        free_memory(self.args.device)
        args, exact, start = self.args, self.truth.exact, time.perf_counter()
        figures: dict = {"model": self.model, "row": row.name, "kind": row.kind, "of": row.of}
        model = exact
        if row.recipe is not None:
            model, facts = self._quantized(row)
            figures |= facts | (self.truth.predicted if args.no_images else self.truth.compare)(model)
            figures |= self._times(model) if args.workers == 1 and not args.no_images else {}
        figures["bytes"] = bytes_of_float16(model)
        figures["bytes_share"] = figures["bytes"] / bytes_of_float16(exact)
        figures["feature_fid"] = None
        if args.num_fid:
            with tensor_float32(self.cuda):
                figures["feature_fid"] = self.truth.feature_fid(model, args.num_fid, args.steps)
        return figures | made_on(args.device) | {"seed": args.seed, "seconds": round(time.perf_counter() - start, 1)}

    def _quantized(self, row: Row) -> tuple[torch.nn.Module, dict]:
        model, config = copy.deepcopy(self.truth.exact), row.recipe()
        with watched(self.args.device) as cost:
            if row.plan is not None:
                config.plan = self._changed(row, config)
            report = ptq4dm.quantize(model, config, self._called(row.calls) if row.calls else self.store)
        if row.packed is not None:
            row.packed(model, self.truth.exact, self.store, self.args.seed)
        return model, {
            "recipe": config.summary(),
            "formats": _counted([layer["format"] for layer in report.layers]),
            "simulated": any("simulated" in layer["format"] for layer in report.layers),
            "kernels": _counted([layer["kernel"] for layer in report.layers]),
            "seconds_to_quantize": cost["seconds"],
            "memory_to_quantize": cost["peak_memory"],
        }

    def _called(self, count: int) -> Calls:
        """The first calls of the pipeline, as the seeds of the calibration make them."""
        seeds = range(self.args.seed, self.args.seed + CALLED)
        with ptq4dm.record(denoiser(self.pipe)) as calls:
            ptq4dm.sample(self.pipe, seeds, num_inference_steps=self.args.steps)
        return calls[:count]

    def _changed(self, row: Row, config) -> Plan:
        """The row's plan, changed; its control sees the model after the transforms of the recipe."""
        model = copy.deepcopy(self.truth.exact)
        transforms, store = transformed(model, config.changes, None, self.store)
        plan = make_plan(model, config, store, transforms)
        return row.plan(model, plan, store, self.args.seed)

    def _times(self, model) -> dict:
        """step_time, in turns with full precision; on a GPU also that of both compiled in bfloat16."""
        calls, exact = self.truth.calls[: self.args.timed_batch], self.truth.exact
        found = {"step_time": _ratio(step_times(model, exact, calls, timed=self.args.timed_steps))}
        if self.cuda and self.args.compiled:
            torch.compiler.reset()  # else every row adds to what the compiler holds of the last ones
            pair = [in_dtype(one, torch.bfloat16) for one in (model, exact)]
            for one in pair:
                one.compile(dynamic=False)
            try:
                found["step_time_bf16_compiled"] = _ratio(
                    step_times(*pair, calls, warmup=5, timed=self.args.timed_steps)
                )
            except RuntimeError as error:  # of the compiler; the row's other figures stand
                found["step_time_bf16_compiled"] = {"failed": str(error).splitlines()[0]}
        return found


def _ratio(times: dict) -> dict:
    """The times of `step_times` with "ratio": the model's over full precision's."""
    return {"ratio": 1 / times["speedup"], **times}


def _counted(names: list[str]) -> dict[str, int]:
    return {name: names.count(name) for name in sorted(set(names))}


def available(rows: list[Row]) -> tuple[list[Row], dict[str, str]]:
    """The rows whose recipes the library can make, and why each of the others is left out.

    Raises what the recipe raises, where a row does not say that it waits for anything.
    """
    ready, left_out = [], {}
    for row in rows:
        try:
            if row.recipe is not None:
                row.recipe()
            ready.append(row)
        except (UserError, TypeError) as error:
            if not row.needs:
                raise
            left_out[row.name] = f"it waits for {row.needs} ({error})"
    return ready, left_out


def check(args) -> None:
    """Raises UserError, before any work, for figures that measure nothing and for files that are not there."""
    for name in ("steps", "num_paired", "calibration_samples", "batch_size", "timed_batch", "timed_steps"):
        if getattr(args, name) < 1:
            raise UserError(f"--{name.replace('_', '-')} must be 1 or more, not {getattr(args, name)}.")
    if args.num_fid == 1 or args.num_fid < 0:
        raise UserError("--num-fid is 0, which leaves feature-FID out, or 2 or more.")
    shard_of(args.shard)
    check_workers(args)
    for path in args.join:
        if not path.is_file():
            raise UserError(f"there is no {path} to join.")


def tasks(results: list[dict], rows: list[Row], args) -> list[Task]:
    """What is to do, in the table's order, known by the rows' names."""
    index, count = shard_of(args.shard)
    everything = [(model, row) for model in args.model for row in rows][index::count]
    done = {(row["model"], row["row"]) for row in results}
    return [Task(model, row.name, row.name) for model, row in everything if (model, row.name) not in done]


def measure(bench, name: str, known) -> dict:
    """The row of a task; known: all rows that are there."""
    return bench.measure(next(row for row in all_rows() if row.name == name))


def arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument(
        "--model",
        nargs="+",
        default=list(MODELS),
        help="embedded models; dit-cifar10-outliers is one with planted outliers",
    )
    parser.add_argument("--rows", nargs="+", default=["*"], metavar="NAME", help="names or patterns of rows")
    parser.add_argument("--kinds", nargs="+", default=list(KINDS), choices=KINDS)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--steps", type=int, default=20, help="DDIM steps")
    parser.add_argument("--num-paired", type=int, default=16, help="held-out seeds")
    parser.add_argument("--num-fid", type=int, default=0, help="images for feature-FID; 0 leaves it out")
    parser.add_argument("--no-images", action="store_true", help="noise prediction errors and bytes alone: minutes")
    parser.add_argument("--calibration-samples", type=int, default=64)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--timed-batch", type=int, default=16, help="tuples of a timed step, at most --num-paired")
    parser.add_argument("--timed-steps", type=int, default=10, help="timed steps of each model")
    parser.add_argument("--compiled", action="store_true", help="on a GPU, time compiled bf16, too: a minute a row")
    parser.add_argument("--seed", type=int, default=0, help="of the calibration and of what is shuffled")
    add_options(parser)
    parser.add_argument(
        "--join", nargs="+", type=Path, default=[], help="outputs of other shards, for table, pictures"
    )
    parser.add_argument("--output", type=Path, default=Path("out/methods.json"))
    return parser


def main(words: list[str] | None = None, make_bench=Bench) -> None:
    args = arguments().parse_args(words)
    check(args)
    table = all_rows()
    rows, left_out = available([row for row in named(table, args.rows) if row.kind in args.kinds])
    settings = {name: getattr(args, name) for name in SETTINGS} | ({"no_images": True} if args.no_images else {})
    results = Rows(args.output, settings)
    join_shards(results)
    remaining, failed = measure_rows(tasks(results, rows, args), results, measure, args, make_bench)
    found = [*results, *(row for path in args.join for row in Rows(path, settings))]
    order = {row.name: place for place, row in enumerate(table)}
    for model in dict.fromkeys(row["model"] for row in found):
        own = sorted(
            (row for row in found if row["model"] == model), key=lambda row: order.get(row["row"], len(order))
        )
        print(f"\n{model}, {args.steps} DDIM steps, {args.num_paired} held-out seeds\n\n{markdown(own)}\n")
        try:
            print(f"picture: {draw(own, args.output.with_name(f'{args.output.stem}-{model}.png'))}")
        except UserError as error:
            print(f"no picture: {error}")
    for name, why in {**left_out, **failed}.items():
        print(f"left out: {name}: {why}")
    if remaining:
        print(f"{remaining} rows are still to do; the same command goes on with them.")


if __name__ == "__main__":
    run(main)
