"""`ptq4dm allocate`: each layer's format under budgets of time and bytes, as a plan for `quantize --plan`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..budgets.front import front, plot
from ..budgets.options import BudgetOptions
from ..budgets.table import KEEP, Table
from ..calibration.collect import collect
from ..calibration.store import CalibrationStore
from ..files.places import file_place, picture_place
from ..pipelines.denoiser import denoiser_name
from ..quantization import recipe
from ..quantization.components import component_of
from ..quantization.planning import make_plan
from ..quantization.recipe import QuantConfig
from .flags import add_flags, given, options_of
from .options import (
    CONDITIONING,
    add_calibration,
    add_component,
    add_conditioning,
    add_model,
    add_sampler,
    calibration_of,
    check_idle,
    check_kept,
    conditioning_of,
    fitting,
    load,
    one_process,
)
from .output import result, say

TAKES = (
    "Every format is timed in the model: minutes on a quiet GPU, more than 40 minutes on two busy cores of a CPU. "
    "Fewer --candidates, --rounds and rows (--timed-batch) make it shorter, and its times less certain; times are "
    "kept for the next call (--costs)."
)
WIDE = 0.1  # scatter of a step's times, as a share of their median, above which it is said


def method() -> type[QuantConfig]:
    """The method that chooses formats under budgets."""
    return next(kind for _, kind in sorted(recipe.METHODS.items()) if issubclass(kind, BudgetOptions))


def add(parser) -> None:
    parser.epilog = TAKES
    add_model(parser)
    add_component(parser)
    parser.add_argument("--calibration", metavar="DIR", help="store from `collect`; made on the fly otherwise")
    parser.add_argument("--output", default="out/plan.json", metavar="JSON", help="the plan")
    parser.add_argument("--plot", metavar="PNG", help="draw error over bytes and time (needs matplotlib)")
    names = {*options_of(BudgetOptions), "modules_to_not_convert"}
    add_flags(parser.add_argument_group("budgets"), method(), names)
    add_calibration(parser)
    add_sampler(parser)
    add_conditioning(parser)


def run(args) -> None:
    config: Any = method()(**given(args, method()))  # it has budgets
    calibration = calibration_of(args)
    conditions = conditioning_of(args)
    if args.calibration is not None:
        check_idle(args, CONDITIONING, f"the calls in {args.calibration} were made already")
    one_process(args)
    file_place(args.output, ".json", b"{")
    if args.plot:
        picture_place(args.plot)
    store = CalibrationStore.load(args.calibration) if args.calibration else None
    if store is not None:
        check_kept(args, store, options_of(type(config)))
    pipe = load(args, args.model)
    model, name = component_of(pipe, args.component), args.component or denoiser_name(pipe)
    config.check_reach(model)
    if store is None:
        fitted = fitting(calibration, args, pipe)
        store = collect(pipe, fitted, component=args.component, **conditions)
    plan = make_plan(model, config, store.of(model, name))
    table, chosen = config.outcome.table, config.outcome.allocation
    for line in lines_of(table, chosen):
        say(line)
    plan.save(args.output)
    facts = {"latency": chosen.latency, "bytes": chosen.bytes, "predicted_error": chosen.error, "notes": chosen.notes}
    result(model=args.model, **facts, step_milliseconds=table.step / 1e3, device=table.device)
    result(forwards=table.forwards, formats=counts(table, chosen.picks), layers=chosen.choices(table))
    result(plan=args.output)
    say(f"plan: {args.output}; `ptq4dm quantize --plan {args.output}` follows it")
    if args.plot:
        fronts = front(table)
        plot(table, fronts, chosen, Path(args.model).name, args.plot)
        say(f"picture: {args.plot}")
        result(picture=args.plot, front={
            kind: [{"latency": one.latency, "bytes": one.bytes, "error": one.error} for one in line]
            for kind, line in fronts.items()
        })  # fmt: skip


def certainty_of(table: Table) -> str:
    """How many rounds times are medians of, and how far rounds differ."""
    if table.rounds == 1:
        return "times of one round: uncertain; take more --rounds"
    text = f"medians of {table.rounds} rounds; the middle half of the step's times is {table.scatter:.0%} of it wide"
    return f"{text}: uncertain; take more --rounds, or a quieter machine" if table.scatter > WIDE else text


def counts(table: Table, picks: Any) -> dict[str, int]:
    """Format -> layers that have it."""
    return {label: int((picks == number).sum()) for number, label in enumerate(table.labels)}


def lines_of(table: Table, chosen: Any) -> list[str]:
    """The table that is printed: one format in all layers, each, and the choice."""
    lines = [
        f"step in full precision: {table.step / 1e3:.2f} ms, {table.outside / 1e3:.2f} of it outside of the layers, "
        f"on {table.device}; bytes in 16 bits: {table.total / 1e6:.2f} MB; errors from {table.forwards} forwards",
        certainty_of(table),
        f"{'latency':>8} {'measured':>8} {'bytes':>7} {'error':>10} {'layers':>6}  format for all layers, predicted",
    ]
    given = counts(table, chosen.picks)
    for label in table.labels:
        picks = table.uniform(label)
        error = "" if label == KEEP else f"{table.error(picks):.2e}"
        measured = f"{table.measured[label] / table.step:8.3f}" if label in table.measured else ""
        shares = f"{table.latency(picks):8.3f} {measured:>8} {table.size(picks):7.3f}"
        lines.append(f"{shares} {error:>10} {given[label]:6}  {label}")
    shares = f"{chosen.latency:8.3f} {'':8} {chosen.bytes:7.3f}"
    lines.append(f"{shares} {chosen.error:10.2e} {len(table.layers):6}  chosen")
    return lines + chosen.notes
