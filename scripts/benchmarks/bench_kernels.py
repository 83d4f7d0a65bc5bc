"""Build, check and time the SVDQuant kernels against what else a GPU offers, in one run.

    python scripts/benchmarks/bench_kernels.py [--tune] [--shapes flux-qkv flux-out ...] [--rank 32]
        [--output out/bench]

torchao and GemLite are rows of it where they are installed (bench_installed.py).

Every time is the median over replays of a CUDA graph that holds several calls, each on the next of several sets of
weights and inputs, together larger than the L2 cache; the candidates of a shape take turns. Ratios are to bf16
`F.linear` with bias. Ours is everything: smoothing, quantization, both halves of the branch, bias.
--tune first searches settings for these shapes, as `ptq4dm bench tune` does, and records them where kernels look.
"""

from __future__ import annotations

import argparse
import importlib.util
import itertools
import json
from pathlib import Path

import torch
import triton
from bench_common import commit, error, libraries, over
from bench_installed import BUILDERS, installed

from ptq4dm.cli.benches.tune import check_gpu, tune
from ptq4dm.errors import run
from ptq4dm.kernels.runtime.settings import tuned_file
from ptq4dm.kernels.tuning import launches_w4 as search_svdq
from ptq4dm.kernels.tuning.launches_w4 import chosen, sets_for, state_for
from ptq4dm.kernels.tuning.stopwatch import race
from ptq4dm.kernels.w4 import reference as svdq
from ptq4dm.kernels.w4.layer import svdq_linear, unpacked

SHAPES = search_svdq.SHAPES | {  # M, N, K
    "dit-fc1": (16384, 1536, 384),
    "rows-256": (256, 12288, 3072),
    "rows-64": (64, 12288, 3072),
}

LIMITS = {  # relative errors; the reference does not round the folded weights of 8-bit activations to e4m3 or int8
    "fp8": {"to formula": 6e-3, "to reference": 4e-2},
    "int8": {"to formula": 6e-3, "to reference": 1.5e-2},
    "int4": {"to reference": 6e-3},
    "none": {"to reference": 6e-3},
}


def arguments(one, activation: str) -> tuple:
    smooth = None if activation == "none" else one.smooth
    return one.qweight, one.wscales, smooth, one.down, one.up, one.bias, activation, 0.0


def kept(one, activation: str) -> torch.Tensor:
    """Ours on a weight that was unpacked before and is kept, as `ptq4dm.optimize(weight_cache=)` has it."""
    return svdq_linear(one.x, *arguments(one, activation), "", *one.eight)


def checked(one, activation: str) -> dict[str, float]:
    """Distances of our result: to the formula on our own codes in float64, and to the reference on its own."""
    y = svdq_linear(one.x, *arguments(one, activation))
    if not torch.equal(y, svdq_linear(one.x, *arguments(one, activation))):
        raise SystemExit("two runs of our kernels gave different bits")
    reference = svdq.svdq_linear(one.x.float(), *arguments(one, activation))
    found = {"to reference": error(y, reference)}
    if "product" in chosen(one, activation) and activation != "int4":
        found["to formula"] = error(y, formula(one, activation))
    limit = LIMITS[activation]
    if not all(found[key] < limit[key] for key in found):
        raise SystemExit(f"our kernels are wrong: {found}, allowed {limit}")
    return found


def formula(one, activation: str) -> torch.Tensor:
    """The product of the codes that our kernels made, in float64."""
    state = state_for(one, activation)
    search_svdq.run("prepare", one, chosen(one, activation)["prepare"], state)
    (codes, row_scale, branch), (w8, column_scale) = state.rows, state.weight
    expected = (codes.double() * row_scale.double()[:, None]) @ (w8.double() * column_scale.double()[:, None]).T
    if one.up is not None:
        expected += branch.double()[:, : one.up.shape[1]] @ one.up.double().T
    return expected + one.bias.double()


def parts(one, activation: str) -> dict[str, tuple]:
    """name -> (function of a set, bytes it moves at least, operations): the launches of one call, each by itself.

    Of a launch that prepares both sides, its two jobs too.
    """
    (m, k), n = one.x.shape, len(one.qweight)
    rank = 0 if one.down is None else len(one.down)
    state, settings = state_for(one, activation), chosen(one, activation)
    width = state.weight[0].element_size()
    packed, branch = n * k // 2 + one.wscales.nbytes, 2 * rank * (m + n)
    rows = 2 * m * k + m * k + 4 * state.rows[1].numel() + 2 * m * rank if activation != "none" else 0
    work = {
        "activation": (rows, 2 * m * k * rank),
        "unpack": (packed + width * n * k, 0),
        "prepare": (rows + packed + width * n * k, 2 * m * k * rank),
        "product": (m * k + n * k + 2 * m * n + branch, 2 * m * n * (k + rank)),
        "short": (packed + m * k * state.rows[0].element_size() + 2 * m * n + branch, 2 * m * n * (k + rank)),
        "cublas": (2 * (m * k + n * k + m * n), 2 * m * n * k),
    }
    if "prepare" in settings:
        settings = {"activation": settings["prepare"], "unpack": settings["prepare"]} | settings
    return {
        step: (lambda one, step=step, setting=setting: search_svdq.run(step, one, setting, state), *work[step])
        for step, setting in settings.items()
    }


def measure(name: str, activation: str, rank: int) -> dict:
    m, n, k = SHAPES[name]
    rank = 0 if activation == "none" else rank  # weight-only layers have no branch
    sets = sets_for(m, n, k, rank)
    row = {"shape": name, "M": m, "N": n, "K": k, "rank": rank, "activation": activation}
    row["error"] = checked(sets[0], activation)
    ours = parts(sets[0], activation)
    candidates = (
        libraries(sets)
        | installed(sets)
        | {"ours": over(sets, lambda one: svdq_linear(one.x, *arguments(one, activation)))}
    )
    if activation != "none":
        for one in sets:
            one.eight = unpacked(one.qweight, one.wscales, activation)
        candidates["ours, kept"] = over(sets, lambda one: kept(one, activation))
        if not torch.equal(kept(sets[0], activation), candidates["ours"][0]()):
            raise SystemExit("a weight that is kept in 8 bits gave other bits")
    candidates |= {f"ours: {part}": over(sets, function) for part, (function, _, _) in ours.items()}
    times = row["us"] = race(candidates)
    row["ratio"] = {key: times["bf16"] / spent for key, spent in times.items()}
    row["TB/s"] = {part: moved / times[f"ours: {part}"] / 1e6 for part, (_, moved, _) in ours.items()}
    row["TFLOP/s"] = {part: work / times[f"ours: {part}"] / 1e6 for part, (_, _, work) in ours.items()}
    row["TFLOP/s"]["bf16"] = 2 * m * n * k / times["bf16"] / 1e6
    row["settings"] = chosen(sets[0], activation)
    return row


def table(rows: list[dict]) -> str:
    """Markdown: microseconds, ratios to bf16, and what our launches reach."""
    others = [name for name in BUILDERS if any(name in row["ratio"] for row in rows)]
    heads = [
        "shape (M,N,K)",
        "bf16 us",
        "TFLOP/s",
        "fp8",
        "fp8 + quantization",
        "+ branch unfused",
        *others,
        "**ours**",
        "ours, weight kept in 8 bits",
    ]
    heads += ["our launches: us, TB/s, TFLOP/s", "errors"]
    lines = ["| " + " | ".join(heads) + " |", "|" + "---|" * len(heads)]
    for row in rows:
        us, ratio = row["us"], row["ratio"]
        launches = [
            f"{part} {us[f'ours: {part}']:.1f}, {row['TB/s'][part]:.2f}, {row['TFLOP/s'][part]:.0f}"
            for part in row["TB/s"]
        ]
        cells = [f"{row['shape']} {row['M']},{row['N']},{row['K']} {row['activation']} r{row['rank']}"]
        cells += [f"{us['bf16']:.1f}", f"{row['TFLOP/s']['bf16']:.0f}"]
        compared = ("fp8", "fp8+quant", "fp8+quant+branch", *others)
        cells += [f"{ratio[key]:.2f}" if key in ratio else "" for key in compared]
        cells += [f"**{ratio['ours']:.2f}** ({us['ours']:.1f} us)"]
        cells += [f"{ratio['ours, kept']:.2f}" if "ours, kept" in ratio else "", "; ".join(launches)]
        cells += [", ".join(f"{key} {value:.1e}" for key, value in row["error"].items())]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def roofline(rows: list[dict], copy_speed: float, path: Path) -> None:
    """Operations per least byte against operations per second: colours are launches, marks shapes.

    The roof: the bandwidth of a copying kernel, and the best rate of this run.
    """
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4.5))
    parts = [*dict.fromkeys(part for row in rows for part in row["TB/s"] if row["TFLOP/s"][part])]
    best = max(row["TFLOP/s"].get(part, 0) for row in rows for part in parts)
    axes.plot([1, best / copy_speed, 1e4], [copy_speed, best, best], "k-", lw=1)
    for color, part in enumerate(parts):
        for mark, row in zip(itertools.cycle("osD^vP*X<>hd"), rows, strict=False):
            if part in row["TB/s"]:
                speed, name = row["TFLOP/s"][part], f"{part}, {row['shape']}"
                axes.plot(speed / row["TB/s"][part], speed, mark, color=f"C{color}", label=name, ms=5)
    axes.set(xscale="log", yscale="log", xlabel="operations per byte (least bytes)", ylabel="TFLOP/s")
    axes.legend(fontsize=6, ncols=len(parts), loc="upper center", bbox_to_anchor=(0.5, -0.14))
    figure.savefig(path, dpi=120, bbox_inches="tight")


def copy_bandwidth() -> float:
    """TB/s of a kernel that reads 1 GB and writes 1 GB (a copy would go to the copy engine, which is slower)."""
    source, target = (torch.empty(1 << 28, dtype=torch.int32, device="cuda").random_() for _ in range(2))
    copy = [lambda: torch.bitwise_not(source, out=target)]
    return 2 * source.nbytes / race({"copy": copy}, 5)["copy"] / 1e6


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--activation", choices=list(LIMITS), default="fp8")
    parser.add_argument("--rank", type=int, default=32)
    parser.add_argument("--tune", action="store_true", help="search settings first, and record them")
    parser.add_argument("--output", type=Path, default=Path("out/bench-kernels"))
    args = parser.parse_args()
    check_gpu()
    args.output.mkdir(parents=True, exist_ok=True)
    report: dict = {"device": torch.cuda.get_device_name(), "commit": commit()}
    report |= {"torch": torch.__version__, "triton": triton.__version__}
    report |= {"copy TB/s": copy_bandwidth(), "rows": []}
    print(json.dumps(report), flush=True)
    if args.tune:
        shapes = [SHAPES[name] for name in args.shapes]
        tune([one for shape in shapes for one in search_svdq.launches(*shape, args.rank, args.activation)])
        (args.output / tuned_file().name).write_text(tuned_file().read_text())
    for name in args.shapes:
        print(name, flush=True)
        report["rows"].append(measure(name, args.activation, args.rank))
        print(table(report["rows"][-1:]), flush=True)
        (args.output / "bench_kernels.json").write_text(json.dumps(report, indent=1))
        (args.output / "bench_kernels.md").write_text(table(report["rows"]))
        torch.cuda.empty_cache()
    print(table(report["rows"]))
    if importlib.util.find_spec("matplotlib"):
        roofline(report["rows"], report["copy TB/s"], args.output / "roofline.png")


if __name__ == "__main__":
    run(main)
