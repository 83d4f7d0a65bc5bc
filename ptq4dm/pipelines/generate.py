"""Images into a folder: seed-named PNGs that carry their settings; resumable, on any number of processes."""

from __future__ import annotations

import hashlib
import json
import os
import re
import textwrap
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import diffusers
import torch
from accelerate import PartialState
from PIL import Image

from ..checks import checked, seeds_of, whole
from ..errors import UserError
from ..files.claim import claimed
from ..files.places import check_writable, output_folder
from ..progress import progress_bar
from ..version import __version__
from .denoiser import check_sampled, denoiser, device_of, networks_of, turn_at
from .images import image_grid, load_images, read_metadata, save_picture, save_png, to_uint8
from .sampling import MOST_BATCH, check_arguments, check_steps, choose_conditioning, sample

SEED_NAMED = re.compile(r"\d{6,}\.png")


def _plain(value):
    """A JSON value that is the same for the same setting: tensors by digest, other objects by class name."""
    if isinstance(value, dict):
        return {str(k): _plain(v) for k, v in value.items() if not str(k).startswith("_") and v is not None}
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    if isinstance(value, torch.Tensor):
        data = value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()
        return f"sha256:{hashlib.sha256(data).hexdigest()[:16]}"
    if value is None or isinstance(value, str | int | float | bool):
        return value
    return type(value).__name__


def fingerprint(pipe) -> str:
    """16 hex digits of SHA-256 over all components' tensors: names, shapes, dtypes and 256 spread values each.

    Tells apart two models of one name (another calibration, other weights) in milliseconds, without reading
    every byte; tensors that offloading keeps away (on "meta") count by name and shape alone.
    """
    digest = hashlib.sha256()
    for part, module in sorted(networks_of(pipe).items()):
        for name, tensor in module.state_dict().items():
            name = name.replace("_orig_mod.", "")  # torch.compile's wrapper changes names, not weights
            digest.update(f"{part}.{name} {list(tensor.shape)} {tensor.dtype}".encode())
            if tensor.numel() and not tensor.is_meta:
                flat = tensor.detach().flatten()
                few = flat[:: max(1, flat.numel() // 256)][:256].contiguous().cpu()
                digest.update(few.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]


def settings(pipe, num_inference_steps: int, pipeline_kwargs: dict | None, metadata: dict | None) -> dict:
    """All that decides a picture besides its seed and conditioning, as JSON values.

    The model's weights by `fingerprint`, its quantization config (scalars only; the plan is in the model's
    folder), the scheduler's class and config, steps, dtype, extra arguments, and the caller's own `metadata`.
    """
    model = denoiser(pipe)
    quantization = getattr(model.config, "quantization_config", None)
    if quantization is not None:
        quantization = quantization if isinstance(quantization, dict) else quantization.to_dict()
        quantization = {k: v for k, v in _plain(quantization).items() if not isinstance(v, dict | list)}
    return {
        "pipeline": type(pipe).__name__,
        "weights": fingerprint(pipe),
        "quantization": quantization,
        "dtype": str(model.dtype).removeprefix("torch."),
        "scheduler": {"class": type(pipe.scheduler).__name__, **_plain(dict(pipe.scheduler.config))},
        "num_inference_steps": num_inference_steps,
        "pipeline_kwargs": _plain(pipeline_kwargs or {}),
        **_plain(metadata or {}),
    }


def _same(one, other) -> bool:
    """Whether two JSON values are the same; 1 is 1.0, but True is no number."""
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(_same(value, other[name]) for name, value in one.items())
    if isinstance(one, list) and isinstance(other, list):
        return len(one) == len(other) and all(map(_same, one, other))
    return isinstance(one, bool) == isinstance(other, bool) and one == other


def _missing(output: Path, seeds: Sequence[int], expected) -> list[int]:
    """The seeds without a picture; all seed-named pictures in the folder must be as `expected(seed)` says."""
    there = set()
    for path in sorted(p for p in output.iterdir() if SEED_NAMED.fullmatch(p.name)):
        try:
            found = read_metadata(path)
        except UserError as error:
            raise UserError(f"{error} Choose another --output.") from error
        seed, wanted = int(path.stem), expected(int(path.stem))
        other = [k for k in {**found, **wanted} if k != "versions" and not _same(found.get(k), wanted.get(k))]
        if other:
            names = textwrap.shorten(", ".join(sorted(other)), 200, placeholder=" ...")
            raise UserError(
                f"{output} holds images made with other settings ({path.name} differs in {names}); "
                "choose another --output."
            )
        there.add(seed)
    return [s for s in seeds if s not in there]


@checked
def generate(
    pipe,
    seeds: Iterable[int],
    output: str | os.PathLike,
    *,
    num_inference_steps: int = 50,
    batch_size: int = 16,
    conditioning: dict[str, Any] | None = None,
    pipeline_kwargs: dict[str, Any] | None = None,
    metadata: dict[str, Any] | None = None,
) -> list[Path]:
    """Write one PNG per seed, `000123.png`, into the folder `output`; returns the paths in the seeds' order.

    Only what is missing is made, so an interrupted run resumes; pictures made with other settings in the same
    folder are refused, and so is a second call that writes there with other settings at the same time; with the same
    ones both may work (versions of libraries may differ, and are recorded). Under `accelerate launch` or
    `torch.distributed.run` the missing seeds are shared out; every process puts `pipe` on its own device and
    calls this alike, and destroys the process group itself at its end.

    What is promised: the noise and the conditioning of an image depend on its seed alone. Its pixels are then
    equal up to floating point, as another batch size, device or library version may sum in another order. On
    a CPU in float32, the embedded models moved at most 1 value in 10 000 by one grey level (of 255) when the
    batch size changed; random networks moved 1 in 5000.

    Args:
        seeds: whole numbers >= 0; duplicates are made once.
        conditioning, pipeline_kwargs: as in `ptq4dm.pipelines.sampling.sample`.
        metadata: put into each PNG with the settings, e.g. {"model": "unet-cifar10"}; part of the settings.

    Raises:
        UserError: no seeds or a negative one, a batch size below 1, an `output` that cannot be written or
            that holds images made with other settings, or any error of `sample`.
    """
    check_sampled(pipe, use=True)
    seeds, output = seeds_of(seeds), Path(output)
    batch_size = whole(batch_size, "batch_size", 1, MOST_BATCH)
    check_arguments(conditioning, pipeline_kwargs)
    num_inference_steps = check_steps(pipe, num_inference_steps)
    shared = settings(pipe, num_inference_steps, pipeline_kwargs, metadata)
    with _place(output, [shared, _plain(conditioning)]), turn_at(pipe):
        _generate(pipe, seeds, output, num_inference_steps, batch_size, conditioning, pipeline_kwargs, shared)
    return [output / f"{s:06d}.png" for s in seeds]


@contextmanager
def _place(output: Path, identity: list) -> Iterator[None]:
    """The folder, claimed; one into which nothing can be written is looked at: all pictures may be there."""
    fixed = False
    if output.is_dir():
        try:
            check_writable(output)
        except UserError:
            fixed = True
    if fixed:
        yield
        return
    with output_folder(output), claimed(output, identity, share=True):
        yield


def _generate(pipe, seeds, output, num_inference_steps, batch_size, conditioning, pipeline_kwargs, shared) -> None:
    """Make this process's share of the missing pictures."""
    versions = {"ptq4dm": __version__, "torch": torch.__version__, "diffusers": diffusers.__version__}

    def expected(seed: int) -> dict:
        chosen = choose_conditioning(pipe, [seed], conditioning, pipeline_kwargs or ())
        one = {k: _plain(v[0]) for k, v in chosen.items()}
        return json.loads(json.dumps({**shared, "seed": seed, "conditioning": one, "versions": versions}))

    # A model on the CPU must not take up a GPU. (If the caller has made a PartialState, this is that one.)
    state = PartialState(cpu=device_of(pipe).type == "cpu")
    state.wait_for_everyone()
    todo = _missing(output, sorted(set(seeds)), expected)
    if todo:
        check_writable(output)
    state.wait_for_everyone()  # nobody writes before everybody has listed: all share out the same list
    with state.split_between_processes(todo) as mine:
        batches = [mine[i : i + batch_size] for i in range(0, len(mine), batch_size)]
        alone = len(batches) == 1 and state.is_main_process
        hidden = alone or not state.is_main_process or not batches
        for batch in progress_bar(batches, desc="generate", unit="batch", hidden=hidden):
            images = sample(
                pipe,
                batch,
                num_inference_steps=num_inference_steps,
                conditioning=conditioning,
                pipeline_kwargs=pipeline_kwargs,
                progress=alone,
            )
            for seed, image in zip(batch, to_uint8(images), strict=True):
                save_png(image, output / f"{seed:06d}.png", expected(seed))
    state.wait_for_everyone()


@checked
def save_grid(
    images: torch.Tensor | Sequence[str | os.PathLike],
    destination: str | os.PathLike,
    columns: int = 8,
    scale: int = 1,
) -> Image.Image:
    """Lay images out on one PNG, `columns` wide, each pixel `scale` times as large; returns the grid.

    Args:
        images: uint8 [N,3,H,W], or paths of images of one size. Keep `destination` out of a folder of
            generated images that will be evaluated: the grid would count as one of them.

    Raises:
        UserError: no images, an image that cannot be read, sizes that differ, or an unwritable destination.
    """
    grid = image_grid(images if isinstance(images, torch.Tensor) else load_images(images), columns, scale)
    save_picture(grid, destination)
    return grid
