"""What each part of SVDQuant is worth, and what it costs in bytes: the README's tables.

    python scripts/compare_svdquant.py --output out/svdquant.json            # the parts, on dit-cifar10
    python scripts/compare_svdquant.py --bytes --output out/svdquant.json    # error against stored bytes
    python scripts/compare_svdquant.py --num-fid 10000 --device cuda ...     # with feature-FID, on a GPU

Attention and feed-forward layers are quantized; all else stays as it is, except with --whole. Columns: PSNR of
same-seed images (--num-paired seeds, --steps DDIM steps) and noise prediction error, both against full precision, on
seeds that calibration never saw; stored bytes against float16; feature-FID. Rows in the output are not made again.
"""

from __future__ import annotations

import argparse
import copy
import json
import time
from pathlib import Path

import torch
from tqdm.auto import tqdm

import ptq4dm
from ptq4dm.extractors import load_extractor, load_reference_statistics
from ptq4dm.files import replacing
from ptq4dm.frechet import Moments, frechet_distance
from ptq4dm.images import to_uint8
from ptq4dm.record import record_calls, replay
from ptq4dm.sampling import denoiser, denoiser_name, sample

HELD_OUT = 1_000_000  # first seed that calibration never uses
ELSEWHERE = {"*norm*": "keep"}  # adaLN and its embeddings


def parts() -> list[tuple[str, dict]]:
    """RTN, smoothing only, branch only, SVDQuant at several ranks; W4A4 and W4A8; both roundings."""
    rows = []
    for activations in ("int4", "int8"):
        for rounding in ("gptq", "nearest"):
            one = {"activations": activations, "rounding": rounding}
            rows.append(("RTN", {**one, "rank": 0, "smoothing": "none"}))
            rows.append(("smoothing only", {**one, "rank": 0}))
            rows.append(("low rank only", {**one, "smoothing": "none"}))
            rows += [("SVDQuant", {**one, "rank": rank}) for rank in (16, 32, 64)]
    return rows


def sizes() -> list[tuple[str, dict]]:
    """Error against bytes: ranks at group 64, and rounding alone in smaller groups."""
    rows = []
    for activations in ("int4", "int8"):
        rows += [("SVDQuant", {"activations": activations, "rank": rank}) for rank in (0, 4, 8, 16, 32, 64)]
        plain = {"activations": activations, "rank": 0, "smoothing": "none", "rounding": "nearest"}
        rows += [("RTN", {**plain, "group_size": size}) for size in (64, 32, 16)]
    return [*rows, ("RTN W8A8", {})]


def bytes_of_float16(model: torch.nn.Module) -> int:
    """Bytes of all tensors of a float32 model, were it one of float16: codes and scales stay what they are."""

    def size(name: str, tensor: torch.Tensor) -> int:
        scale = name.rpartition(".")[2] in ("weight_scale", "input_scale")
        return tensor.numel() * (2 if tensor.dtype == torch.float32 and not scale else tensor.element_size())

    return sum(size(name, tensor) for name, tensor in [*model.named_parameters(), *model.named_buffers()])


class Bench:
    """The model, its calibration and its truth, each made once."""

    def __init__(self, args):
        self.args = args
        self.pipe = ptq4dm.load_reference(args.model, device=args.device)
        self.exact = denoiser(self.pipe).eval()
        steps = args.steps
        self.store = ptq4dm.collect(
            self.pipe, ptq4dm.CalibrationConfig("solver", args.calibration_samples, steps, batch_size=args.batch_size)
        )
        self.pipe.scheduler.set_timesteps(steps)
        grid = self.pipe.scheduler.timesteps.tolist()
        self.seeds = range(HELD_OUT, HELD_OUT + args.num_paired)
        times = [grid[i % len(grid)] for i in range(args.num_paired)]
        self.calls = record_calls(self.pipe, [s + 500_000 for s in self.seeds], times, num_inference_steps=steps)
        self.eps, self.images = self._predict(self.exact), self._sample(self.exact, self.seeds)

    def measure(self, name: str, options: dict) -> dict:
        start, model = time.time(), copy.deepcopy(self.exact)
        if name == "RTN W8A8":
            config = ptq4dm.RTNConfig(modules_to_not_convert=[] if self.args.whole else list(ELSEWHERE))
        else:
            config = ptq4dm.SVDQuantConfig(roles={} if self.args.whole else ELSEWHERE, **options)
        report = ptq4dm.quantize(model, config, self.store)
        seconds = time.time() - start
        mse = (self._sample(model, self.seeds) - self.images).double().square().flatten(1).mean(1)
        psnr = -10 * mse.clamp_min(1e-12).log10()
        noise = (self._predict(model) - self.eps).double().square().sum()
        row = {
            "method": name,
            "options": options,
            "psnr": float(psnr.mean()),
            "psnr_stderr": float(psnr.std() / len(psnr) ** 0.5),
            "eps_error": float(noise / self.eps.double().square().sum()),
            "bytes_float16": bytes_of_float16(model) / bytes_of_float16(self.exact),
            "seconds_to_quantize": round(seconds, 1),
            "kernels": sorted({layer["kernel"] for layer in report.layers}),
            "device": torch.cuda.get_device_name() if self.args.device.startswith("cuda") else "CPU",
        }
        if self.args.num_fid:
            row["feature_fid"] = self._feature_fid(model)
        return row

    def _predict(self, model) -> torch.Tensor:
        return torch.cat([replay(model, self.calls[p]).cpu() for p in self._parts(len(self.calls))])

    def _parts(self, count: int):
        return torch.arange(count).split(self.args.batch_size)

    def _sample(self, model, seeds) -> torch.Tensor:
        return torch.cat(list(self._batches(model, seeds)))

    def _batches(self, model, seeds):
        setattr(self.pipe, denoiser_name(self.pipe), model)
        try:
            for part in self._parts(len(seeds)):
                yield sample(self.pipe, [seeds[int(i)] for i in part], num_inference_steps=self.args.steps)
        finally:
            setattr(self.pipe, denoiser_name(self.pipe), self.exact)

    def _feature_fid(self, model) -> float:
        extractor = load_extractor("feature-fid", self.args.device)
        real = load_reference_statistics(extractor, None, self.args.batch_size).statistics
        moments = Moments(extractor.dim)
        for images in self._batches(model, range(self.args.num_fid)):
            moments.update(extractor(to_uint8(images)))
        return frechet_distance(moments.mu, moments.sigma, real.mu, real.sigma)


def markdown(rows: list[dict]) -> str:
    lines = ["| | A | rounding | rank | group | PSNR (dB) | ε error | bytes | feature-FID |", "|---" * 9 + "|"]
    for r in rows:
        o = {"activations": "int8", "rounding": "nearest", "rank": 0, "group_size": ""}
        if r["method"] != "RTN W8A8":
            o = {"rounding": "gptq", "rank": 32, "group_size": 64, **r["options"]}
        fid = f"{r['feature_fid']:.2f}" if "feature_fid" in r else ""
        lines.append(
            f"| {r['method']} | {o['activations']} | {o['rounding']} | {o['rank']} | {o['group_size']} | "
            f"{r['psnr']:.2f} | {r['eps_error']:.1e} | {r['bytes_float16']:.3f} | {fid} |"
        )
    return "\n".join(lines)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", default="dit-cifar10")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--bytes", action="store_true", help="error against stored bytes, not the method's parts")
    parser.add_argument(
        "--whole", action="store_true", help="quantize all that the method would, not only the blocks"
    )
    parser.add_argument("--steps", type=int, default=20, help="DDIM steps")
    parser.add_argument("--num-paired", type=int, default=16)
    parser.add_argument("--num-fid", type=int, default=0)
    parser.add_argument("--calibration-samples", type=int, default=64)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--shard", default="0/1", help="i/n: every n-th row from the i-th")
    parser.add_argument("--output", type=Path, default=Path("out/svdquant.json"))
    args = parser.parse_args()
    names = ("model", "whole", "steps", "num_paired", "num_fid", "calibration_samples")
    settings = {name: getattr(args, name) for name in names}
    results = []
    if args.output.exists():
        before = json.loads(args.output.read_text())
        if before["settings"] != settings:
            parser.error(f"{args.output} was made with {before['settings']}; give another --output.")
        results = before["rows"]
    index, count = (int(part) for part in args.shard.split("/"))
    asked = (sizes() if args.bytes else parts())[index::count]
    done = [(row["method"], row["options"]) for row in results]
    todo = [row for row in asked if row not in done]
    args.output.parent.mkdir(parents=True, exist_ok=True)
    bench = Bench(args) if todo else None
    for name, options in tqdm(todo, desc=args.model, unit="row"):
        results.append(bench.measure(name, options))
        with replacing(args.output) as temporary:
            temporary.write_text(json.dumps({"settings": settings, "rows": results}, indent=1))
    print(markdown([row for row in results if (row["method"], row["options"]) in asked]))


if __name__ == "__main__":
    main()
