"""What the benchmarks of the kernels share: distances, the libraries to compare with, and lines of a file."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
import triton
from torch import Tensor
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "comparisons"))
from conditions import commit  # noqa: E402

from ptq4dm.cli.benches.tune import check_gpu  # noqa: E402
from ptq4dm.errors import UserError  # noqa: E402
from ptq4dm.files.atomic import replacing  # noqa: E402


def over(sets: list, function) -> list:
    return [lambda one=one: function(one) for one in sets]


def error(value: Tensor, expected: Tensor) -> float:
    return ((value.double() - expected.double()).norm() / expected.double().norm()).item()


def float8_rowwise(x: Tensor) -> tuple[Tensor, Tensor]:
    scale = x.abs().amax(1, keepdim=True).float().clamp(min=1e-12) / 448
    return (x.float() / scale).to(torch.float8_e4m3fn), scale


def libraries(sets: list) -> dict[str, list]:
    """What there is without us: cuBLAS in bf16 and fp8; the quantization of the latter compiled by torch."""
    quantize = torch.compile(float8_rowwise, dynamic=False)
    for one in sets:
        one.w8, scale = float8_rowwise(one.weight)
        one.w8_scale = scale.T.contiguous()
        one.x8, one.x8_scale = float8_rowwise(one.x)

    def scaled(one, x8, scale):
        return torch._scaled_mm(
            x8, one.w8.T, scale, one.w8_scale, bias=one.bias, out_dtype=torch.bfloat16, use_fast_accum=True
        )

    def with_branch(one):
        return torch.addmm(scaled(one, *quantize(one.x)), F.linear(one.x, one.down), one.up.T)

    found = {
        "bf16": over(sets, lambda one: F.linear(one.x, one.weight, one.bias)),
        "fp8": over(sets, lambda one: scaled(one, one.x8, one.x8_scale)),
        "fp8+quant": over(sets, lambda one: scaled(one, *quantize(one.x))),
    }
    if sets[0].down is not None:
        found["fp8+quant+branch"] = over(sets, with_branch)
    return found


def made_with() -> dict:
    """The card, the commit and versions that figures are of; without a GPU, that it is a CPU."""
    if not torch.cuda.is_available():
        return {"card": "CPU"}
    facts = {"card": torch.cuda.get_device_name(), "commit": commit()}
    return facts | {"torch": torch.__version__, "triton": triton.__version__}


def layers_on_hopper(texts: list[str]) -> list[tuple[int, ...]]:
    """N and K of layers "N,K". Raises UserError without a Hopper GPU, and for layers that are not of whole tiles."""
    check_gpu()
    layers = [tuple(map(int, text.split(","))) for text in texts]
    if any(n % 128 or k % 128 for n, k in layers):
        raise UserError("N and K are multiples of 128 here.")
    if torch.cuda.get_device_capability() < (9, 0):
        raise UserError("the kernels here load by Hopper's copy engine, which this GPU has not.")
    return layers


class Lines:
    """JSON lines of a file, one a measurement; made_with: the card, the commit and versions.

    Lines that were made with the same stay, and need not be measured again. Others are told, and moved to FILE.before
    when the first is added.
    """

    def __init__(self, path: Path, made_with: dict):
        self.path, self.made_with = path, made_with
        found = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
        self.rows = [row for row in found if row.items() >= made_with.items()]
        self.others = [row for row in found if row not in self.rows]
        if self.others:
            names = sorted(name for name in made_with if any(row.get(name) != made_with[name] for row in self.others))
            told = f"{len(self.others)} lines of another {', '.join(names)}"
            print(f"{path}: {told} go to {self.before.name} with the first that is added")

    @property
    def before(self) -> Path:
        return self.path.with_name(f"{self.path.name}.before")

    def has(self, **key) -> bool:
        return any(all(row.get(name) == value for name, value in key.items()) for row in self.rows)

    def add(self, row: dict) -> None:
        """Print a row and write the file."""
        self.rows.append(row | self.made_with)
        print(json.dumps(row), flush=True)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        if self.others:
            old = self.before.read_text() if self.before.exists() else ""
            self._write(self.before, old, self.others)
            self.others = []
        self._write(self.path, "", self.rows)

    def _write(self, path: Path, start: str, rows: list[dict]) -> None:
        with replacing(path) as temporary:
            temporary.write_text(start + "".join(json.dumps(one) + "\n" for one in rows))
