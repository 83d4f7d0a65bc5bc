"""`ptq4dm convert`: a file that another tool quantized into a pipeline's folder, or a quantized pipeline into one."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any, cast

from ...errors import UserError
from ...files.claim import claimed_whole
from ...files.places import make_parent
from ...files.result_folder import check_replaceable
from ...interchange.export import check_export, export_comfy
from ...interchange.load import load_quantized_file
from ...layers.base import is_quantized
from ...layers.sizes import stored_bytes
from ...quantization.components import component_of
from ...quantization.diffusers_bridge import quantization_config
from ...quantization.recipe import QuantConfig
from ...quantization.report import kernel_report
from ...quantization.saving import RECORD, save_quantized
from ..options import QUANTIZED, add_component, add_model, default_model, load, one_process, settings_of
from ..output import result, say

FLAGS = {"source": "--from", "to": "--to"}


def add(parser) -> None:
    note = f"with --from the one whose weights the file has, with --to {QUANTIZED} if none is named"
    add_model(parser, None, note)
    text = "read a GGUF file, or a safetensors file of ComfyUI or Black Forest Labs, into a folder of a pipeline"
    parser.add_argument("--from", dest="source", metavar="FILE", help=text)
    parser.add_argument("--to", metavar="FILE", help="write a safetensors file that ComfyUI loads")
    text = "with --to: a file of the same architecture, whose names of tensors the result gets"
    parser.add_argument("--names", metavar="FILE", help=text)
    add_component(parser)
    parser.add_argument("--output", metavar="DIR", help=f"with --from: folder of the pipeline; {QUANTIZED}")


def run(args) -> None:
    if (args.source is None) == (args.to is None):
        raise UserError("convert reads a file with --from, or writes one with --to; give one of the two.")
    for name, of in (("names", args.to), ("output", args.source)):
        if of is None and getattr(args, name) is not None:
            other = "--to" if name == "names" else "--from"
            raise UserError(f"--{name} is a part of {other}; leave it out.")
    one_process(args)
    _read(args) if args.to is None else _write(args)


def _read(args) -> None:
    if args.model is None:
        raise UserError("the file has a denoiser alone; name the model that it is of with --model.")
    output = Path(args.output or QUANTIZED)
    make_parent(output)
    with claimed_whole(output, settings_of(args)):
        check_replaceable(output, RECORD, "convert")
        pipe = load(args, args.model)
        before = stored_bytes(component_of(pipe, args.component))
        model = load_quantized_file(pipe, args.source, args.component)
        config = cast(QuantConfig, quantization_config(model))
        facts: dict[str, Any] = {
            "method": {**config.summary(), "file": Path(args.source).name},
            "bytes_before": before,
            "bytes_after": stored_bytes(model),
            "layers": kernel_report(model),
        }
        say(_text(model, facts))
        result(model=args.model, **facts, output=output)
        save_quantized(pipe, {"model": args.model, "dtype": str(model.dtype), **facts}, output)
        say(f"quantized pipeline: {output}")


def _write(args) -> None:
    check_export(args.to)
    with claimed_whole(Path(args.to), settings_of(args)):
        model = default_model(args)
        pipe = load(args, model)
        floats = export_comfy(pipe, args.to, args.names, args.component)
        size = Path(args.to).stat().st_size
        say(f"file for ComfyUI: {args.to}, {size / 1e6:.1f} MB")
        if floats:
            count = "1 quantized convolution is" if len(floats) == 1 else f"{len(floats)} quantized convolutions are"
            say(f"{count} floats in it: {', '.join(floats[:3])}{' ...' if floats[3:] else ''}")
        result(model=model, output=args.to, bytes=size, as_floats=floats)


def _text(model: Any, facts: dict[str, Any]) -> str:
    """Formats with the numbers of their layers, and bytes."""
    counts = Counter(str(one.plan) for one in model.modules() if is_quantized(one))
    lines = [f"{count:6d} layers {kind}" for kind, count in counts.most_common()]
    sizes = f"{facts['bytes_before'] / 1e6:.1f} MB before, {facts['bytes_after'] / 1e6:.1f} MB after"
    return "\n".join([*lines, sizes])
