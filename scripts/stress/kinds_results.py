"""What runs keep and find again: training states, packed blocks, rows, logs, records, pictures, statistics."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from stress.kinds import kind
from stress.models import tiny_unet
from torch import nn

import ptq4dm
from ptq4dm.evaluation.frechet import Statistics, frechet_distance, read_statistics, write_statistics
from ptq4dm.files.checkpoint import load_checkpoint, progress_as, save_checkpoint
from ptq4dm.files.result_folder import check_replaceable, result_folder
from ptq4dm.files.rows import Rows
from ptq4dm.pipelines.images import read_metadata
from ptq4dm.pipelines.picture_files import find_images, load_images
from ptq4dm.quantization.checkpoint import BlockCheckpoint
from ptq4dm.samplers.comparison.compare import ROW as MEASURED
from ptq4dm.samplers.comparison.table import table
from ptq4dm.samplers.distillation.log import read_log
from ptq4dm.samplers.distillation.run import Progress

RECIPE, SETTINGS = {"lr": 0.1, "name": "x"}, {"model": "tiny", "seed": 0}


def _nets() -> tuple[dict, dict]:
    torch.manual_seed(0)
    nets = {"student": nn.Linear(3, 4), "average": nn.Conv2d(2, 2, 3)}
    optimizer = torch.optim.AdamW(nets["student"].parameters())
    nets["student"](torch.ones(1, 3)).sum().backward()
    optimizer.step()
    return nets, {"student_optimizer": optimizer}


def _training(folder: Path) -> None:
    nets, optimizers = _nets()
    progress = {"degraded": 3, "step": 2, "lines": 4}
    save_checkpoint(folder / "checkpoint.safetensors", nets, optimizers, progress, RECIPE)


@kind("training state", _training, weight=12)
def load_training(folder: Path, _: Any) -> dict:
    nets, optimizers = _nets()
    path = folder / "checkpoint.safetensors"
    progress, _ = load_checkpoint(path, nets, optimizers, RECIPE)
    states = {name: one.state_dict()["state"] for name, one in optimizers.items()}
    return {
        "progress": vars(progress_as(Progress, progress, path)),
        "nets": {name: net.state_dict() for name, net in nets.items()},
        "states": states,
    }


# ---------------------------------------------------------------------- packed blocks

IDENTITY = {"plan": {"layers": ["a"]}, "store": None}


def _blocks(folder: Path) -> nn.Module:
    torch.manual_seed(0)
    model = nn.ModuleDict({"a": nn.Linear(32, 8), "b": nn.Linear(32, 8)})
    BlockCheckpoint(folder, IDENTITY).save("block", _packed(model))
    return model


def _packed(model: nn.Module) -> dict[str, nn.Module]:
    packed = copy.deepcopy(model)
    ptq4dm.quantize(packed, ptq4dm.RTNConfig(activations="dynamic"))
    return dict(packed)


def _guarded_block(path: str) -> bool:
    return path.startswith("/tensors/")


@kind("packed blocks", _blocks, weight=8, guarded=_guarded_block)
def load_blocks(folder: Path, model: nn.Module) -> dict:
    layers = BlockCheckpoint(folder, IDENTITY).load("block", model)
    layers = _packed(model) if layers is None else layers  # a block that is not there is packed again
    return {
        "tensors": {f"{name}.{key}": t for name, layer in layers.items() for key, t in layer.state_dict().items()},
        "plans": {name: vars(layer.plan) for name, layer in layers.items()},
    }


# ---------------------------------------------------------------------- JSON of results

ROW = {"sampler": "deis", "budget": 5, "evaluations": 5, "feature_fid": 12.5, "seconds": 1.0, "device": "CPU"}


def _rows(folder: Path) -> None:
    rows = Rows(folder / "samplers.json", SETTINGS)
    for budget in (5, 6):
        rows.add({**ROW, "budget": budget})


@kind("rows", _rows, weight=8)
def load_rows(folder: Path, _: Any) -> dict:
    rows = Rows(folder / "samplers.json", SETTINGS, kinds=MEASURED)
    return {"rows": list(rows), "table": table(list(rows)) if rows else ""}


def _log(folder: Path) -> None:
    lines = [{"stage": "evaluation", "step": step, "images": 8 * step, "feature_fid": 3.5} for step in range(3)]
    (folder / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


@kind("log", _log, weight=8)
def load_log(folder: Path, _: Any) -> dict:
    lines = read_log(folder / "log.jsonl")
    return {
        "lines": lines,
        "learnt": max((one["images"] for one in lines if one["stage"] == "evaluation"), default=0),
    }


def _student(folder: Path) -> None:
    with result_folder(folder / "student", "distillation.json", {"model": "x"}) as new:
        (new / "model_index.json").write_text("{}")
        (new / "unet").mkdir()
        (new / "unet" / "weights").write_bytes(bytes(100))


@kind("record", _student, weight=4, guarded=lambda path: not path.endswith("#"))
def load_record(folder: Path, _: Any) -> dict:
    """What would be deleted where a folder may be replaced: anything but what was written is the user's."""
    check_replaceable(folder / "student", "distillation.json", "distill")
    paths = [path for path in sorted((folder / "student").rglob("*")) if path.name != "distillation.json"]
    return {str(p.relative_to(folder)): p.read_bytes().hex() if p.is_file() else "folder" for p in paths}


# ---------------------------------------------------------------------- pictures and statistics


def _generated(folder: Path) -> Any:
    pipe = tiny_unet()
    ptq4dm.generate(pipe, [0, 1], folder, num_inference_steps=1, metadata={"model": "tiny"})
    return pipe


@kind("generated pictures", _generated, weight=2)
def generate_again(folder: Path, pipe: Any) -> dict:
    """The same command again: it takes what is there."""
    paths = ptq4dm.generate(pipe, [0, 1], folder, num_inference_steps=1, metadata={"model": "tiny"})
    told = [
        {k: v for k, v in read_metadata(path).items() if k != "versions"} for path in paths
    ]  # versions may differ
    return {"pixels": load_images(paths), "settings": told}


def _pictures(folder: Path) -> None:
    draw = np.random.default_rng(0)
    colours = draw.integers(0, 256, (6, 5, 3), dtype=np.uint8)
    for name, options in {"a.png": {}, "b.jpg": {"quality": 95}, "c.webp": {}, "d.bmp": {}, "e.gif": {}}.items():
        Image.fromarray(colours).save(folder / name, **options)
    Image.fromarray(draw.integers(0, 65536, (6, 5), dtype=np.uint16)).save(folder / "f.tif")
    Image.fromarray(draw.random((6, 5), dtype=np.float32)).save(folder / "g.tiff")


@kind("pictures", _pictures, weight=6)
def load_pictures(folder: Path, _: Any) -> dict:
    found = find_images(folder)
    return {"names": [path.name for path in found.paths], "pixels": load_images(found.paths)}


def _statistics(folder: Path) -> None:
    torch.manual_seed(0)
    draws = torch.randn(20, 4, dtype=torch.float64)
    write_statistics(folder / "reference.npz", Statistics(draws.mean(0), draws.T.cov(), 20, "clean", "features"))


@kind("statistics", _statistics, weight=8)
def load_statistics(folder: Path, _: Any) -> dict:
    found = read_statistics(folder / "reference.npz")
    distance = frechet_distance(found.mu, found.sigma, torch.zeros(4), torch.eye(4)) if len(found.mu) == 4 else None
    return {**vars(found), "distance": distance}
