"""`ptq4dm quantize`: a quantized pipeline in a folder. Methods and their options come from the registry."""

from __future__ import annotations

import os
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from ..awaited.use import use
from ..calibration.collect import CalibrationConfig, collect
from ..calibration.store import CalibrationStore
from ..errors import UserError
from ..files.claim import claimed_whole
from ..files.places import check_room, make_parent, picture_place
from ..files.result_folder import check_replaceable
from ..pipelines.devices import dtype_of as torch_dtype
from ..pipelines.load import folder_of as model_folder
from ..quantization.checkpoint import check_folder, folder_of
from ..quantization.components import component_of, narrowed, networks_to_quantize
from ..quantization.pictures import PICTURES, picture_of
from ..quantization.quantize import quantize
from ..quantization.recipe import QuantConfig
from ..quantization.report import QuantizationReport
from ..quantization.saving import RECORD, bytes_at_least, save_quantized
from ..streaming.folder import stream_folder, streams
from .flags import add_union, options_of
from .options import (
    CONDITIONING,
    QUANTIZED,
    add_calibration,
    add_component,
    add_conditioning,
    add_model,
    add_sampler,
    calibration_of,
    check_idle,
    check_kept,
    conditioning_of,
    device_of,
    dtype_of,
    fitting,
    load,
    one_process,
    settings_of,
)
from .output import result, say
from .recipes import METHOD, chosen_recipes, components_of, methods, recipes_of, wants_store


def add(parser) -> None:
    known = methods()
    drawn = "; ".join(f"{picture.shows} ({name})" for name, picture in PICTURES.items())
    add_model(parser)
    text = f"{', '.join(known)} (default: {METHOD})"
    parser.add_argument("--method", help=text).known = tuple(known)  # for completion
    text = "store from `collect`; made on the fly otherwise, of --num-tuples samples at least, or of --num-samples"
    parser.add_argument("--calibration", metavar="DIR", help=text)
    parser.add_argument("--plan", metavar="JSON", help="follow a saved plan instead of a method's options")
    parser.add_argument(
        "--checkpoint", metavar="DIR", help="keep each block here as it is done: the same command then goes on"
    )
    add_component(parser)
    text = (
        "several networks, such as text_encoder vae transformer: text encoders get 4-bit weights, autoencoders 8 and "
    )
    text += "8 bits, denoisers --method; or NAME='METHOD option=value ...', a recipe of its own"
    parser.add_argument("--components", nargs="+", metavar="NAME", help=text)
    parser.add_argument("--output", default=QUANTIZED, help="folder of the quantized pipeline")
    parser.add_argument("--plot", metavar="PNG", help=f"draw of one layer (needs matplotlib): {drawn}")
    parser.add_argument("--plot-layer", metavar="NAME", help="which layer; the worst otherwise")
    add_union(parser.add_argument_group("method", "in brackets: whose option it is, and its default there"), known)
    add_calibration(parser)
    add_sampler(parser)
    add_conditioning(parser)


def run(args) -> None:
    own = components_of(args)
    recipes, calibration, conditions = recipes_of(args), calibration_of(args), conditioning_of(args)
    one_process(args)
    output = Path(args.output)
    if args.plot_layer and not args.plot:
        raise UserError("--plot-layer names the layer of a picture; give --plot PNG too.")
    _check_used(args, recipes if own is None else recipes | {name: one for name, one in own.items() if one})
    picture = picture_of(next(iter(recipes.values()))) if args.plot else None
    if picture and picture.whole and args.plot_layer:
        raise UserError(f"--plot draws {picture.shows}, of all layers; leave --plot-layer out.")
    make_parent(output)
    with claimed_whole(output, settings_of(args)):  # a second run of the same command waits, then finds all as it was
        check_replaceable(output, RECORD, "quantize")
        _quantize(args, recipes, own, calibration, conditions, output, picture)


def _check_used(args, recipes: dict[str, QuantConfig]) -> None:
    """Raises UserError for options of a calibration that is not made."""
    awaits = any(one.awaited_calls for one in recipes.values())
    if args.calibration is not None:
        if awaits:
            raise UserError(
                f"the calls in {args.calibration} take the place of those waited for; take one of the two."
            )
        check_idle(args, CONDITIONING, f"the calls in {args.calibration} were made already")
    elif awaits:
        names = [item.name for item in fields(CalibrationConfig) if item.name not in ("batch_size", "seed")]
        idle = [name for name in names if name != "num_inference_steps"]
        check_idle(args, idle, "the first calls of one batch are looked at as they come")
    elif not any(map(wants_store, recipes.values())):
        own = {name for one in recipes.values() for name in options_of(type(one))}
        names = [name for name in (*options_of(CalibrationConfig), "calibration_steps") if name not in own]
        of = next(iter(recipes.values()))
        why = f"{args.plan or type(of).__name__} looks at no calibration"
        check_idle(args, [*names, *CONDITIONING], why if args.plan else f"this {why}")


def _enough(calibration: CalibrationConfig, args, recipes: dict[str, QuantConfig]) -> CalibrationConfig:
    """The same with as many samples as the recipes have tuples to look at, unless the user says how many; with twice
    as many for a correction towards more tuples than are trained on.

    Raises UserError where so few are asked for that a correction would change nothing.
    """
    corrected = [one.num_tuples for one in recipes.values() if getattr(one, "correction", False)]
    if hasattr(args, "num_samples"):
        if corrected and calibration.num_samples <= max(corrected):
            raise UserError(
                f"--num-samples {calibration.num_samples} records no more than the {max(corrected)} tuples that are "
                "trained on, so that correction would change nothing; record more, or leave it out."
            )
        return calibration
    packing = [one.packing_options() if one.plan is None else one.plan.packing for one in recipes.values()]
    asked = [options.get("num_tuples", 0) for options in packing]
    asked += [2 * count for count in corrected]
    return replace(calibration, num_samples=max(calibration.num_samples, *asked))


def _alone(args) -> bool:
    """Whether nothing is asked for that needs the whole pipeline in memory."""
    return all(
        getattr(args, name, None) is None
        for name in ("plan", "calibration", "plot", "checkpoint", "sampler", "order", "grid")
    )


def _stream(args, config: QuantConfig, output: Path) -> None:
    """Quantize layer by layer, from folder to folder."""
    report = stream_folder(
        model_folder(args.model), config, output, component=args.component, device=device_of(args),
        dtype=torch_dtype(dtype_of(args)), record={"model": args.model},
        show=lambda report: say(report.table()),
    )  # fmt: skip
    result(model=args.model, **report.to_dict(), output=output, picture=None)
    say(f"all {len(report.layers)} layers: {output / RECORD}")


def _quantize(
    args,
    recipes: dict[str, QuantConfig],
    own: dict[str, QuantConfig | None] | None,
    calibration: CalibrationConfig,
    conditions: dict,
    output: Path,
    picture: Any,
) -> None:
    config = next(iter(recipes.values()))
    if args.checkpoint:
        check_folder(Path(args.checkpoint))
    if args.plot:
        picture_place(args.plot)
    if own is None and _alone(args) and streams(model_folder(args.model), config, args.component):
        _stream(args, config, output)
        return
    store = CalibrationStore.load(args.calibration) if args.calibration else None
    if store is not None:
        check_kept(args, store, {name for one in recipes.values() for name in options_of(type(one))})
    pipe = load(args, args.model)
    model = component_of(pipe, args.component)
    calibrated = () if store is None else store.components
    if picture and picture.whole and len(networks_to_quantize(pipe, args.component, calibrated)) > 1:
        raise UserError(f"--plot draws {picture.shows}, of one network; name it with --component.")
    if own is not None:
        recipes = chosen_recipes(args, pipe, config, own)
    else:
        narrowed(networks_to_quantize(pipe, args.component), config)  # a pattern that names nothing is told at once
    for name, one in recipes.items():
        one.check_reach(component_of(pipe, name or args.component))
    wanting = [name for name, one in recipes.items() if wants_store(one) and not one.awaited_calls]
    if wanting and any(one.awaited_calls for one in recipes.values()):
        raise UserError(
            "some of the recipes wait for calls, and others want calibration; quantize one after the other."
        )
    if store is None and wanting:
        fitted = fitting(_enough(calibration, args, recipes), args, pipe)
        store = collect(pipe, fitted, component=wanting if own is not None else args.component, **conditions)
    check_room(os.path.dirname(os.path.realpath(output)), bytes_at_least(pipe, recipes), "the quantized pipeline")
    weights = dict(model.named_parameters()) if picture else {}
    if own is not None:
        reports = [quantize(pipe, None, store, components=recipes, checkpoint=args.checkpoint)]
    else:
        reports = [
            quantize(pipe, one, store, component=n or None, checkpoint=folder_of(args.checkpoint, n, recipes))
            for n, one in recipes.items()
        ]
    if waiting := {name: wait for one in reports for name, wait in one.waiting.items()}:
        together = getattr(args, "batch_size", 1)  # each call is of them all, and one fits wherever the model does
        seeds, steps = range(calibration.seed, calibration.seed + together), fitting(calibration, args, pipe)
        use(pipe, waiting, seeds, num_inference_steps=steps.num_inference_steps, **conditions)
    report = QuantizationReport.together(reports)
    say(report.table())  # before anything is written: no full disk loses it
    if picture and picture.whole:
        picture.whole(config, args.plot)
    elif picture:
        prefix = f"{report.networks[0]}." if len(report.networks) > 1 else ""
        drawn = [row["layer"].removeprefix(prefix) for row in report.layers if row["layer"].startswith(prefix)]
        picture.draw_one(model, weights, drawn, args.plot_layer, args.plot)
    result(model=args.model, **report.to_dict(), output=output, picture=args.plot)
    save_quantized(pipe, {"model": args.model, "dtype": str(model.dtype), **report.to_dict()}, output)
    say(f"all {len(report.layers)} layers: {output / RECORD}")
    say(f"quantized pipeline: {output}")
    if picture:
        say(f"picture: {args.plot}")
