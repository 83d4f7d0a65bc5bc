"""The commands that are killed, on tiny models, and what they leave: files by digest, but for times."""

from __future__ import annotations

import hashlib
import json
import os
import struct
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from stress.changes_json import split_safetensors
from stress.models import CALIBRATION, KEPT, tiny_dit, tiny_unet

import ptq4dm
from ptq4dm.quantization.saving import save_quantized


@dataclass
class Verb:
    """A command that runs in a folder of its own.

    command: its words; INPUT stands for the folder of models. again: words that make it go on, where there is `begun`
    by then. old: a command that makes an earlier result. results: folders that must be whole at any moment, as they
    were or as they are to be. other: words that give other settings, for two runs at once.
    """

    command: str
    again: str = ""
    begun: str = ""
    old: str = ""
    other: str = "--seed 99"
    results: tuple[str, ...] = field(default=())

    def words(self, inputs: Path, more: str = "") -> list[str]:
        return f"{self.command} {more}".replace("INPUT", str(inputs)).split()


SAMPLING = "--num-inference-steps 2 --batch-size 2"
STORE = "--num-samples 8 --batch-size 2 --calibration-steps 2 --num-bins 2"
STUDENT = (
    "--images 32 --batch-size 4 --degradation-steps 4 --path-points 2 --switch-every 2 --evaluate-every 8 --num-fid 0"
)
VERBS = {
    "collect": Verb(f"collect --model INPUT/m {STORE} --output store"),
    "quantize": Verb(
        "quantize --model INPUT/m --calibration INPUT/s --objective max --checkpoint blocks --output q",
        old="quantize --model INPUT/m --method rtn --activations dynamic --output q",
        other="--objective mse",
        results=("q",),
    ),
    "convert": Verb(
        "convert --model INPUT/classes --from INPUT/classes.comfy --output c",
        old="quantize --model INPUT/classes --method rtn --activations dynamic --output c",
        other="--dtype bfloat16",
        results=("c",),
    ),
    "generate": Verb(
        f"generate --model INPUT/m --num-images 6 {SAMPLING} --output images", other="--num-inference-steps 3"
    ),
    "evaluate": Verb(
        f"evaluate --model INPUT/q --full-precision INPUT/m --metric none --num-paired 4 --num-heldout 4 {SAMPLING} "
        "--output evaluation"
    ),
    "compare": Verb(
        f"compare INPUT/q --full-precision INPUT/m --num-images 4 --num-heldout 4 --timed-steps 0 {SAMPLING} "
        "--output comparison",
        other="--num-inference-steps 3",
    ),
    "distill": Verb(
        f"distill --model INPUT/m {STUDENT} --output student",
        again="--resume",
        begun="student.run",
        results=("student",),
    ),
    "train": Verb(
        "train --model INPUT/m --images INPUT/pictures --num-images 32 --batch-size 4 --evaluate-every 8 "
        "--sample-steps 0 --output trained",
        again="--resume",
        begun="trained.run/checkpoint.safetensors",
        results=("trained",),
    ),
    "personalize": Verb(
        "personalize --model INPUT/classes --images INPUT/pictures --class-row 1 --steps 8 --batch-size 2 "
        "--perturbations 2 --checkpoint-every 2 --log-every 2 --output row",
        again="--resume",
        begun="row",
    ),
    "allocate": Verb(
        "allocate --model INPUT/m --calibration INPUT/s --bytes 0.8 --num-tuples 2 --rounds 1 --timed-batch 1 "
        "--costs= --output plan.json",
        other="--bytes 0.9",
    ),
    "bench samplers": Verb(
        "bench samplers --model INPUT/m32 --samplers ddim deis --evaluations 1 2 --num-images 4 --batch-size 4 "
        "--output bench"
    ),
    "bench hardware": Verb(
        "bench hardware --model INPUT/m --num-inference-steps 2 --output hardware", other="--num-inference-steps 3"
    ),
}


def make_inputs(folder: Path) -> None:
    """m, m32: pipelines of 8x8 and 32x32 pixels; s: a store of m; q: m quantized; classes: a DiT, and a file of it in
    8 bits; pictures: two."""
    tiny_unet().save_pretrained(folder / "m")
    tiny_unet(32).save_pretrained(folder / "m32")
    tiny_dit().save_pretrained(folder / "classes")
    eight = tiny_dit()
    ptq4dm.quantize(eight, ptq4dm.RTNConfig(activations="dynamic", modules_to_not_convert=KEPT))
    ptq4dm.export_comfy(eight, folder / "classes.comfy")
    ptq4dm.generate(tiny_unet(), [0, 1], folder / "pictures", num_inference_steps=1)
    store = ptq4dm.collect(tiny_unet(), CALIBRATION, folder / "s")
    pipe = tiny_unet()
    report = ptq4dm.quantize(pipe, ptq4dm.PTQ4DMConfig(objective="max"), store)
    save_quantized(pipe, {"model": str(folder / "m"), **report.to_dict()}, folder / "q")


# ---------------------------------------------------------------------- what is never the same

TIMES = {"seconds", "images_per_second", "step_time", "milliseconds"}  # how long it took


def contents(folder: Path) -> dict[str, str]:
    """Relative path -> digest of each file and of each link and empty folder, hidden ones included.

    Left out are times; the order of a safetensors file's header, which its library throws dice for; and checksums of
    files that hold these.
    """
    found = {}
    for place, folders, files in os.walk(folder):
        for name in [*files, *(one for one in folders if not os.listdir(os.path.join(place, one)))]:
            path = Path(place) / name
            data = b"folder" if path.is_dir() else _plain(path)
            found[str(path.relative_to(folder))] = hashlib.sha256(data).hexdigest()[:16]
    return found


def _plain(path: Path) -> bytes:
    data = path.read_bytes()
    try:
        if path.suffix == ".safetensors":
            header, body = split_safetensors(data)
            return json.dumps(json.loads(header), sort_keys=True).encode() + body
        if path.suffix in (".json", ".jsonl"):
            values = [json.loads(line) for line in data.splitlines()] if path.suffix == ".jsonl" else json.loads(data)
            return json.dumps(_without_times(values)).encode()
    except (ValueError, KeyError, struct.error):
        pass  # a damaged file is what it is
    return data


def _without_times(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_times(one) for key, one in value.items() if key not in TIMES and key != "files"}
    return [_without_times(one) for one in value] if isinstance(value, list) else value


def leftovers(folder: Path) -> list[str]:
    """Hidden files and folders, which nobody asked for."""
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.name.startswith("."))


Main = Callable[[list[str]], int]
