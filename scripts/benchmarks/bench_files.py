"""Time Linear layers as files of other tools make them, against what else computes with such weights, in one run.

    python scripts/benchmarks/bench_files.py [--rows 1 512 4096] [--shapes 3072,3072 12288,3072 3072,12288]
        [--formats Q8_0 Q4_K ...] [--device cuda|cpu] [--output out/bench-files.json]

Weights are random, since times do not depend on them. For each shape and format a row of the file, which goes on
where it stopped: microseconds of our layer, of the same weight made floats by operations of torch in every call (as
loaders without kernels for a format do, diffusers' of GGUF among them), and of a float layer (bf16 on a GPU, float32
on a CPU). Ratios are those times over ours: above 1 ours is faster.
"""

from __future__ import annotations

import argparse
import functools
from collections.abc import Callable
from pathlib import Path

import torch
from bench_common import commit
from torch import Tensor, nn
from torch.nn import functional as F

from ptq4dm.errors import UserError, run
from ptq4dm.files.rows import Rows
from ptq4dm.interchange.formats import READERS
from ptq4dm.interchange.gguf import TYPES
from ptq4dm.interchange.rows import Rows as Weight
from ptq4dm.interchange.rows import layer_of
from ptq4dm.interchange.stored_layer import StoredLayer
from ptq4dm.kernels.tuning import latency

SHAPES = ["3072,3072", "12288,3072", "3072,12288"]  # N, K: FLUX's
E4M3 = torch.float8_e4m3fn


def blocks_of(kind: int, n: int, k: int) -> Weight:
    """Random bytes of a type of blocks, its float16 numbers around 1."""
    type_ = TYPES[kind]
    raw = torch.randint(0, 256, (n, k // type_.inputs, type_.bytes), dtype=torch.uint8)
    for start in {"Q6_K": [208], "Q8_0": [0], "Q4_0": [0], "Q5_0": [0]}.get(type_.name, [0, 2]):
        raw[..., start : start + 2] = torch.rand(*raw.shape[:2], 1).half().view(torch.uint8)
    return Weight(type_.plan, k, type_.read(raw))


def comfy_of(form: str, n: int, k: int, **config: object) -> Weight:
    """Random codes of a format of ComfyUI."""
    tensors = {
        "float8_e4m3fn": lambda: {"weight": torch.randn(n, k).to(E4M3), "weight_scale": torch.rand(()) + 0.1},
        "int8_tensorwise": lambda: {
            "weight": torch.randint(-127, 128, (n, k), dtype=torch.int8), "weight_scale": torch.rand(n, 1) + 0.1
        },
        "convrot_w4a4": lambda: {
            "weight": torch.randint(-128, 128, (n, k // 2), dtype=torch.int8), "weight_scale": torch.rand(n) + 0.1
        },
    }[form]()  # fmt: skip
    named = {f"layer.{name}": one for name, one in tensors.items()}
    return READERS[form](StoredLayer("layer", named, {"format": form, **config}))


FORMATS: dict[str, Callable[[int, int], Weight]] = {
    **{one.name: functools.partial(blocks_of, kind) for kind, one in TYPES.items()},
    "fp8": functools.partial(comfy_of, "float8_e4m3fn"),
    "fp8 exact inputs": functools.partial(comfy_of, "float8_e4m3fn", full_precision_matrix_mult=True),
    "int8": functools.partial(comfy_of, "int8_tensorwise"),
    "int8 convrot": functools.partial(comfy_of, "int8_tensorwise", convrot=True),
    "int4 convrot": functools.partial(comfy_of, "convrot_w4a4"),
}


def measured(form: str, m: int, n: int, k: int, device: torch.device) -> dict:
    """Kernel, microseconds and ratios of a layer."""
    kind = torch.bfloat16 if device.type == "cuda" else torch.float32

    def layer(seed: int) -> nn.Module:
        torch.manual_seed(seed)
        linear = nn.Linear(k, n, bias=False, device=device, dtype=kind)
        return layer_of(linear, FORMATS[form](n, k), None, "layer", form)

    def inputs(seed: int) -> Tensor:
        torch.manual_seed(seed)
        return torch.randn(m, k, device=device, dtype=kind)

    def ours(seed: int) -> Callable[[], Tensor]:
        return functools.partial(layer(seed), inputs(seed))

    def dequantized(seed: int) -> Callable[[], Tensor]:
        one, x = layer(seed), inputs(seed)
        return lambda: F.linear(x, one.dequantized_weight().to(kind))

    def floats(seed: int) -> Callable[[], Tensor]:
        return functools.partial(F.linear, inputs(seed), torch.randn(n, k, device=device, dtype=kind))

    moved = kind.itemsize * m * (n + k) + n * k // 2
    calls = {"ours": ours, "floats in every call": dequantized, "float layer": floats}
    times = {name: latency.microseconds(make, moved, device) for name, make in calls.items()}
    return {
        "kernel": layer(0).kernels_text(),
        "microseconds": {name: round(one, 1) for name, one in times.items()},
        "ratio": {name: round(one / times["ours"], 3) for name, one in times.items() if name != "ours"},
    }


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 512, 4096])
    parser.add_argument("--shapes", nargs="+", metavar="N,K", default=SHAPES, help="K a multiple of 256")
    parser.add_argument("--formats", nargs="+", choices=FORMATS, default=list(FORMATS))
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--output", type=Path, default=Path("out/bench-files.json"))
    args = parser.parse_args()
    shapes = [tuple(map(int, shape.split(","))) for shape in args.shapes]
    if any(k % 256 for _, k in shapes):
        raise UserError("K is a multiple of 256 here.")
    device = torch.device(args.device)
    place = torch.cuda.get_device_name() if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    settings = {"device": place, "torch": torch.__version__, "commit": commit()}
    lines = Rows(args.output, settings, {"format": str, "m": int, "n": int, "k": int})
    done = {(one["format"], one["m"], one["n"], one["k"]) for one in lines}
    for form in args.formats:
        for n, k in shapes:
            for m in args.rows:
                if (form, m, n, k) not in done:
                    row = {"format": form, "m": m, "n": n, "k": k, **measured(form, m, n, k, device)}
                    lines.add(row)
                    print(row, flush=True)


if __name__ == "__main__":
    run(main)
