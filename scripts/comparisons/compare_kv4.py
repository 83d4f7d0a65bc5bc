"""What 4-bit keys and values of a text cost beside 4-bit weights, with SmoothAttention and without.

    python scripts/comparisons/compare_kv4.py --output out/kv4.json        # a quarter of an hour, on a CPU

Small text models with random weights (PixArt, a UNet, Wan), whose keys get outliers that are PLANTED: in each head of
cross-attention two channels of the keys are made --outlier times larger, and those of the queries as much smaller,
which leaves the model's function as it was. Weights are then quantized to W4A8 by --method (rtn in groups of 64) with
--rounding, and the text's keys and values are kept in 16 bits, or in 4: as `ptq4dm.cached_text` rounds them, to the
nearest as QServe does, and with one of our three changes to that at a time. Each row: the error of the predicted
noise against full precision, as a share of its energy, on tuples that calibration never saw; "alone" is without the
4-bit weights, whose error is large beside that of the text, and adds chance to the difference. Control: the same
divisors, dealt to other channels at random. With --outlier 1 nothing is planted.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Iterator
from contextlib import contextmanager
from math import isnan, nan
from pathlib import Path
from statistics import fmean

import diffusers
import torch
from torch import nn

import ptq4dm
from ptq4dm.caching import four_bits, text_cache
from ptq4dm.errors import run
from ptq4dm.files.rows import Rows
from ptq4dm.kernels.formats.kv4 import KV4, grid_dtype, quantize_kv4
from ptq4dm.progress import progress_bar
from ptq4dm.quantization.recipe import METHODS
from ptq4dm.transforms.base import TransformPlan, apply_all, transform_named
from ptq4dm.transforms.peaks import watch_peaks

HEADS, HEAD, TOKENS, TEXT, PLANTED = 4, 64, 77, 128, 2
SMOOTHING = ("none", "alpha 0.5", "alpha 1", "alpha 0.5, shuffled")
NEAREST, PARTS = "4 bits, nearest", ("ends alone", "keys centred alone", "values' errors shared alone")
FOUR = ("4 bits", NEAREST, *PARTS)
SETTINGS = ("outlier", "method", "rounding", "tuples", "batch_size")


def pixart() -> tuple[nn.Module, tuple[int, ...], dict]:
    model = diffusers.PixArtTransformer2DModel(
        num_attention_heads=HEADS, attention_head_dim=HEAD, in_channels=4, num_layers=4, sample_size=16,
        cross_attention_dim=HEADS * HEAD, caption_channels=TEXT,
    )  # fmt: skip
    return model, (4, 16, 16), {"added_cond_kwargs": {"resolution": None, "aspect_ratio": None}}


def unet() -> tuple[nn.Module, tuple[int, ...], dict]:
    model = diffusers.UNet2DConditionModel(
        sample_size=16, layers_per_block=1, block_out_channels=(64, 128), cross_attention_dim=TEXT,
        attention_head_dim=(1, 2), down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
    )  # fmt: skip
    return model, (4, 16, 16), {}


def wan() -> tuple[nn.Module, tuple[int, ...], dict]:
    model = diffusers.WanTransformer3DModel(
        num_attention_heads=HEADS, attention_head_dim=HEAD, in_channels=4, out_channels=4, num_layers=4,
        text_dim=TEXT, freq_dim=64, ffn_dim=1024, rope_max_seq_len=32,
    )  # fmt: skip
    return model, (4, 1, 16, 16), {}


MODELS = {one.__name__: one for one in (pixart, unet, wan)}


class Bench:
    """A model with planted outliers, its tuples, and what it predicts in full precision."""

    def __init__(self, args: argparse.Namespace, name: str, seed: int):
        torch.manual_seed(seed)
        self.args, (self.exact, shape, self.options) = args, MODELS[name]()
        for parameter in self.exact.parameters():
            if parameter.ndim > 1:
                nn.init.normal_(parameter, 0, parameter[0].numel() ** -0.5)
        self.exact.eval()
        with ptq4dm.cached_text(self.exact) as cache:
            self.cross = cache.layers
        plant(self.exact, self.cross, args.outlier)
        batch, made = args.batch_size, 2 * args.tuples // args.batch_size
        tuples = [
            (torch.randn(batch, *shape), torch.randint(1000, (batch,)), torch.randn(batch, TOKENS, TEXT))
            for _ in range(made)
        ]
        self.calibration, self.held_out = tuples[: made // 2], tuples[made // 2 :]
        self.truth = self.predict(self.exact, self.held_out)

    @torch.no_grad()
    def predict(self, model: nn.Module, tuples: list) -> torch.Tensor:
        found = [
            model(x, timestep=t, encoder_hidden_states=text, return_dict=False, **self.options)[0][:, :4]
            for x, t, text in tuples
        ]
        return torch.cat(found)

    def error(self, model: nn.Module) -> float:
        """Squared error of the predicted noise, as a share of its squares."""
        difference = self.predict(model, self.held_out) - self.truth
        return float(difference.square().sum() / self.truth.square().sum())

    def kept(self, model: nn.Module, how: str) -> tuple[float, int]:
        """(the error with the text kept so, the bytes of it)."""
        with rounded(how), ptq4dm.cached_text(model, 16 if how == "16 bits" else 4) as cache:
            return self.error(model), cache.most_bytes[0]

    def smoothed(self, smoothing: str) -> nn.Module:
        """A copy with SmoothAttention in its cross-attention: the same function."""
        model = copy.deepcopy(self.exact)
        if smoothing != "none":
            with watch_peaks(model) as peaks:
                self.predict(model, self.calibration)
            alpha = float(smoothing.split()[1].rstrip(","))
            plans = transform_named("smooth-attention").find(model, peaks, alpha=alpha)
            plans = [plan for plan in plans if plan.modules[0].rpartition(".")[0] in self.cross]
            apply_all(model, [shuffled(plan) if "shuffled" in smoothing else plan for plan in plans])
        return model

    def measure(self, smoothing: str) -> dict:
        model = self.smoothed(smoothing)
        ways = [*FOUR] if smoothing in ("none", "alpha 1") else [*FOUR[:2]]
        found: dict = {"float": self.error(model)}
        found |= {f"alone: {how}": self.kept(model, how)[0] for how in ways}
        with ptq4dm.record(model) as calls:
            self.predict(model, self.calibration)
        plain = {"weight_bits": 4, "group_size": 64, "activations": "dynamic"} if self.args.method == "rtn" else {}
        config = METHODS.find(self.args.method)(**plain, rounding=self.args.rounding)
        ptq4dm.quantize(model, config, calls)
        found["W4A8"] = self.error(model)
        for how in ("16 bits", *ways):
            found[how], found[f"{how}: bytes"] = self.kept(model, how)
        return found


@contextmanager
def rounded(how: str) -> Iterator[None]:
    """Inside, 4-bit keys and values are rounded so."""

    def ended(x: torch.Tensor) -> KV4:
        return quantize_kv4(x, ends=four_bits.best_ends(x.float(), grid_dtype(x.dtype)))

    before = text_cache.keys_in_4_bits, text_cache.values_in_4_bits, four_bits.SHRUNK
    keys, values, shrunk = {
        NEAREST: (quantize_kv4, quantize_kv4, ()),
        "ends alone": (ended, ended, before[2]),
        "keys centred alone": (before[0], quantize_kv4, ()),
        "values' errors shared alone": (quantize_kv4, before[1], ()),
    }.get(how, before)
    text_cache.keys_in_4_bits, text_cache.values_in_4_bits, four_bits.SHRUNK = keys, values, shrunk
    try:
        yield
    finally:
        text_cache.keys_in_4_bits, text_cache.values_in_4_bits, four_bits.SHRUNK = before


@torch.no_grad()
def plant(model: nn.Module, names: list[str], factor: float) -> None:
    """Keys' channels times a factor, queries' over it: in the norms where there are some, else in the projections."""
    for name in names:
        attn = model.get_submodule(name)
        width = attn.inner_dim // attn.heads
        channels = torch.cat([torch.randperm(width)[:PLANTED] + head * width for head in range(attn.heads)])
        for layer, by in ((attn.norm_k or attn.to_k, factor), (attn.norm_q or attn.to_q, 1 / factor)):
            layer.weight[channels] *= by
            if getattr(layer, "bias", None) is not None:
                layer.bias[channels] *= by


def shuffled(plan: TransformPlan) -> TransformPlan:
    """The same divisors for other channels."""
    s = plan.tensors["divisors"]
    return TransformPlan(plan.kind, plan.modules, plan.options, {"divisors": s[torch.randperm(len(s))]})


def markdown(rows: list[dict]) -> str:
    """What 16 and 4 bits add to the error of W4A8, means over models with the least and the most; then, of the 4 bits
    alone, the share of the error of rounding to the nearest that is left."""
    columns = ["model", "SmoothAttention", "W4A8", "16 bits add", "4 bits add", "to the nearest", "bytes of 16 bits"]
    lines, parts = [header(columns)], [header(["model", "SmoothAttention", "error, nearest", "4 bits", *PARTS])]
    for name, smoothing in [(name, smoothing) for name in MODELS for smoothing in SMOOTHING]:
        found = [row for row in rows if (row["model"], row["smoothing"]) == (name, smoothing)]
        if not found:
            continue
        adds = {how: [100 * (row[how] / row["W4A8"] - 1) for row in found] for how in ("16 bits", *FOUR[:2])}
        cells = [name, smoothing, f"{fmean(row['W4A8'] for row in found):.2e}"]
        cells += [f"{fmean(few):.1f} % ({min(few):.1f} .. {max(few):.1f})" for few in adds.values()]
        share = fmean(row["4 bits: bytes"] / row["16 bits: bytes"] for row in found)
        lines.append(f"| {' | '.join(cells)} | {share:.3f} |")
        alone = {how: fmean(row.get(f"alone: {how}", nan) for row in found) for how in FOUR}
        shares = ["" if isnan(alone[how]) else f"{alone[how] / alone[NEAREST]:.2f}" for how in FOUR if how != NEAREST]
        parts.append(f"| {name} | {smoothing} | {alone[NEAREST]:.2e} | {' | '.join(shares)} |")
    return "\n".join([*lines, "", *parts])


def header(columns: list[str]) -> str:
    return f"| {' | '.join(columns)} |\n{'|---' * len(columns)}|"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--models", nargs="+", choices=list(MODELS), default=list(MODELS))
    parser.add_argument("--smoothing", nargs="+", choices=SMOOTHING, default=list(SMOOTHING))
    parser.add_argument("--outlier", type=float, default=16.0, help="how much larger the planted channels are")
    parser.add_argument("--method", default="qoq", help="recipe of the 4-bit weights, e.g. rtn")
    parser.add_argument("--rounding", default="gptq", help="of the 4-bit weights")
    parser.add_argument("--tuples", type=int, default=32, help="of calibration, and as many held out")
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--num-models", type=int, default=3, help="random models of each kind")
    parser.add_argument("--output", type=Path, default=Path("out/kv4.json"))
    args = parser.parse_args()
    results = Rows(args.output, {name: getattr(args, name) for name in SETTINGS})
    done = {(row["model"], row["seed"], row["smoothing"]) for row in results}
    todo = [(name, seed) for name in args.models for seed in range(args.num_models)]
    for name, seed in progress_bar(todo, desc="kv4", unit="model"):
        missing = [one for one in args.smoothing if (name, seed, one) not in done]
        bench = Bench(args, name, seed) if missing else None
        for smoothing in missing:
            results.add({"model": name, "seed": seed, "smoothing": smoothing, **bench.measure(smoothing)})
    print(markdown(results))


if __name__ == "__main__":
    run(main)
