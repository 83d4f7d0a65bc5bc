"""Measure what quantization cost and gained: Frechet distance, paired errors, bytes and step time, in one report."""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import KW_ONLY, dataclass
from pathlib import Path
from typing import Any

from accelerate import PartialState

from ..checks import check_fields, check_seeds, checked, named_options
from ..errors import UserError
from ..files.claim import claimed
from ..files.places import output_folder
from ..options import option
from ..pipelines.denoiser import check_sampled, denoiser, turn_at
from ..pipelines.devices import check_device
from ..pipelines.generate import fingerprint, settings
from ..pipelines.sampling import MOST_BATCH, check_arguments, refusals
from ..quantization.components import left_out, quantized_plans
from ..quantization.report import memory_beside_floats
from .compare import compare_denoisers, denoiser_bytes
from .extractors import METRICS, Extractor, folder_moments, frechet_entry, load_extractor, load_reference_statistics
from .frechet import write_statistics
from .measures import load_measures
from .options import SampledOptions
from .pictures import Pictures
from .report import PICTURE, check_places, format_report, write_report, write_samples
from .same import check_same

MOST_IMAGES = 10_000_000


@named_options
@dataclass
class EvaluateConfig(SampledOptions):
    """What to measure, and with how much.

    num_images: samples for the Frechet distance, seeds seed .. seed + num_images - 1.
    num_paired: same-seed images of both models (the first of those seeds); 0 leaves it out. Scores of prompts are of
        as many images of each model.
    num_heldout: recorded denoiser inputs for the epsilon error, seeds from heldout_seed; 0 leaves it out.
    metric: "feature-fid" (embedded network, 32x32), "fid" (Inception) or "none".
    timed_steps: denoiser calls timed per model after warmup_steps; 0 leaves it out.
    The others, all given by name: `SampledOptions`, and `MeasureOptions` for networks that pictures are judged by.
    """

    num_images: int = option(1000, "samples for the Frechet distance", low=0, high=MOST_IMAGES)
    num_paired: int = option(64, "same-seed pairs", low=0, high=MOST_IMAGES)
    num_heldout: int = option(64, "recorded calls for the epsilon error", low=0, high=MOST_IMAGES)
    _: KW_ONLY
    batch_size: int = option(64, low=1, high=MOST_BATCH)
    metric: str = option("feature-fid", "Frechet distance of the samples", choices=METRICS)
    timed_steps: int = option(10, low=0, high=1_000_000)

    def __post_init__(self) -> None:
        check_fields(self, "EvaluateConfig")
        check_seeds(self.seed, max(self.num_images, self.num_paired, 1))
        check_seeds(self.heldout_seed, max(self.num_heldout, self.batch_size, 2), "heldout_seed")

    def check(self) -> None:
        """Raises UserError for figures that measure nothing, and fields that were set to what they cannot be."""
        self.__post_init__()
        if self.metric != "none" and self.num_images < 2:
            number = "zero images" if self.num_images == 0 else f"{self.num_images} image(s)"
            raise UserError(f"{number} cannot give a Frechet distance; ask for 2 or more, or metric 'none'.")


@checked
def evaluate(
    pipe,
    full_precision=None,
    config: EvaluateConfig | None = None,
    output: str | os.PathLike | None = None,
    show: Callable[[dict], None] | None = None,
    metadata: dict[str, Any] | None = None,
) -> dict:
    """Measure a pipeline, and compare it with its full-precision original where that is given.

    Under an accelerate or torchrun launch every process calls this; seeds are dealt out among them, each sampled
    once, and all return the same figures. Only the main process writes and shows progress.

    Args:
        pipe: the pipeline to measure, on its device.
        full_precision: a pipeline of the same layout with the original denoiser.
        output: folder for report.json and samples.png. Another call that writes there at the same time is waited for
            where it has the same settings, and refused where it has others.
        show: called with the report before it is written, by the main process. Without it a report that cannot be
            written is printed.
        metadata: JSON values put into the report under this name, for what was done to `pipe` that it does not say
            itself, e.g. {"reuse": {...}}; part of the settings of a call.

    Returns:
        {"frechet", "paired", "prompts", "not_measured", "epsilon_error", "bytes", "memory", "step_time", "settings",
        "metadata", "warnings"}, without what was left out; plain numbers and strings, as in report.json.
        "settings" is all that decides the figures: weights by a digest, the scheduler's config (tables and origin of
        a fitted one), guidance, conditioning, what `config` says. `format_report` prints the figures.

    Raises:
        UserError: two different models, settings that measure nothing, samples with NaN or infinity, or a reference
            that does not fit.
    """
    check_sampled(pipe)
    if full_precision is not None:
        check_sampled(full_precision, "full_precision")
        check_same(pipe, full_precision, "pipe", "full_precision")
    config = config or EvaluateConfig()
    config.check()
    check_arguments(config.conditioning, config.pipeline_kwargs)
    if config.metric == "none" and full_precision is None:
        raise UserError(
            "metric 'none' without a full-precision model leaves nothing to measure; give one, or a metric."
        )
    state = PartialState()
    with ExitStack() as stack:
        folder = None
        if output is not None and state.is_main_process:
            folder = stack.enter_context(output_folder(output))
            check_places(folder)
            stack.enter_context(claimed(folder, _identity(pipe, full_precision, config, metadata)))
        stack.enter_context(turn_at(pipe, *([] if full_precision is None else [full_precision])))
        stack.enter_context(refusals(pipe, config.conditioning, config.pipeline_kwargs))
        report, shown = _measure(pipe, full_precision, config)
        report["settings"] = _identity(pipe, full_precision, config, None)
        report |= {"metadata": metadata} if metadata else {}
        if show is not None and state.is_main_process:
            show(report)
        if folder is not None:
            _write(report, shown, folder, told=show is not None)
    state.wait_for_everyone()
    return report


def _identity(pipe, full_precision, config: EvaluateConfig, metadata: dict | None) -> dict:
    """All that decides a report."""
    options = {name: os.fspath(v) if isinstance(v, os.PathLike) else v for name, v in vars(config).items()}
    original = None if full_precision is None else fingerprint(full_precision)
    more = {**options, "original": original, "metadata": metadata}
    return settings(pipe, config.num_inference_steps, config.pipeline_kwargs, more)


def _write(report: dict, shown: tuple[list, list[int]] | None, folder: Path, told: bool) -> None:
    try:
        write_report(report, folder)
        if shown:
            write_samples(*shown, folder / PICTURE)
    except UserError:
        if not told:  # hours of measuring are not lost because a disk is full
            print(format_report(report), flush=True)
        raise


@checked
def evaluate_images(folder: str | os.PathLike, config: EvaluateConfig | None = None, device="cpu") -> dict:
    """The Frechet distance of all images in a folder against config.reference (a folder, an npz, or embedded).

    Raises:
        UserError: fewer than 2 images, images of different sizes for feature-FID, or a reference that does not fit.
    """
    config = config or EvaluateConfig()
    extractor = _extractor(config, device)
    reference = load_reference_statistics(extractor, config.reference, config.batch_size)
    moments, passed_over = folder_moments(folder, extractor, config.batch_size)
    result, warnings = frechet_entry(extractor, moments, reference)
    warnings += [passed_over] if passed_over else []
    return {"frechet": {**result, "images": str(folder)}, "warnings": warnings}


@checked
def write_reference(
    folder: str | os.PathLike, destination: str | os.PathLike, config: EvaluateConfig | None = None, device="cpu"
) -> int:
    """Reference statistics (npz) of all images in a folder, for config.metric. Returns the number of images.

    Raises:
        UserError: fewer than 2 images, images of different sizes for feature-FID, or the file cannot be written.
    """
    config = config or EvaluateConfig()
    extractor = _extractor(config, device)
    moments, _ = folder_moments(folder, extractor, config.batch_size)
    statistics = moments.statistics(extractor.mode, extractor.feature)
    state = PartialState()
    if state.is_main_process:
        write_statistics(destination, statistics)
    state.wait_for_everyone()
    return moments.count


def _measure(pipe, full_precision, config: EvaluateConfig) -> tuple[dict, tuple[list, list[int]] | None]:
    """The report, and pictures to show; see `Pictures`."""
    report: dict = {"sampler": _sampler(pipe), "num_inference_steps": config.num_inference_steps, "warnings": []}
    report["networks"] = {"quantized": list(quantized_plans(pipe)), "full_precision": left_out(pipe)}
    measures = load_measures(config, denoiser(pipe).device)
    pictures = Pictures(pipe, full_precision, config, measures)
    if config.metric != "none":
        extractor = _extractor(config, denoiser(pipe).device)
        reference = load_reference_statistics(extractor, config.reference, config.batch_size)
        moments = extractor.moments(pictures.batches()).reduced()
        report["frechet"], report["warnings"] = frechet_entry(extractor, moments, reference)
        report["frechet"] |= {"seed": config.seed, "num_inference_steps": config.num_inference_steps}
    else:
        for _ in pictures.batches():
            pass
    report |= pictures.entries()
    if full_precision is not None:
        report |= compare_denoisers(pipe, full_precision, config)
    else:
        report["bytes"] = {"model": denoiser_bytes(pipe)}
    report["memory"] = memory_beside_floats(pipe, full_precision)
    return report, pictures.shown


def _sampler(pipe) -> dict:
    """The scheduler's class and what its config says besides the noise schedule."""
    config = {k: v for k, v in pipe.scheduler.config.items() if isinstance(v, str | int | bool) and k[0] != "_"}
    return {"class": type(pipe.scheduler).__name__, **config}


def _extractor(config: EvaluateConfig, device) -> Extractor:
    return load_extractor(config.metric, check_device(device), config.inception_weights, config.resize)
