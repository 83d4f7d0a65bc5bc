"""A FLUX-like transformer of random bf16 weights, saved shard by shard, into a quantized folder: seconds and memory.

    python scripts/benchmarks/bench_stream.py --blocks 19 38 --heads 24 --folder DIR --output FILE  # 12 B, one GPU
    python scripts/benchmarks/bench_stream.py --blocks 1 3 --heads 12 --folder DIR --output FILE    # 0.4 GB, a CPU

    read     all tensors of the source read to the device, and nothing else: the disk, or its cache
    stream   `ptq4dm quantize --method svdquant --evidence none`: layer by layer, from folder to folder
    load     from_pretrained with the recipe, which packs while it loads, then save_pretrained
    whole    loaded in full precision, quantized, saved: what has the model whole in memory
    calls    loaded, quantized by its first 4 calls (--evidence calls) of 4096 + 512 tokens, saved

Each runs in a process of its own. `seconds` has all of it, `writing` what files took, `summing` what their checksums;
`anonymous` is the most resident memory that belongs to no file, beside that of before, `resident` with the mapped
source; `gpu` the most that torch had allocated on a GPU. `db` is the mean over layers of signal over noise, as a
report has it; `quantizing` is without files. Rows in the output are not made again; the source is made once, in
--folder.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path

import torch
from accelerate import init_empty_weights
from bench_common import Lines
from conditions import made_on
from diffusers import FlowMatchEulerDiscreteScheduler, FluxTransformer2DModel
from flux_slice import tuples

import ptq4dm
from ptq4dm.calibration.calls import Call
from ptq4dm.calibration.record import ready
from ptq4dm.errors import UserError, run
from ptq4dm.quantization.saving import network_tensors
from ptq4dm.streaming.network import stream_network
from ptq4dm.streaming.shards import LIMIT, Shards

FORMS = ("read", "stream", "load", "whole", "calls")
SHARD = 5 << 30
TOKENS = (4096, 512)  # of the image, of the text


def make_source(folder: Path, blocks: list[int], heads: int, device: str) -> None:
    """A pipeline's folder with a transformer of random weights, which is never whole in memory. They are drawn on the
    device: a CPU takes minutes for 12 B."""
    place = folder / "transformer"
    place.mkdir(parents=True)
    config = {"num_layers": blocks[0], "num_single_layers": blocks[1], "num_attention_heads": heads}
    with init_empty_weights():
        model = FluxTransformer2DModel(**config, guidance_embeds=True)
    shards, generator = Shards(place, SHARD), torch.Generator(device).manual_seed(0)
    for name, tensor in model.state_dict().items():
        value = torch.randn(tensor.shape, generator=generator, device=device).mul_(0.02 if tensor.ndim > 1 else 0.1)
        shards.add({name: value.bfloat16()})
    shards.close()
    model.save_config(place)
    FlowMatchEulerDiscreteScheduler().save_pretrained(folder / "scheduler")
    kinds = {"transformer": ["diffusers", "FluxTransformer2DModel"]}
    kinds |= {"scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"]}
    (folder / "model_index.json").write_text(json.dumps({"_class_name": "FluxPipeline", **kinds}))


class Memory:
    """The most resident memory of this process, in bytes, beside what it had before: [anonymous, with files]."""

    def __enter__(self) -> Memory:
        self.before, self.most, self.over = resident(), [0, 0], threading.Event()
        self.thread = threading.Thread(target=self._watch, daemon=True)
        self.thread.start()
        return self

    def __exit__(self, *_) -> None:
        self.over.set()
        self.thread.join()

    def _watch(self) -> None:
        while not self.over.wait(0.01):
            self.most = [max(pair) for pair in zip(self.most, resident(), strict=True)]

    @property
    def peaks(self) -> list[int]:
        return [most - before for most, before in zip(self.most, self.before, strict=True)]


def resident() -> list[int]:
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines() if "Rss" in line)
    anonymous, files = (int(lines[name].split()[0]) << 10 for name in ("RssAnon", "RssFile"))
    return [anonymous, anonymous + files]


def recipe(evidence: str = "none") -> ptq4dm.SVDQuantConfig:
    return ptq4dm.SVDQuantConfig(evidence=evidence, activations="int8")


def made(form: str, source: Path, output: Path, device: torch.device, limit: int) -> dict:
    """What a form makes, and the seconds that parts of it took."""
    place, found = source / "transformer", {}
    if form == "read":
        for tensor in network_tensors(place).values():
            tensor.to(device, copy=True)
        return found
    if form == "stream":
        done = stream_network(FluxTransformer2DModel, place, output, recipe(), torch.bfloat16, device, limit)
        return {
            "writing": round(done.writing, 2),
            "summing": round(done.summing, 2),
            "db": sum(one.decibel for one in done.errors.values()) / len(done.errors),
            "layers": len(done.errors),
        }
    if form == "load":
        more = {"device_map": {"": device}} if device.type == "cuda" else {}
        model = FluxTransformer2DModel.from_pretrained(
            place, quantization_config=recipe(), dtype=torch.bfloat16, **more
        )
    else:
        model = FluxTransformer2DModel.from_pretrained(place, dtype=torch.bfloat16).to(device)
        start = time.perf_counter()
        report = ptq4dm.quantize(model, recipe("calls" if form == "calls" else "none"))
        if form == "calls":
            for call in calls_of(model):
                model(*call.args, **call.kwargs)
        found["quantizing"] = round(time.perf_counter() - start, 2)
        found["db"] = sum(row["sqnr"] for row in report.layers) / len(report.layers)
    start = time.perf_counter()
    model.save_pretrained(output)
    return found | {"writing": round(time.perf_counter() - start, 2)}


def calls_of(model: FluxTransformer2DModel) -> list[Call]:
    """Four of a batch of one, at times from first to last."""
    sizes = argparse.Namespace(num_tuples=4, tokens=TOKENS[0], text_tokens=TOKENS[1])
    return [ready(one, model) for one in tuples(model, sizes).recorded().batches(1)]


def child(form: str, source: Path, output: Path, device: torch.device, limit: int) -> dict:
    torch.zeros(1, device=device)  # CUDA's own memory is none of a form's
    with Memory() as memory:
        start = time.perf_counter()
        found = made(form, source, output, device, limit)
        if device.type == "cuda":
            torch.cuda.synchronize()
        seconds = time.perf_counter() - start
    peaks = dict(zip(("anonymous", "resident"), memory.peaks, strict=True))
    peaks["gpu"] = torch.cuda.max_memory_allocated() if device.type == "cuda" else None
    files = sorted(output.glob("*.safetensors")) if output.exists() else []
    return {"seconds": round(seconds, 2), **found, **peaks, "bytes": sum(path.stat().st_size for path in files)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--blocks", type=int, nargs=2, default=[1, 3], metavar=("DOUBLE", "SINGLE"))
    parser.add_argument("--heads", type=int, default=12, help="of 128 channels")
    parser.add_argument("--forms", nargs="+", default=list(FORMS), choices=FORMS)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--limit", type=int, default=LIMIT >> 20, help="MB of packed layers that are held")
    parser.add_argument("--folder", type=Path, required=True, help="of the source, and of results for a while")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--child", choices=FORMS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    double, single = options.blocks
    source = options.folder / f"flux-{double}-{single}-{options.heads}"
    result = options.folder / "result"
    if options.child:
        print(json.dumps(child(options.child, source, result, torch.device(options.device), options.limit << 20)))
        return
    if not (source / "model_index.json").is_file():
        shutil.rmtree(source, ignore_errors=True)
        start = time.perf_counter()
        make_source(source, options.blocks, options.heads, options.device)
        print(f"made the source in {time.perf_counter() - start:.0f} s", file=sys.stderr)
    weights = network_tensors(source / "transformer")
    about = {
        "limit": options.limit,
        "blocks": options.blocks,
        "heads": options.heads,
        "source": sum(one.nbytes for one in weights.values()),
    }
    about |= {"largest": max(one.nbytes for one in weights.values())}
    lines = Lines(options.output, made_on(options.device))
    for form in [one for one in options.forms if not lines.has(form=one, **about)]:
        shutil.rmtree(result, ignore_errors=True)
        command = [sys.executable, __file__, *sys.argv[1:], "--child", form]
        lines.add({"form": form, **about, **told(command)})
    shutil.rmtree(result, ignore_errors=True)


def told(command: list[str]) -> dict:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise UserError(f"a form failed: {done.stderr.strip().splitlines()[-1]}")
    return json.loads(done.stdout.strip().splitlines()[-1])


if __name__ == "__main__":
    run(main)
