"""`ptq4dm info`: what a model is."""

from __future__ import annotations

import json

from ..pipelines.denoiser import denoiser
from ..quantization.diffusers_bridge import quantization_config
from ..quantization.report import kernel_report, stored_bytes
from .options import QUANTIZED_FIRST, add_model, default_model, load


def add(parser) -> None:
    add_model(parser, None, QUANTIZED_FIRST)
    parser.add_argument("--json", action="store_true", help="everything, as JSON")


def run(args) -> None:
    model = default_model(args)
    pipe = load(args, model)
    network = denoiser(pipe)
    rows = kernel_report(network)
    config = quantization_config(network)
    chosen = None if config is None else config.summary()
    facts = {
        "model": str(model),
        "pipeline": type(pipe).__name__,
        "denoiser": type(network).__name__,
        "scheduler": type(pipe.scheduler).__name__,
        "quantization": chosen,
        "bytes": stored_bytes(network),
        "layers": rows,
    }
    if args.json:
        print(json.dumps(facts, indent=1))
        return
    for name in ("model", "pipeline", "denoiser", "scheduler"):
        print(f"{name:<13} {facts[name]}")
    options = ", ".join(f"{name} {value}" for name, value in (chosen or {}).items()) or "none"
    print(f"{'quantization':<13} {options}")
    print(f"{'bytes':<13} {facts['bytes']:,} in all tensors of the denoiser")
    print(f"\n{'bytes':>12}  {'format':<24} {'kernel':<13} {'shape':<20} layer")
    for row in rows:
        shape = "x".join(map(str, row["shape"]))
        print(f"{row['bytes']:>12,}  {row['format']:<24} {row['kernel']:<13} {shape:<20} {row['layer']}")
