"""`ptq4dm bench hardware`: MixPE's accelerator and others, modelled on a model's layers: time and energy."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path

from ...errors import UserError, meant
from ...files.atomic import replacing
from ...files.claim import claimed_whole
from ...files.places import make_parent
from ...hardware.comparison import Totals, Workload, compare, ratios
from ...hardware.costs import FREQUENCY, TABLES, Costs
from ...hardware.designs import DESIGNS
from ...hardware.known import KNOWN, facts_of, works_of_known
from ...hardware.nets import NETS, batch_of, works_of_net
from ...hardware.simulator import simulate
from ...hardware.switches import LABELS, MODES, PUBLISHED, Switches, meaning, turned
from ...hardware.table import NOTE, WORD, changes, plot, table
from ...hardware.traced import scaled, works_of_pipeline
from ...hardware.work import Work
from ...pipelines.load import EMBEDDED
from ..options import (
    CONDITIONING,
    add_conditioning,
    add_model,
    add_steps,
    check_idle,
    conditioning_of,
    load,
    one_process,
    steps_of,
)
from ..output import plain, result, say

MODELS = (*EMBEDDED, *KNOWN, *NETS)
EMBEDDED_BATCH = 64
MOST_BATCH = 1 << 20
DRAWN = "corrected"


def add(parser) -> None:
    add_model(parser, note=f"by shapes alone {', '.join(KNOWN)}; of MixPE's own nets {', '.join(NETS)}")
    parser._option_string_actions["--model"].known = MODELS
    text = "energies: of the released simulator (28 nm), or per operation (45 nm)"
    parser.add_argument("--costs", choices=tuple(TABLES), default="28nm", help=text)
    text = f"images at once; {EMBEDDED_BATCH} for embedded models, as in each mode for MixPE's nets, 1 for others"
    parser.add_argument("--batch-size", type=int, help=text)
    add_steps(parser)
    text = "also what each fault of the released simulator changes, corrected by itself"
    parser.add_argument("--each", action="store_true", help=text)
    text = "folder of MODEL.json, with every layer, and MODEL.png"
    parser.add_argument("--output", default="out/hardware", help=text)
    add_conditioning(parser)


def run(args) -> None:
    steps = "--num-inference-steps (or --steps)"
    for flag, value in (("--batch-size", args.batch_size), (steps, args.num_inference_steps)):
        if value is not None and not 1 <= value <= MOST_BATCH:
            raise UserError(f"{flag} must be from 1 to {MOST_BATCH}; got {value}.")
    one_process(args)
    name = str(args.model)
    output = Path(args.output) / f"{re.sub(r'[^A-Za-z0-9.-]+', '-', name).strip('-.') or 'model'}.json"
    make_parent(output)
    workload, facts = _workload(args, name)
    costs = TABLES[args.costs]
    settings = {"model": name, **facts, "costs": costs.name, "source": costs.source, "frequency": FREQUENCY}
    with claimed_whole(output, settings):
        modes = {mode: compare(*workload(switches), costs, switches) for mode, switches in MODES.items()}
        say(f"{WORD}, not measured: {_described(name, facts)}; {costs.source}")
        say(table(modes))
        say(changes("corrected against published", modes["published"], modes["corrected"]))
        found = {**settings, "note": NOTE, WORD: {mode: _facts(totals) for mode, totals in modes.items()}}
        if args.each:
            found["each"] = _each(workload, costs, modes["published"])
        result(**found, figures=output)
        with replacing(output) as temporary:
            file = {**found, "layers": _layers(workload, costs, MODES[DRAWN])}
            temporary.write_text(json.dumps(plain(file), indent=1) + "\n", encoding="utf-8")
        say(f"{WORD} figures of every layer: {output}")
        if plot(f"{name}, {DRAWN}", modes[DRAWN], output.with_suffix(".png")):
            say(f"{WORD} figures as a picture: {output.with_suffix('.png')}")
            result(picture=output.with_suffix(".png"))


def _workload(args, name: str) -> tuple[Workload, dict]:
    """The layers to model, and what there is to say of them: images at once, steps of an image."""
    if name in (*KNOWN, *NETS):
        check_idle(args, CONDITIONING, f"'{name}' is modelled by its shapes alone")
    if name in NETS:
        if args.num_inference_steps is not None:
            raise UserError(f"'{name}' is a net of MixPE's results, which takes no steps.")

        def net(switches: Switches) -> tuple[Sequence[Work], float]:
            batch = args.batch_size or batch_of(switches)
            return works_of_net(name, batch, switches), 1 / batch

        return net, {"batch_size": args.batch_size, "steps": 1}
    if name in KNOWN:
        works, steps, usual = list(works_of_known(name)), args.num_inference_steps or facts_of(name)["steps"], 1
    else:
        if name not in MODELS and "/" not in name and not Path(name).is_dir():
            raise UserError(
                f"'{name}' is none of the models {', '.join(MODELS)}, nor a folder here, nor a hub id "
                f"(owner/name){meant(name, MODELS) or '.'}"
            )
        pipe = load(args, name)
        works, steps = works_of_pipeline(pipe, steps_of(args, pipe), **conditioning_of(args))
        usual = EMBEDDED_BATCH if name in EMBEDDED else 1
    batch = args.batch_size or usual
    works = scaled(works, batch)
    return lambda switches: (works, steps / batch), {"batch_size": batch, "steps": steps}


def _described(name: str, facts: dict) -> str:
    batch = facts["batch_size"] or f"{batch_of(PUBLISHED)} (published) or {batch_of(MODES['corrected'])} (corrected)"
    return f"{name}, {batch} at once, {facts['steps']} steps"


def _facts(totals: Totals) -> dict:
    over = ratios(totals)
    return {
        name: {
            "modelled_ms": one.time,
            "modelled_mj": one.energy,
            "time_over_fp16": over[name][0],
            "energy_over_fp16": over[name][1],
            "modelled_ms_by_type": one.milliseconds,
            "modelled_mj_by_type": one.millijoules,
            "modelled_mj_by_part": one.parts,
        }
        for name, one in totals.items()
    }


def _each(workload: Workload, costs: Costs, published: Totals) -> dict:
    """Each fault turned by itself, from the published mode: what it means, and the designs' figures."""
    found = {}
    for label in LABELS:
        switches = turned(PUBLISHED, label)
        totals = compare(*workload(switches), costs, switches)
        over = ratios(totals)
        say(f"{WORD}: {label} turned ({meaning(label)})")
        times = ", ".join(f"{design} {time:.3f} / {energy:.3f}" for design, (time, energy) in over.items())
        say(f"{WORD}: {label} time / energy over FP16: {times}")
        say(changes(label, published, totals))
        found[label] = {"meaning": meaning(label), WORD: _facts(totals)}
    return found


def _layers(workload: Workload, costs: Costs, switches: Switches) -> list[dict]:
    """A row for each layer: its product, and modelled ms and mJ of an image on each design."""
    works, share = workload(switches)
    columns = {design.name: simulate(works, design, costs, switches) for design in DESIGNS}
    rows = []
    for k, work in enumerate(works):
        figures = {
            name: {"modelled_ms": ones[k].milliseconds * share, "modelled_mj": ones[k].millijoules * share}
            for name, ones in columns.items()
        }
        shape = {"rows": work.rows, "outputs": work.outputs, "inputs": work.inputs, "count": work.count}
        rows.append({"layer": work.name, "type": work.kind, **shape, "designs": figures})
    return rows
