"""`ptq4dm info`: what a pipeline is: its layers and their kernels, what is left in full precision and why."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

from torch import nn

from ..inference import engines
from ..inference.optimize import optimize
from ..kernels.attention.layer8 import kernel_name
from ..kernels.cpu import library
from ..layers.attention.planned import attention_modules, attention_of
from ..layers.base import holds_quantized, is_quantized
from ..layers.plan import FLOAT_INPUTS
from ..layers.sizes import bytes_in_16_bits, full_bytes, stored_bytes, text_of
from ..layers.view import find_layers, in_ip_adapter
from ..pipelines.denoiser import denoiser, denoiser_name, networks_of
from ..pipelines.load import folder_of
from ..pipelines.sampling import sample
from ..quantization.diffusers_bridge import quantization_config
from ..quantization.recipe import QuantConfig
from ..quantization.report import kernel_report, memory_beside_floats, memory_lines, without_kernel
from ..quantization.saving import verify
from ..tables import aligned
from .options import QUANTIZED_FIRST, add_model, default_model, load
from .output import result, say

WIDTH = 128  # of heads, where an attention does not say
COMPILED = ("int4", "progressive")  # formats that kernels/cpu serves


def add(parser) -> None:
    add_model(parser, None, QUANTIZED_FIRST)
    text = "what each layer's product runs in through another library: openvino. One step is sampled for it"
    parser.add_argument("--engine", help=text)
    parser.add_argument("--verify", action="store_true", help="read all tensors and compare their checksums")


def run(args) -> None:
    model = default_model(args)
    engines.check(args.engine, None, None, {})
    local = folder_of(model).is_dir()
    verified = verify(folder_of(model)) if args.verify and local else None  # loading stops at the first fault
    pipe = load(args, model)
    network = denoiser(pipe)
    if args.verify and not local:
        verified = verify(Path(network.config["_name_or_path"]).parent)
    config = quantization_config(network)
    layers = kernel_report(network)
    if args.engine:
        name_products(layers, pipe, args.engine)
    facts = {
        "model": str(model),
        "pipeline": type(pipe).__name__,
        "denoiser": type(network).__name__,
        "component": denoiser_name(pipe),
        "scheduler": type(pipe.scheduler).__name__,
        "quantization": None if config is None else config.summary(),
        "bytes": stored_bytes(network),
        "bytes_in_16_bits": bytes_in_16_bits(network),
        "full_bytes_in_16_bits": full_bytes(network, sixteen=True),
        "layers": layers,
        "left": left_layers(network, config),
        "attention": attention_in_8_bits_of(network),
        "adapters": adapters_of(network),
        "networks": other_networks(pipe),
        "memory": memory_beside_floats(pipe),
        "compiled": compiled_kernels(network),
    }
    if verified is not None:
        facts |= {"verified": verified, "conversions": engines.saved_in(folder_of(model)) if local else {}}
    say(_text(facts))
    result(**facts)


def name_products(layers: list[dict], pipe: Any, engine: str) -> None:
    """Put the engine's kernel of each layer's product in the place of our own, as its graph that is executed says.

    OpenVINO names no products that unpack weights of 4 bits.
    """
    done = optimize(pipe, engine=engine)
    try:
        sample(pipe, [0], num_inference_steps=1)
        found = denoiser(pipe).forward.products()
    finally:
        done.undo()
    for row in layers:
        runs_in, kernel = found.get(row["layer"], ("", ""))
        row["kernel"] = f"{engine} {runs_in} {kernel}" if kernel else f"{engine}, not named in its graph"


def attention_in_8_bits_of(network: nn.Module) -> list[dict]:
    """A row for each attention that the plan has in 8 bits: layer, kind of its codes, and the kernel that serves."""
    state = attention_of(network)
    if state is None:
        return []
    modules = attention_modules(network)
    rows = []
    for name in state.layers:
        heads = getattr(modules[name], "heads", 1) or 1
        width = getattr(modules[name], "inner_dim", WIDTH * heads) // heads
        kernel = kernel_name(next(network.parameters()).device, width)
        rows.append({"layer": name, "kind": state.kind_of(name), "kernel": kernel})
    return rows


def compiled_kernels(network: nn.Module) -> str | None:
    """Where the kernels were compiled that serve layers on a CPU, or why not; None where no layer has such."""
    layers = [one for one in network.modules() if is_quantized(one) and one.plan.format in COMPILED]
    whole = [one for one in layers if getattr(one, "groups", 1) == 1 and one.plan.activation_bits != FLOAT_INPUTS]
    return library.found().text if any(one.qweight.device.type == "cpu" for one in whole) else None


def left_layers(network: nn.Module, config: QuantConfig | None) -> list[dict]:
    """A row for each module with a weight of two axes or more that is in full precision: layer, kind, bytes, why."""
    if config is None:
        return []
    views = {view.name: view for view in find_layers(network)}
    rows = []
    for name, module in network.named_modules():
        weight = module._parameters.get("weight")
        if weight is None or weight.ndim < 2 or is_quantized(module):
            continue
        kind = type(module).__name__
        role = views[name].role if name in views else ""
        if _is_adapter(name):
            why = "part of an adapter"
        elif in_ip_adapter(name):
            why = "part of an IP-Adapter"
        elif name not in views:
            padded = "with this padding " if type(module) is nn.Conv2d else ""
            why = f"{kind} {padded}is not of a kind that is quantized"
        elif pattern := views[name].pattern(config.modules_to_not_convert):
            why = f"modules_to_not_convert has '{pattern}'"
        elif config.norms_only:
            why = "in floats: the plan names norms by the mean magnitude alone (L1, of `train --norm l1`)"
        elif role != "inner":
            why = f"the model's {role} layer"
        else:
            unseen = ", or calibration never called it" if config.needs_calibration else ""
            why = f"{config.method} chose no format for it (by its role, its shape or what it costs{unseen})"
        rows.append({"layer": name, "kind": kind, "bytes": stored_bytes(module), "why": why})
    return rows


def adapters_of(network: nn.Module) -> dict[str, dict]:
    """Adapter name -> on how many layers it is, whether it is active there, and in how many it is fused."""
    found: dict[str, dict] = {}
    for module in network.modules():
        beside = list(getattr(module, "lora_A", ())) if hasattr(module, "base_layer") else []
        fused = list(getattr(getattr(module, "plan", None), "adapters", ()))
        for adapter in [*beside, *fused]:
            entry = found.setdefault(adapter, {"layers": 0, "active": False, "fused": 0})
            entry["fused" if adapter in fused else "layers"] += 1
            off = adapter in beside and (module.disable_adapters or adapter not in module.active_adapters)
            entry["active"] |= not off
    ip = {name.rpartition(".processor")[0] for name, _ in network.named_modules() if in_ip_adapter(name)} - {""}
    if ip:
        found["IP-Adapter"] = {"layers": len(ip), "active": True, "fused": 0}
    return found


def other_networks(pipe: Any) -> dict[str, dict]:
    """Name -> class, bytes, and whether and by which recipe it is quantized, of networks beside the main denoiser."""
    return {
        name: {
            "class": type(network).__name__,
            "bytes": stored_bytes(network),
            "quantized": holds_quantized(network),
            "recipe": None if (config := quantization_config(network)) is None else config.summary(),
        }
        for name, network in networks_of(pipe).items()
        if name != denoiser_name(pipe)
    }


def _text(facts: dict[str, Any]) -> str:
    lines = [f"{name:<13} {facts[name]}" for name in ("model", "pipeline", "denoiser", "scheduler")]
    lines.append(f"{'quantization':<13} of '{facts['component']}': {_options(facts['quantization']) or 'none'}")
    sizes = text_of(*(facts[name] for name in ("bytes", "bytes_in_16_bits", "full_bytes_in_16_bits")))
    lines.append(f"{'bytes':<13} of '{facts['component']}': {sizes}")
    for name, layers in facts.get("verified", {}).items():
        lines.append(f"{'verified':<13} {name or 'the model'}: {layers} layers and all else are as they were saved")
    for name, (count, damaged) in facts.get("conversions", {}).items():
        state = f"{damaged} damaged, which are made anew at their next use" if damaged else "all as they were saved"
        lines.append(f"{'conversions':<13} by {name}: {count}, {state}")
    for name, one in facts["networks"].items():
        precision = "quantized" if one["quantized"] else "in full precision"
        precision += f" ({_options(one['recipe'])})" if one["recipe"] else ""
        lines.append(f"{name:<13} {one['class']}, {precision}, {one['bytes']:,} bytes")
    lines += [f"{'memory' if i == 0 else '':<13} {line}" for i, line in enumerate(memory_lines(facts["memory"]))]
    for name, one in facts["adapters"].items():
        state = "active" if one["active"] else "switched off"
        where = [f"beside {one['layers']} layers"] if one["layers"] else []
        where += [f"fused into {one['fused']}"] if one["fused"] else []
        lines.append(f"{'adapter':<13} {name}, {state}, {' and '.join(where)}")
    kinds = Counter((row["kind"], row["kernel"]) for row in facts["attention"])
    for (kind, kernel), count in kinds.items():
        lines.append(f"{'attention':<13} of {count} layers in 8 bits ({kind}), by {kernel}")
    if facts["compiled"]:
        lines.append(f"{'CPU kernels':<13} {facts['compiled']}")
    if text := without_kernel(facts["layers"]) if facts["quantization"] else "":
        lines.append(f"{'no kernel':<13} {text}")
    table = [["bytes".rjust(12), "format", "kernel", "shape", "layer"]]
    for row in facts["layers"]:
        shape = "x".join(map(str, row["shape"]))
        table.append([f"{row['bytes']:,}", row["format"], row["kernel"], shape, row["layer"]])
    lines += ["", *aligned(table, right=(0,))]
    if facts["left"]:
        lines.append(f"\n{'bytes':>12}  in full precision, and why")
    lines += [f"{row['bytes']:>12,}  {row['layer']}: {row['why']}" for row in facts["left"]]
    return "\n".join(lines)


def _options(recipe: dict | None) -> str:
    return ", ".join(f"{name} {value}" for name, value in (recipe or {}).items())


def _is_adapter(name: str) -> bool:
    return any(part.startswith("lora_") for part in name.split("."))
