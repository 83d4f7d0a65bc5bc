"""What 4-bit keys and values of a text cost beside 4-bit weights, with SmoothAttention and without.

    python scripts/comparisons/compare_kv4.py --output out/kv4.json        # a quarter of an hour, on a CPU

Small text models with random weights (PixArt, a UNet, Wan), whose keys get outliers that are PLANTED: in each head of
cross-attention two channels of the keys are made --outlier times larger, and those of the queries as much smaller,
which leaves the model's function as it was. Weights are then quantized to W4A8 by --method (rtn in groups of 64) with
--rounding, and the text's keys and values are kept in 16 bits, or in 4. Each row: the error of the predicted noise
against full precision, as a share of its energy, on tuples that calibration never saw. Control: the same divisors,
dealt to other channels at random. With --outlier 1 nothing is planted.
"""

from __future__ import annotations

import argparse
import copy
from pathlib import Path
from statistics import fmean

import diffusers
import torch
from torch import nn

import ptq4dm
from ptq4dm.errors import run
from ptq4dm.files.rows import Rows
from ptq4dm.progress import progress_bar
from ptq4dm.quantization.recipe import METHODS
from ptq4dm.transforms.base import TransformPlan, apply_all, transform_named
from ptq4dm.transforms.peaks import watch_peaks

HEADS, HEAD, TOKENS, TEXT, PLANTED = 4, 64, 77, 128, 2
SMOOTHING = ("none", "alpha 0.5", "alpha 1", "alpha 0.5, shuffled")
KEPT = {"16 bits": 16, "4 bits": 4}
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

    def kept(self, model: nn.Module, bits: int) -> tuple[float, int]:
        """(the error with the text kept in this many bits, the bytes of it)."""
        with ptq4dm.cached_text(model, bits) as cache:
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
        found: dict = {"float": self.error(model), "4 bits alone": self.kept(model, 4)[0]}
        with ptq4dm.record(model) as calls:
            self.predict(model, self.calibration)
        plain = {"weight_bits": 4, "group_size": 64, "activations": "dynamic"} if self.args.method == "rtn" else {}
        config = METHODS.find(self.args.method)(**plain, rounding=self.args.rounding)
        ptq4dm.quantize(model, config, calls)
        found["W4A8"] = self.error(model)
        for name, bits in KEPT.items():
            found[name], found[f"{name}: bytes"] = self.kept(model, bits)
        return found


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
    """Means over models, with the least and the most: what 16 and 4 bits add to the error of W4A8."""
    columns = ["model", "SmoothAttention", "W4A8", "16 bits add", "4 bits add", "least .. most", "bytes of 16 bits"]
    lines = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    for name, smoothing in [(name, smoothing) for name in MODELS for smoothing in SMOOTHING]:
        found = [row for row in rows if (row["model"], row["smoothing"]) == (name, smoothing)]
        if found:
            sixteen, four = ([100 * (row[kept] / row["W4A8"] - 1) for row in found] for kept in KEPT)
            share = fmean(row["4 bits: bytes"] / row["16 bits: bytes"] for row in found)
            error = fmean(row["W4A8"] for row in found)
            cells = [name, smoothing, f"{error:.2e}", f"{fmean(sixteen):.2f} %", f"{fmean(four):.1f} %"]
            cells += [f"{min(four):.1f} .. {max(four):.1f} %", f"{share:.3f}"]
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--models", nargs="+", choices=list(MODELS), default=list(MODELS))
    parser.add_argument("--outlier", type=float, default=16.0, help="how much larger the planted channels are")
    parser.add_argument("--method", default="rtn", help="recipe of the 4-bit weights, e.g. qoq")
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
        missing = [one for one in SMOOTHING if (name, seed, one) not in done]
        bench = Bench(args, name, seed) if missing else None
        for smoothing in missing:
            results.add({"model": name, "seed": seed, "smoothing": smoothing, **bench.measure(smoothing)})
    print(markdown(results))


if __name__ == "__main__":
    run(main)
