"""The columns of the table of classes: what is done with each model, and when a cell passes.

A function of a column takes a subject and a format (float is one of them) and returns figures; what it raises is the
reason why the cell fails. If float itself fails in the same way, the cell is not applicable.
"""

from __future__ import annotations

import copy
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import accelerate
import torch
from torch import nn

from ptq4dm.calibration.record import answers
from ptq4dm.layers.base import is_quantized

from .subject import FLOAT, FORMATS, Subject, Wrong, distance, must_be_within, must_equal, outputs

CPU = torch.device("cpu")
COMPILED = 1e-2  # compiled against eager
SAME = 1e-5  # offloaded against not: products may differ in their last bits where weights lie at other addresses
CHANGED = 1e-3  # what an adapter changes at least
BOUNDS = {"W8A8": 0.1, "SVDQuant": 0.5}
ATTENTION = ("to_q", "to_k", "to_v", "to_out.0", "to_qkv", "qkv", "q_proj", "k_proj", "v_proj", "out_proj")


@dataclass(frozen=True)
class Column:
    """what: in the table's words. run(subject, kind): figures. kinds: the formats that it is done with.

    quantizes: the column is about quantizing itself: float must only be able to be called, else the cell is not
        applicable. Otherwise it is about what is done with a quantized model, and float must be able to do it, too.
    """

    what: str
    run: Callable[[Subject, str], dict[str, float]]
    kinds: tuple[str, ...] = tuple(FORMATS)
    quantizes: bool = False


def record(subject: Subject, kind: str) -> dict[str, float]:
    calls, given = subject.recorded()
    again = answers(subject.model(FLOAT), calls)
    if len(again) != len(given):
        raise Wrong(f"{len(given)} calls were made, {len(again)} replayed")
    for number, (one, other) in enumerate(zip(again, given, strict=True)):
        must_equal(outputs(one), other, f"call {number}, replayed,")
    return {"calls": len(given)}


def called(subject: Subject, kind: str) -> dict[str, float]:
    subject.call(subject.model(kind))
    return {}


def accuracy(subject: Subject, kind: str) -> dict[str, float]:
    error = subject.error(kind)
    must_be_within(error, BOUNDS[kind])
    return {"error": error}


def save(subject: Subject, kind: str) -> dict[str, float]:
    folder = subject.folder / kind
    shutil.rmtree(folder, ignore_errors=True)
    subject.model(kind).save_pretrained(folder)
    if not (folder / "config.json").is_file():
        raise Wrong("there is no config.json in the folder")
    return {"bytes": sum(path.stat().st_size for path in folder.glob("*.safetensors"))}


def load(subject: Subject, kind: str) -> dict[str, float]:
    folder = subject.folder / kind
    if not folder.is_dir():
        save(subject, kind)
    model = subject.model(kind)
    loaded = type(model).from_pretrained(folder).eval()
    if (found := len(quantized_layers(loaded))) != (made := len(quantized_layers(model))):
        raise Wrong(f"{made} layers are quantized, {found} in the loaded model")
    must_equal(subject.call(loaded), subject.call(model), "the loaded model")
    return {}


def quantized_layers(model: nn.Module) -> list[nn.Module]:
    return [module for module in model.modules() if is_quantized(module)]


def compiled_by(backend: str) -> Callable[[Subject, str], dict[str, float]]:
    def compiled(subject: Subject, kind: str) -> dict[str, float]:
        torch._dynamo.reset()
        model = copy.deepcopy(subject.model(kind))
        try:
            error = distance(subject.call(torch.compile(model, backend=backend)), subject.call(model))
        finally:
            torch._dynamo.reset()
        must_be_within(error, COMPILED, "compiled against eager:")
        return {"error": error}

    return compiled


def lora(subject: Subject, kind: str) -> dict[str, float]:
    """An adapter is added, changes the output as it changes float's, is disabled, enabled and deleted."""
    model = copy.deepcopy(subject.model(kind))
    plain = subject.call(model)
    with_adapter(model)
    adapted = subject.call(model)
    change = distance(adapted, plain)
    if change < CHANGED:
        raise Wrong(f"an adapter changes the output by {change:.1e} only")
    figures = {"change": change}
    if kind != FLOAT:
        exact = copy.deepcopy(subject.model(FLOAT))
        with_adapter(exact)
        figures["error"] = distance(adapted, subject.call(exact))
        must_be_within(figures["error"], BOUNDS[kind], "with an adapter: relative error")
    model.disable_adapters()
    must_equal(subject.call(model), plain, "with the adapter disabled the output")
    model.enable_adapters()
    must_equal(subject.call(model), adapted, "with the adapter enabled again the output")
    model.delete_adapters("default")
    must_equal(subject.call(model), plain, "with the adapter deleted the output")
    return figures


def with_adapter(model: nn.Module) -> None:
    """Add a LoRA adapter with random weights to a model's attention, or to all its Linear layers where it has none of
    the usual names. It is weak: static ranges are those of the model without it."""
    from peft import LoraConfig

    linear = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    attention = [name for name in linear if name.endswith(ATTENTION)]
    torch.manual_seed(1)
    model.add_adapter(LoraConfig(r=4, lora_alpha=1, init_lora_weights=False, target_modules=attention or linear))


def in_groups(model: nn.Module, folder: Path) -> None:
    model.enable_group_offload(onload_device=CPU, offload_type="leaf_level", offload_to_disk_path=str(folder))


def to_cpu(model: nn.Module, folder: Path) -> None:
    accelerate.cpu_offload(model, execution_device=CPU)


def to_disk(model: nn.Module, folder: Path) -> None:
    accelerate.disk_offload(model, str(folder), execution_device=CPU)


def offloaded_by(*ways: Callable[[nn.Module, Path], None]) -> Callable[[Subject, str], dict[str, float]]:
    """The same outputs with weights that wait elsewhere until a layer is called."""

    def offloaded(subject: Subject, kind: str) -> dict[str, float]:
        right = subject.call(subject.model(kind))
        for way in ways:
            model = copy.deepcopy(subject.model(kind))
            with tempfile.TemporaryDirectory(dir=subject.folder) as folder:
                way(model, Path(folder))
                must_be_within(distance(subject.call(model), right), SAME, f"{way.__name__}: relative difference")
        return {}

    return offloaded


def columns(backend: str = "aot_eager") -> dict[str, Column]:
    """Name -> column, in the order in which they are run."""
    both, within = "in both formats", "relative error against float at most {:g}"
    return {
        "record": Column("calls are recorded, and replayed with the same outputs to the bit", record, (FLOAT,), True),
        "W8A8": Column(within.format(BOUNDS["W8A8"]), accuracy, ("W8A8",), True),
        "SVDQuant W4A8": Column(within.format(BOUNDS["SVDQuant"]), accuracy, ("SVDQuant",), True),
        "save": Column(f"`save_pretrained`, {both}", save),
        "load": Column(f"`from_pretrained` gives the same outputs to the bit, {both}", load),
        "compile": Column(f"W8A8 compiled ({backend}) within {COMPILED:g} of eager", compiled_by(backend), ("W8A8",)),
        "LoRA": Column(
            "an adapter of diffusers' own `add_adapter` changes the output as it changes float's (errors within the "
            f"format's bound), and is disabled and deleted to the bit, {both}",
            lora,
        ),
        "group offload": Column(f"leaf by leaf to disk: within {SAME:g}, {both}", offloaded_by(in_groups)),
        "offload": Column(
            f"accelerate's, to CPU and to disk: within {SAME:g}, {both}", offloaded_by(to_cpu, to_disk)
        ),
    }
