"""`ptq4dm collect`: a calibration store."""

from __future__ import annotations

from ..calibration.collect import collect
from ..errors import UserError
from ..files.places import picture_place
from ..layers.view import find_layers
from ..quantization.components import component_of
from .options import (
    add_calibration,
    add_component,
    add_conditioning,
    add_model,
    add_sampler,
    calibration_of,
    conditioning_of,
    fitting,
    load,
    one_process,
)
from .output import result, say

GOES_ON = "the same command"


def add(parser) -> None:
    add_model(parser)
    add_component(parser)
    add_calibration(parser)
    add_sampler(parser)
    add_conditioning(parser)
    parser.add_argument("--output", default="out/calibration", help="folder of the store; resumed if unfinished")
    parser.add_argument("--plot", metavar="PNG", help="draw a layer's input range over timesteps (needs matplotlib)")
    text = "which layer; the first convolution or linear otherwise"
    parser.add_argument("--plot-layer", metavar="NAME", help=text)


def run(args) -> None:
    config, conditions = calibration_of(args), conditioning_of(args)
    one_process(args)
    if args.plot_layer and not args.plot:
        raise UserError("--plot-layer names the layer of a picture; give --plot PNG too.")
    if args.plot:
        picture_place(args.plot)
    pipe = load(args, args.model)
    network = component_of(pipe, args.component)
    if args.plot_layer and args.plot_layer not in {view.name for view in find_layers(network)}:
        raise UserError(f"the model has no layer '{args.plot_layer}' to draw; `ptq4dm info` lists them.")
    config = fitting(config, args, pipe)
    store = collect(pipe, config, args.output, component=args.component, **conditions)
    sizes = {name: (len(one.recorded()), len(one.fingerprint)) for name, one in store.components.items()}
    for name, (tuples, layers) in sizes.items():
        say(f"{name}: {tuples} tuples, {layers} layers")
    say(f"calibration store: {args.output}")
    result(
        model=args.model,
        store=args.output,
        networks={name: {"tuples": tuples, "layers": layers} for name, (tuples, layers) in sizes.items()},
        config=store.config,
    )
    if args.plot:
        from ..calibration.plot import plot_ranges

        plot_ranges(store, args.plot_layer or next(iter(store.fingerprint)), args.plot)
        say(f"picture: {args.plot}")
        result(picture=args.plot)
