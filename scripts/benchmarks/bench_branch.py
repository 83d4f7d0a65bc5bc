"""The low-rank branch of SVDQuant without data, fast and slow ways to it: seconds, and how near it comes.

    python scripts/benchmarks/bench_branch.py --output FILE                    # dit-cifar10, on a CPU
    python scripts/benchmarks/bench_branch.py --shapes 3072x3072 12288x3072 3072x12288 --output FILE    # a GPU

    svd        the exact singular value decomposition in float64
    gram       by the eigenvectors of the smaller side's Gram matrix, in float64: what small layers take
    subspace   randomised subspace iteration in float32: what layers take whose smaller side is above 1024
    cholesky   the same, orthonormalised through the Cholesky factor of the small Gram matrix in place of QR
    batched    subspace, of `--batch` layers of one shape at once

`left` is what the branch leaves of the weights, beside what that of `svd` leaves: |W - L| over |W - L_svd|, the mean
over layers and the most; `turned` the same of the error of the quantized layers after all turns (data_free.py), which
start from it. `milliseconds` is one decomposition of one layer: the mean over layers, or the median of repeats. With
--shapes the weights are random, of singular values that fall as 1 / sqrt(k). Rows in the output are not made again.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from unittest import mock

import torch
from bench_common import Lines
from conditions import made_on
from torch import Tensor

import ptq4dm
from ptq4dm.errors import run
from ptq4dm.layers.view import find_layers
from ptq4dm.pipelines.denoiser import denoiser
from ptq4dm.svdquant.layers import data_free, lowrank
from ptq4dm.svdquant.layers.plan import SVDQPlan

Factors = tuple[Tensor, Tensor]


def svd(matrix: Tensor, rank: int, seed: int = 0) -> Factors:
    u, s, v = torch.linalg.svd(matrix.double(), full_matrices=False)
    return (u[:, :rank] * s[:rank]).to(matrix.dtype), v[:rank].to(matrix.dtype)


def gram(matrix: Tensor, rank: int, seed: int = 0) -> Factors:
    with mock.patch.object(lowrank, "GRAM_LIMIT", max(matrix.shape)):
        return lowrank.top_factors(matrix, rank, seed)


def subspace(matrix: Tensor, rank: int, seed: int = 0) -> Factors:
    with mock.patch.object(lowrank, "GRAM_LIMIT", 0):
        return lowrank.top_factors(matrix, rank, seed)


class ByCholesky:
    """Stands for the result of `torch.linalg.qr`, of a tall matrix [..., N, r]."""

    def __init__(self, tall: Tensor):
        wide = tall.double()
        factor, _ = torch.linalg.cholesky_ex(wide.mT @ wide)
        self.Q = torch.linalg.solve_triangular(factor.mT, wide, upper=True, left=False).to(tall.dtype)


@contextmanager
def by_cholesky() -> Iterator[None]:
    with mock.patch.object(torch.linalg, "qr", ByCholesky):
        yield


def cholesky(matrix: Tensor, rank: int, seed: int = 0) -> Factors:
    with by_cholesky():
        return subspace(matrix, rank, seed)


WAYS: dict[str, Callable[..., Factors]] = {"svd": svd, "gram": gram, "subspace": subspace, "cholesky": cholesky}


def timed(work: Callable[[], object], device: str) -> float:
    """Milliseconds until the device is done."""
    if device.startswith("cuda"):
        torch.cuda.synchronize()
    start = time.perf_counter()
    work()
    if device.startswith("cuda"):
        torch.cuda.synchronize()
    return (time.perf_counter() - start) * 1e3


def left(weight: Tensor, factors: Factors) -> float:
    return float((weight - factors[0] @ factors[1]).double().norm())


def turned(weight: Tensor, way: Callable[..., Factors], rank: int) -> float:
    """The error of the quantized weight after all turns, which begin with this way's factors."""
    plan = SVDQPlan(rank=rank, alpha=0.0, beta=0.0, evidence="none", rounding="nearest")
    with mock.patch.object(data_free, "top_factors", way):
        return float((weight - data_free.decompose(weight, plan, torch.float16).weight()).double().norm())


def of_model(name: str, rank: int, device: str) -> list[Tensor]:
    """The weights of a model's token-wise layers that a branch of this rank is for."""
    views = find_layers(denoiser(ptq4dm.load_pipeline(name, device=device)))
    weights = [
        view.weight.detach().flatten(1).float() for view in views if view.name.startswith("transformer_blocks")
    ]
    return [one for one in weights if min(one.shape) > 4 * rank and one.shape[1] % 64 == 0]


def random_weight(shape: str, device: str) -> Tensor:
    rows, columns = map(int, shape.split("x"))
    generator = torch.Generator(device).manual_seed(0)
    wide = torch.randn(rows, columns, generator=generator, device=device)
    few = 128
    up, down = (torch.randn(side, few, generator=generator, device=device) for side in (rows, columns))
    return 0.01 * wide + 0.01 * up / torch.arange(1, few + 1, device=device).sqrt() @ down.T


def compared(weights: list[Tensor], options, exact: bool) -> list[dict]:
    """A row for each way: of `weights`, one after the other."""
    names = [name for name in WAYS if exact or name != "svd"]
    results = {name: [WAYS[name](one, options.rank) for one in weights] for name in names}
    base = results["svd" if exact else "gram"]
    ends = [turned(one, WAYS["svd" if exact else "gram"], options.rank) for one in weights]
    rows = []
    for name in names:
        shares = [left(w, own) / left(w, best) for w, own, best in zip(weights, results[name], base, strict=True)]
        after = [turned(w, WAYS[name], options.rank) / end for w, end in zip(weights, ends, strict=True)]
        times = [
            timed(lambda one=one, name=name: WAYS[name](one, options.rank), options.device)
            for one in weights
            for _ in range(options.repeats)
        ]
        rows.append(
            {
                "way": name,
                "layers": len(weights),
                "left": round(statistics.mean(shares), 6),
                "left_most": round(max(shares), 6),
                "turned": round(statistics.mean(after), 6),
                "milliseconds": round(statistics.mean(times) if len(weights) > 1 else statistics.median(times), 3),
            }
        )
    return rows


def batched(weight: Tensor, options) -> dict:
    """Of `--batch` layers at once, the milliseconds of one."""
    many = weight.expand(options.batch, *weight.shape).contiguous()
    with mock.patch.object(lowrank, "GRAM_LIMIT", 0):
        times = [
            timed(lambda: torch.vmap(lambda one: _iterated(one, options.rank))(many), options.device)
            for _ in range(options.repeats + 1)
        ][1:]
    return {"way": "batched", "layers": options.batch, "milliseconds": round(min(times) / options.batch, 3)}


def _iterated(matrix: Tensor, rank: int) -> Factors:
    """`subspace` for vmap, which draws no numbers and takes no eigenvectors of several at once on a CPU."""
    q = torch.linalg.qr(matrix[:, : rank + lowrank.OVERSAMPLING]).Q
    for _ in range(lowrank.POWER_STEPS + 1):
        q = torch.linalg.qr(matrix @ torch.linalg.qr(matrix.T @ q).Q).Q
    down = torch.linalg.qr((q[:, :rank].T @ matrix).T).Q.T
    return matrix @ down.T, down


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", default="dit-cifar10", help="whose layers, where no shapes are named")
    parser.add_argument("--shapes", nargs="+", metavar="NxK", help="random weights of these shapes")
    parser.add_argument("--rank", type=int, default=32)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--output", type=Path, required=True)
    options = parser.parse_args()
    lines = Lines(options.output, made_on(options.device) | {"rank": options.rank})
    for source in options.shapes or [options.model]:
        if lines.has(source=source):
            continue
        known = options.shapes is None
        weights = of_model(source, options.rank, options.device) if known else [random_weight(source, options.device)]
        rows = compared(weights, options, exact=known or min(weights[0].shape) <= 3072)
        for row in [*rows, batched(weights[0], options)]:
            lines.add({"source": source, **row})


if __name__ == "__main__":
    run(main)
