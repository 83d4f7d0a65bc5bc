"""Build, check and time the SVDQuant kernels against what else a GPU offers, in one run.

    python scripts/bench_kernels.py [--tune] [--shapes flux-qkv flux-out ...] [--rank 32] [--output out/bench]

Every time is the median over replays of a CUDA graph that holds several calls, each on the next of several sets of
weights and inputs, together larger than the L2 cache; the candidates of a shape take turns. Ratios are to bf16
`F.linear` with bias. Ours is everything: smoothing, quantization, both halves of the branch, bias.
--tune first measures every setting of bench_tune.py and writes the best ones in the form of kernels/tuned/.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
from pathlib import Path

import bench_tune
import torch
import triton
from bench_common import error, libraries, over, race, sets_for

from ptq4dm.kernels import svdq, svdq_activation, svdq_unpack
from ptq4dm.kernels.svdq_linear import svdq_linear
from ptq4dm.kernels.tuning import best_config

SHAPES = {  # M, N, K
    "flux-qkv": (4608, 9216, 3072),
    "flux-out": (4608, 3072, 3072),
    "flux-up": (4608, 12288, 3072),
    "flux-down": (4608, 3072, 12288),
    "pixart-fc1": (4096, 4608, 1152),
    "sdxl-ff": (4096, 10240, 1280),
    "dit-fc1": (16384, 1536, 384),
    "rows-256": (256, 12288, 3072),
    "rows-64": (64, 12288, 3072),
    "adaln-1": (1, 18432, 3072),
    "adaln-16": (16, 18432, 3072),
}


def arguments(one, activation: str) -> tuple:
    return one.qweight, one.wscales, one.smooth, one.down, one.up, one.bias, activation, 0.0


def checked(one, activation: str) -> dict[str, float]:
    """Distances of our result: to the formula on our own codes in float64, and to the reference on its own."""
    y = svdq_linear(one.x, *arguments(one, activation))
    if not torch.equal(y, svdq_linear(one.x, *arguments(one, activation))):
        raise SystemExit("two runs of our kernels gave different bits")
    state = bench_tune.state_for(one, activation)
    for kernel, setting in settings(one, activation).items():
        bench_tune.KERNELS[kernel][0](one, activation, setting, state)
    (codes, row_scale, branch), (w8, column_scale), _ = state
    expected = (codes.double() * row_scale.double()[:, None]) @ (w8.double() * column_scale.double()[:, None]).T
    if one.up is not None:
        expected += branch.double()[:, : one.up.shape[1]] @ one.up.double().T
    expected += one.bias.double()
    reference = svdq.svdq_linear(one.x.float(), *arguments(one, activation))
    found = {"to formula": error(y, expected), "to reference": error(y, reference)}
    if not found["to formula"] < 6e-3:
        raise SystemExit(f"our kernels are wrong: {found}")
    return found


def settings(one, activation: str) -> dict[str, dict]:
    sizes = (one.x.device, len(one.x), len(one.qweight), one.x.shape[1])
    return {kernel: best_config(f"{activation}.{kernel}", *sizes) for kernel in bench_tune.KERNELS}


def parts(one, activation: str) -> dict[str, tuple]:
    """name -> (function of a set, bytes it moves at least, operations): the launches of one call, each by itself."""
    (m, k), n = one.x.shape, len(one.qweight)
    rank = 0 if one.down is None else len(one.down)
    chosen, state = settings(one, activation), bench_tune.state_for(one, activation)
    apart = chosen["prepare"]

    def activation_alone(one):
        given = (one.x, one.smooth, one.down, activation, 0.0, state[0])
        svdq_activation.quantize_activation(*given, apart)

    reads, writes = 2 * m * k, m * k + 4 * m + 2 * m * rank
    weight = n * k // 2 + one.wscales.nbytes + n * k
    product = m * k + n * k + 2 * m * n + 2 * rank * (m + n)
    return {
        "activation": (activation_alone, reads + writes, 2 * m * k * rank),
        "unpack": (lambda one: svdq_unpack.unpack(one.qweight, one.wscales, state[1], apart), weight, 0),
        "both": (
            lambda one: bench_tune.run_prepare(one, activation, chosen["prepare"], state),
            reads + writes + weight,
            2 * m * k * rank,
        ),
        "product": (
            lambda one: bench_tune.run_product(one, activation, chosen["product"], state),
            product,
            2 * m * n * (k + rank),
        ),
    }


def measure(name: str, activation: str, rank: int, tune: bool) -> dict:
    m, n, k = SHAPES[name]
    sets = sets_for(m, n, k, rank)
    if tune:
        bench_tune.tune(sets, activation)
    row = {"shape": name, "M": m, "N": n, "K": k, "rank": rank, "activation": activation}
    row["error"] = checked(sets[0], activation)
    ours = parts(sets[0], activation)
    candidates = libraries(sets) | {"ours": over(sets, lambda one: svdq_linear(one.x, *arguments(one, activation)))}
    candidates |= {f"ours: {part}": over(sets, function) for part, (function, _, _) in ours.items()}
    times = row["us"] = race(candidates)
    row["ratio"] = {key: times["bf16"] / spent for key, spent in times.items()}
    row["TB/s"] = {part: moved / times[f"ours: {part}"] / 1e6 for part, (_, moved, _) in ours.items()}
    row["TFLOP/s"] = {part: work / times[f"ours: {part}"] / 1e6 for part, (_, _, work) in ours.items()}
    row["TFLOP/s"]["bf16"] = 2 * m * n * k / times["bf16"] / 1e6
    row["settings"] = settings(sets[0], activation)
    return row


def table(rows: list[dict]) -> str:
    """Markdown: microseconds, ratios to bf16, and what our launches reach."""
    lines = [
        "| shape (M,N,K) | bf16 us | TFLOP/s | fp8 | fp8 + quantization | + branch unfused | **ours** | "
        "activation us, TB/s "
        "| unpack us, TB/s | both us, TB/s | product us, TFLOP/s | error to formula, to reference |",
        "|" + "---|" * 12,
    ]
    for row in rows:
        us, ratio, speed = row["us"], row["ratio"], row["TB/s"]
        cells = [f"{row['shape']} {row['M']},{row['N']},{row['K']} {row['activation']} r{row['rank']}"]
        cells += [f"{us['bf16']:.1f}", f"{row['TFLOP/s']['bf16']:.0f}"]
        cells += [f"{ratio[key]:.2f}" if key in ratio else "" for key in ("fp8", "fp8+quant", "fp8+quant+branch")]
        cells += [f"**{ratio['ours']:.2f}** ({us['ours']:.1f} us)"]
        cells += [f"{us[f'ours: {part}']:.1f}, {speed[part]:.2f}" for part in ("activation", "unpack", "both")]
        cells += [f"{us['ours: product']:.1f}, {row['TFLOP/s']['product']:.0f}"]
        cells += [", ".join(f"{value:.1e}" for value in row["error"].values())]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def roofline(rows: list[dict], copy_speed: float, path: Path) -> None:
    """Operations per byte against operations per second: each launch, under the ceilings measured in this run."""
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 5))
    best = max(max(row["TFLOP/s"]["product"] for row in rows), 1)
    axes.plot([1, best / copy_speed, 1e4], [copy_speed, best, best], "k-", lw=1)
    for part, marker in (("activation", "s"), ("both", "^"), ("product", "o")):
        speeds = [row["TFLOP/s"][part] for row in rows]
        density = [row["TFLOP/s"][part] / row["TB/s"][part] for row in rows]
        axes.plot(density, speeds, marker, label=part)
    for row in rows:
        axes.annotate(row["shape"], (row["TFLOP/s"]["product"] / row["TB/s"]["product"], row["TFLOP/s"]["product"]))
    axes.set(xscale="log", yscale="log", xlabel="operations per byte (least bytes)", ylabel="TFLOP/s")
    axes.legend()
    figure.savefig(path, dpi=120, bbox_inches="tight")


def copy_bandwidth() -> float:
    """TB/s of a device-to-device copy of 2 GB, bytes read and written."""
    source, target = (torch.empty(1 << 30, dtype=torch.uint8, device="cuda").random_() for _ in range(2))
    return 2 * source.nbytes / race({"copy": [lambda: target.copy_(source)]}, 5)["copy"] / 1e6


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--activation", choices=list(bench_tune.DTYPES), default="fp8")
    parser.add_argument("--rank", type=int, default=32)
    parser.add_argument("--tune", action="store_true", help="search settings first; writes kernels/tuned/")
    parser.add_argument("--output", type=Path, default=Path("out/bench-kernels"))
    args = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("these kernels are timed on a GPU; torch finds none here.")
    args.output.mkdir(parents=True, exist_ok=True)
    report = {"device": torch.cuda.get_device_name(), "torch": torch.__version__, "triton": triton.__version__}
    report |= {"copy TB/s": copy_bandwidth(), "rows": []}
    print(json.dumps(report), flush=True)
    for name in args.shapes:
        print(name, flush=True)
        report["rows"].append(measure(name, args.activation, args.rank, args.tune))
        print(table(report["rows"][-1:]), flush=True)
        (args.output / "bench_kernels.json").write_text(json.dumps(report, indent=1))
        (args.output / "bench_kernels.md").write_text(table(report["rows"]))
        if args.tune:
            (args.output / bench_tune.tuned_file().name).write_text(bench_tune.tuned_file().read_text())
        torch.cuda.empty_cache()
    print(table(report["rows"]))
    if importlib.util.find_spec("matplotlib"):
        roofline(report["rows"], report["copy TB/s"], args.output / "roofline.png")


if __name__ == "__main__":
    main()
