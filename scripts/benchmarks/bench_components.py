"""Text encoders and autoencoders of published size: their bytes in each form, and with --time what a call takes.

    python scripts/benchmarks/bench_components.py --output FILE         # bytes alone: seconds, on any machine
    python scripts/benchmarks/bench_components.py --time --output FILE  # one GPU
    python scripts/benchmarks/bench_components.py --time --models clip-l --layers 2 --output FILE  # a look

Bytes are those of all tensors of the empty model that a plan makes, in bf16 where they are not quantized. Times are
of random weights: medians of calls, of a text of `--tokens`, or of latents of `--side` that are decoded; `error` is
the output beside that of bf16, which random weights make larger than trained ones would; `seconds` is quantizing.

    bf16      the network as it is
    default   what `ptq4dm.quantize(pipe, components=[...])` makes of it
    w8a8      int8 weights under dynamic int8 inputs
"""

from __future__ import annotations

import argparse
import copy
import statistics
import time
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
import transformers as tr
from bench_common import Lines, error, made_with
from diffusers import AutoencoderKL
from torch import nn

import ptq4dm
from ptq4dm.errors import run
from ptq4dm.pipelines.parts import AUTOENCODER, ENCODER
from ptq4dm.quantization.opening import put_empty
from ptq4dm.quantization.planning import make_plan
from ptq4dm.quantization.recipe import DEFAULTS
from ptq4dm.quantization.report import stored_bytes

LATENTS = dict(down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4)
LATENTS |= dict(block_out_channels=(128, 256, 512, 512), layers_per_block=2)
T5 = dict(d_model=4096, d_kv=64, d_ff=10240, num_heads=64, feed_forward_proj="gated-gelu")
GEMMA = dict(hidden_size=2304, intermediate_size=9216, num_attention_heads=8, num_key_value_heads=4, head_dim=256)
QWEN = dict(hidden_size=3584, intermediate_size=18944, num_attention_heads=28, num_key_value_heads=4)
ROPE = {"type": "mrope", "mrope_section": [16, 24, 24], "rope_type": "default"}
EYE = dict(depth=32, hidden_size=1280, intermediate_size=3420, num_heads=16, out_hidden_size=3584)
# name -> (layers, a function of them)
MODELS = {
    "clip-l": (12, lambda n: tr.CLIPTextModel(
        tr.CLIPTextConfig(hidden_size=768, intermediate_size=3072, **heads(n, 12)))),
    "clip-g": (32, lambda n: tr.CLIPTextModelWithProjection(
        tr.CLIPTextConfig(hidden_size=1280, intermediate_size=5120, projection_dim=1280, **heads(n, 20)))),
    "t5-xxl": (24, lambda n: tr.T5EncoderModel(tr.T5Config(vocab_size=32128, num_layers=n, **T5))),
    "gemma-2b": (26, lambda n: tr.Gemma2Model(tr.Gemma2Config(vocab_size=256000, num_hidden_layers=n, **GEMMA))),
    "qwen2.5-vl-7b": (28, lambda n: tr.Qwen2_5_VLForConditionalGeneration(tr.Qwen2_5_VLConfig(
        text_config=QWEN | dict(vocab_size=152064, num_hidden_layers=n, rope_scaling=ROPE), vision_config=EYE))),
    "vae-sdxl": (0, lambda n: AutoencoderKL(latent_channels=4, **LATENTS)),
    "vae-flux": (0, lambda n: AutoencoderKL(
        latent_channels=16, use_quant_conv=False, use_post_quant_conv=False, **LATENTS)),
}  # fmt: skip
FORMS = ("bf16", "default", "w8a8")


def heads(layers: int, number: int) -> dict:
    return dict(num_hidden_layers=layers, num_attention_heads=number, max_position_embeddings=77)


def recipe_of(model: nn.Module, form: str) -> ptq4dm.QuantConfig:
    kind = AUTOENCODER if isinstance(model, AutoencoderKL) else ENCODER
    return DEFAULTS.find(kind) if form == "default" else ptq4dm.RTNConfig(activations="dynamic")


def bytes_of(make, form: str) -> int:
    """Bytes of an empty model in this form."""
    with torch.device("meta"):
        model = make().to(torch.bfloat16)
    if form != "bf16":
        recipe = recipe_of(model, form)
        put_empty(model, replace(recipe, plan=make_plan(model, recipe)))
    return stored_bytes(model)


def called(model: nn.Module, options) -> torch.Tensor:
    if isinstance(model, AutoencoderKL):
        size = (1, model.config.latent_channels, options.side, options.side)
        generator = torch.Generator().manual_seed(0)
        return model.decode(torch.randn(size, generator=generator).to(options.device, torch.bfloat16)).sample
    most = getattr(model.config, "max_position_embeddings", None) or options.tokens
    ids = torch.arange(100, 100 + min(options.tokens, most), device=options.device)[None]
    return model(ids)[0]


def measured(model: nn.Module, options) -> float:
    """Median milliseconds of a call, until the device is done."""
    times = []
    for _ in range(options.repeats + 2):
        start = time.perf_counter()
        called(model, options)
        if options.device.startswith("cuda"):
            torch.cuda.synchronize()
        times.append((time.perf_counter() - start) * 1e3)
    return statistics.median(times[2:])


def timed(make, forms: list[str], options) -> dict[str, dict]:
    """Form -> milliseconds, error, and what quantizing took."""
    torch.manual_seed(0)
    with torch.device(options.device):
        whole = make().to(torch.bfloat16).eval().requires_grad_(False)
    exact, found = called(whole, options).float(), {}
    for form in forms:
        row = {}
        model = whole if form == "bf16" else copy.deepcopy(whole)
        if form != "bf16":
            start = time.perf_counter()
            report = ptq4dm.quantize(model, recipe_of(model, form))
            row["seconds"] = round(time.perf_counter() - start, 2)
            row["kernels"] = sorted({one["kernel"] for one in report.layers})
        row["milliseconds"] = round(measured(model, options), 3)
        found[form] = row | {"error": round(error(called(model, options).float(), exact), 5)}
    return found


def table(rows: list[dict]) -> str:
    out = [f"{'network':<16}{'form':<10}{'MB':>12}{'of bf16':>9}{'ms':>10}{'error':>9}"]
    for row in rows:
        same = (row["model"], row["layers"], "bf16")
        base = next((one for one in rows if (one["model"], one["layers"], one["form"]) == same), row)
        share = row["bytes"] / base["bytes"]
        line = f"{row['model']:<16}{row['form']:<10}{row['bytes'] / 1e6:12.1f}{share:9.3f}"
        out.append(line + f"{row.get('milliseconds', '-'):>10}{row.get('error', '-'):>9}")
    return "\n".join(out)


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=list(MODELS))
    parser.add_argument("--forms", nargs="+", default=list(FORMS), choices=FORMS)
    parser.add_argument("--time", action="store_true", help="also measure calls, of random weights on the device")
    parser.add_argument("--layers", type=int, help="of text encoders, fewer than they have")
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--side", type=int, default=128, help="of latents; pictures have eight times as many pixels")
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--output", type=Path, default=Path("out/components.jsonl"))
    options = parser.parse_args()
    lines = Lines(options.output, made_with())
    for name in options.models:
        layers, build = MODELS[name]
        layers = min(layers, options.layers or layers)
        what = {"model": name, "layers": layers, "time": options.time}
        forms = [form for form in options.forms if not lines.has(**what, form=form)]
        if not forms:
            continue
        make = partial(build, layers)
        times = timed(make, forms, options) if options.time else {}
        for form in forms:
            lines.add(what | {"form": form, "bytes": bytes_of(make, form)} | times.get(form, {}))
    print(table(lines.rows))


if __name__ == "__main__":
    run(main)
