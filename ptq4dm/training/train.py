"""`ptq4dm.train`: a denoiser learns from the pictures of a folder, its products forward and backward on integers.

"Towards Accurate and Efficient Sub-8-Bit Integer Training" (arXiv:2411.10948): how products are made is in
layers/shift/product.py. Weights, optimizer and moving average are float32; attention's own products, norms and
nonlinearities stay floats.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from accelerate import PartialState

from ..checks import checked
from ..errors import UserError
from ..files.claim import claimed
from ..files.places import check_room, output_folder
from ..kernels.runtime.atomic import sweep
from ..pipelines.denoiser import check_pipeline, denoiser
from .config import ShiftQuantConfig
from .exhibition import result_of
from .run import CHECKPOINT, Run, identity_of
from .task import Task


@checked
def train(
    pipe: Any,
    images: str | os.PathLike,
    config: ShiftQuantConfig | None = None,
    folder: str | os.PathLike = "out/training",
    resume: bool = False,
) -> Any:
    """Train a pipeline's denoiser on the pictures of a folder; returns a pipeline with the average of its weights.

    The result is a plain model in float32: save it, or quantize it. With `served` it was trained at the codes that
    `quantize(pipe, RTNConfig(weight_bits=..., activation_bits=..., activations="dynamic"))` will give it.

    Args:
        pipe: a pipeline of pixels or latents whose unet or transformer is unconditional or class-conditional, in
            float32, and predicts epsilon, v, the sample, or the velocity of a flow. Its denoiser is not changed.
        images: a folder of pictures; for a class-conditional model one sub-folder a class, in the order of names.
        folder: of checkpoint, log and sample grids; new, or with `resume` that of an earlier call with the same
            config (budgets and learning rate aside) and pictures, which then goes on as if it had never stopped: on a
            CPU bit for bit, on a GPU as far as its kernels repeat themselves.

    Raises:
        UserError: a model or pictures that cannot be trained so, a folder in use, nothing to resume, a checkpoint of
            another config or model, or a training that came to NaN or infinity (the last good checkpoint is kept).
    """
    check_pipeline(pipe)
    config, folder = config or ShiftQuantConfig(), Path(folder)
    task = Task(pipe)
    if config.drop_captions is not None and not task.of_text:
        given = f"drop_captions={config.drop_captions:g}"
        raise UserError(f"{given} is for models of text, and this one learns without captions; leave it out.")
    with alone_in(folder, pipe, config, resume):
        run = Run(pipe, Path(images), config, folder, resume)
        run.go()
    return result_of(pipe, run.networks.average)


@contextmanager
def alone_in(folder: Path, pipe: Any, config: ShiftQuantConfig, resume: bool) -> Iterator[None]:
    """Make a run's folder and keep other runs out of it, as long as the block lasts (main process).

    Raises UserError where there is none to resume, it cannot be written, the disk has no room, or a run with other
    settings writes.
    """
    if resume and not (folder / CHECKPOINT).exists():
        raise UserError(
            f"there is no checkpoint at {folder / CHECKPOINT} to resume; leave --resume out to start a new run."
        )
    if not PartialState(cpu=denoiser(pipe).device.type == "cpu").is_main_process:
        yield
        return
    with output_folder(folder) as place, claimed(place, identity_of(pipe, config)):
        sweep(place / "samples")
        weights = sum(one.numel() * one.element_size() for one in denoiser(pipe).parameters())
        check_room(place, 4 * weights, "a training run")  # network, average, two moments
        yield
