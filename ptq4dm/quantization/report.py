"""What a model stores and which kernel runs each layer; and what quantization did to each layer."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from torch import nn

from ..files.atomic import replacing
from ..kernels.w8a8 import layer as w8a8
from ..layers.base import is_quantized
from ..layers.sizes import full_bytes, stored_bytes, text_of
from ..layers.view import find_layers
from ..pipelines.denoiser import networks_of
from ..tables import aligned

SIZES = ("bytes_before", "bytes_after", "in_16_bits", "full_in_16_bits")
BY_NETWORK = ("recipes", "calls")
REFERENCE = w8a8.REFERENCE
BLOCK_ERRORS = ("block_error", "block_error_nearest", "block_error_start")  # of a trained layer's row: of its block


def memory_of(pipe: Any) -> dict[str, int]:
    """Name -> bytes of every network of a pipeline, as `stored_bytes` counts; {} of a model by itself."""
    return {} if isinstance(pipe, nn.Module) else {name: stored_bytes(one) for name, one in networks_of(pipe).items()}


def memory_beside_floats(pipe: Any, original: Any = None) -> dict[str, list[int]]:
    """Name -> bytes of every network of a pipeline, [as floats, as it is]; as floats those of an original where one
    is given, else as `full_bytes` counts."""
    floats = {} if original is None else memory_of(original)
    return {name: [floats.get(name, full_bytes(one)), stored_bytes(one)] for name, one in networks_of(pipe).items()}


def memory_lines(memory: Mapping[str, Sequence[int]]) -> list[str]:
    """A line for each network of a pipeline, [bytes before, bytes after], and their sum."""
    if len(memory) < 2:
        return []
    sums = [sum(column) for column in zip(*memory.values(), strict=True)]
    wide = max(map(len, [*memory, "all networks"]))
    return [
        f"{name:<{wide}}  {before / 1e6:>10.2f} MB -> {after / 1e6:>10.2f} MB"
        + ("" if before == after else f"  ({after / max(before, 1):.1%} of it)")
        for name, (before, after) in {**memory, "all networks": sums}.items()
    ]


def kernel_report(model: nn.Module) -> list[dict]:
    """A row for each Linear and Conv2d: name, kind, shape, format, kernel, bytes."""
    rows = []
    unquantized = {view.name for view in find_layers(model)}
    for name, module in model.named_modules():
        if not (is_quantized(module) or name in unquantized):
            continue
        weight = module.weight
        rows.append(
            {
                "layer": name,
                "kind": "conv2d" if isinstance(module, nn.Conv2d) else "linear",
                "shape": list(weight.shape),
                "format": str(module.plan) if is_quantized(module) else str(weight.dtype).removeprefix("torch."),
                "kernel": module.kernels_text() if is_quantized(module) else "torch",
                "bytes": stored_bytes(module),
            }
        )
    return rows


def without_kernel(rows: list[dict]) -> str:
    """A sentence on the layers that no kernel serves here, which is slower than full precision; "" for none.

    rows: of "layer", "format" and "kernel".
    """
    mine = [row for row in rows if REFERENCE in row["kernel"].split(" (")[0]]
    if not mine:
        return ""
    formats = Counter(row["format"] for row in mine)
    told = formats if len(formats) == 1 else [f"{count} of {name}" for name, count in formats.most_common()]
    return (
        f"no kernel serves {len(mine)} of {len(rows)} layers on this device ({', '.join(told)}; the first is "
        f"{mine[0]['layer']}): the formula in torch computes them, slower than full precision does"
    )


def narrower(rows: list[dict], method: Mapping[str, Any]) -> str:
    """A sentence on the layers that have a smaller rank than a recipe asks for; "" for none.

    rows: of "rank", where a layer has a low-rank branch. method: the recipe's summary.
    """
    asked = method.get("rank", 0)
    cut = [row["rank"] for row in rows if row.get("rank", asked) < asked]
    if not cut:
        return ""
    have = str(min(cut)) if min(cut) == max(cut) else f"{min(cut)} to {max(cut)}"
    return (
        f"rank {asked} is more than {len(cut)} of {len(rows)} layers have: their branch has {have}, the whole weight"
    )


def badness(row: dict) -> float:
    """The key that sorts rows of layers worst first: a layer that gives NaN or infinity is the worst of all."""
    return -math.inf if math.isnan(row["sqnr"]) else row["sqnr"]


@dataclass
class QuantizationReport:
    """What `quantize` did. layers: rows of layer, format, kernel, bytes, sqnr (dB) and its basis, worst first.

    networks: the names of the pipeline's networks that were quantized; left: those that are in full precision.
    found: network -> what its recipe found, where that is anything; "text" of it is a line of the table.
    kept: layers of these networks that are in full precision.
    bytes_before, bytes_after: of the tensors of a file, in the types that the networks have. in_16_bits: of those
        after, with floats in 16 bits; full_in_16_bits: likewise before. Budgets of bytes are the share of the two.
    memory: network of the pipeline -> its bytes [before, after].
    recipes: network -> its options, where `components` named networks.
    calls: network -> [recorded calls, their rows] that it was quantized by, where no store was collected.
    waiting: network -> what waits for its first calls (awaited/wait.py); it is quantized in one of them, and the
        report completed. Until then it is of the networks that are quantized already.
    """

    method: dict
    bytes_before: int
    bytes_after: int
    layers: list[dict] = field(default_factory=list)
    networks: list[str] = field(default_factory=list)
    left: list[str] = field(default_factory=list)
    found: dict[str, dict] = field(default_factory=dict)
    kept: int = 0
    in_16_bits: int = 0
    full_in_16_bits: int = 0
    memory: dict[str, list[int]] = field(default_factory=dict)
    recipes: dict[str, dict] = field(default_factory=dict)
    calls: dict[str, list[int]] = field(default_factory=dict)
    waiting: dict[str, Any] = field(default_factory=dict, repr=False)

    def cancel(self) -> None:
        """Wait no more: networks that were not quantized yet stay in full precision."""
        for wait in self.waiting.values():
            wait.cancel()
        self.waiting = {}

    def take(self, network: str, other: QuantizationReport) -> None:
        """Complete this report by that of a network that has waited."""
        waiting = {name: wait for name, wait in self.waiting.items() if name != network}
        whole = self.together([self, other]) if self.layers else other
        vars(self).update(vars(whole) | {"waiting": waiting})

    @classmethod
    def together(cls, reports: list[QuantizationReport]) -> QuantizationReport:
        """One report of several networks of a pipeline, of which the last was quantized last."""
        if len(reports) == 1:
            return reports[0]
        rows = [
            {**row, "layer": f"{report.networks[0]}.{row['layer']}" if len(report.networks) == 1 else row["layer"]}
            for report in reports
            for row in report.layers
        ]
        rows.sort(key=badness)
        names = [n for one in reports for n in one.networks]
        found = {name: told for one in reports for name, told in one.found.items()}
        kept = sum(one.kept for one in reports)
        before, after, now, full = (sum(getattr(one, name) for one in reports) for name in SIZES)
        first, last = reports[0], reports[-1]
        memory = {name: [first.memory[name][0], size] for name, (_, size) in last.memory.items()}
        recipes, calls = ({k: v for one in reports for k, v in getattr(one, name).items()} for name in BY_NETWORK)
        return cls(
            first.method, before, after, rows, names, last.left, found, kept, now, full, memory, recipes, calls
        )

    def to_dict(self) -> dict:
        """Plain JSON values, which know no infinity and no NaN: the sqnr of a layer without any error is null, and
        that of a layer that gives NaN or infinity is the text "nan". With `trained`, as the table has it.

        Raises UserError while a network waits for calls.
        """
        for wait in self.waiting.values():
            wait.refuse()
        data = {**asdict(self), "trained": self.trained()}
        del data["waiting"]
        data["layers"] = [{name: _plain(value) for name, value in row.items()} for row in data["layers"]]
        return data

    def save(self, path: str | Path) -> None:
        with replacing(path) as temporary:
            temporary.write_text(json.dumps(self.to_dict(), indent=1, allow_nan=False))

    def table(self, worst: int = 10) -> str:
        """The worst layers, then totals; of networks that wait, what they wait for."""
        awaited = [str(wait) for wait in self.waiting.values()]
        if not self.layers:
            return "\n".join(awaited)
        basis = {row["basis"] for row in self.layers}
        what = "layer output" if basis == {"output"} else "weight"
        lines = aligned(
            [
                ["    SQNR", "format", "kernel", f"layer   ({what}, dB, worst {worst} first)"],
                *([f"{r['sqnr']:8.2f}", r["format"], r["kernel"], r["layer"]] for r in self.layers[:worst]),
            ]
        )
        if broken := [row["layer"] for row in self.layers if math.isnan(row["sqnr"])]:
            lines.append(f"{len(broken)} of {len(self.layers)} layers give NaN or infinity, the first {broken[0]}")
        kernels: dict[str, int] = {}
        for row in self.layers:
            kernels[row["kernel"]] = kernels.get(row["kernel"], 0) + 1
        served = ", ".join(f"{count} layers on {name}" for name, count in sorted(kernels.items()))
        lines.append(f"{served}")
        told = (without_kernel(self.layers), narrower(self.layers, self.method), self._split_text())
        lines += [text for text in told if text]
        lines.append(
            f"stored tensors: {self.bytes_before / 1e6:.2f} MB -> "
            f"{text_of(self.bytes_after, self.in_16_bits, self.full_in_16_bits)}"
        )
        if trained := self._trained_text():
            lines.append(trained)
        for name, found in self.found.items():
            lines.append(f"{name}: {found['text']}" if len(self.networks) > 1 else found["text"])
        for name, (made, rows) in self.calls.items():
            lines.append(f"{name or 'the model'}: by {made} recorded calls of {rows} rows together")
        if self.networks:
            count = f" ({len(self.layers)} of {len(self.layers) + self.kept} layers)" if self.kept else ""
            left = f"other networks in full precision: {', '.join(self.left) or 'none'}"
            lines.append(f"quantized: {', '.join(self.networks)}{count}; {left}")
        return "\n".join(lines + memory_lines(self.memory) + awaited)

    def _split_text(self) -> str:
        counts = [row["parts"] for row in self.layers if "parts" in row]
        if not counts:
            return ""
        kinds = Counter(counts)
        most = ", ".join(f"{count} in {parts}" for parts, count in sorted(kinds.items()))
        return f"inputs with a grid for each part: of {len(counts)} of {len(self.layers)} layers ({most} parts)"

    def trained(self) -> dict[str, float | None] | None:
        """What training of blocks did; None where there was none.

        flips: the mean share of a layer's codes that are not the nearest. of_nearest, of_start: a block's error over
            that with weights rounded to nearest, and over that where its training began: geometric means of the
            blocks that have errors, None where none has.
        """
        rows = [row for row in self.layers if "flips" in row]
        if not rows:
            return None
        blocks = {tuple(row.get(name, 0.0) for name in BLOCK_ERRORS) for row in rows}
        whole = [block for block in blocks if min(block) > 0]
        of_nearest, of_start = (_mean_ratio([(block[0], block[i]) for block in whole]) for i in (1, 2))
        return {
            "flips": sum(row["flips"] for row in rows) / len(rows),
            "of_nearest": of_nearest,
            "of_start": of_start,
        }

    def _trained_text(self) -> str:
        found = self.trained()
        if found is None:
            return ""
        text = f"trained: {found['flips']:.1%} of a layer's codes are not the nearest"
        if found["of_nearest"] is None:
            return text
        return (
            f"{text}; a block's error is {found['of_nearest']:.3f} times that of nearest, {found['of_start']:.3f} "
            "times that of where training began (geometric means)"
        )


def _mean_ratio(pairs: list[tuple[float, float]]) -> float | None:
    """The geometric mean of a / b; None of no pairs."""
    return math.exp(sum(math.log(a / b) for a, b in pairs) / len(pairs)) if pairs else None


def _plain(value: object) -> object:
    """A figure as JSON holds it."""
    if isinstance(value, float) and not math.isfinite(value):
        return "nan" if math.isnan(value) else None
    return value
