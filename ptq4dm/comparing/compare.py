"""Compare several quantized models with the one they were made from: one table, one picture, one page."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from ..checks import checked
from ..errors import UserError
from ..evaluation.compare import compare_denoisers, denoiser_bytes
from ..evaluation.measures import prompts_of
from ..evaluation.same import check_same, check_saved
from ..files.atomic import replacing
from ..files.claim import claimed, digest
from ..files.outside import read_object
from ..files.places import output_folder
from ..pipelines.denoiser import check_sampled, denoiser, turn_at
from ..pipelines.generate import fingerprint, generate, settings
from ..pipelines.load import check_loadable, load_pipeline
from ..pipelines.sampling import check_steps, refusals
from ..quantization.diffusers_bridge import quantization_config
from ..quantization.report import memory_beside_floats
from .candidates import Candidate, labelled, original, worst_layers
from .config import CompareConfig
from .figures import add_figures, check_size, load_judges, picture_paths
from .report import check_places, format_comparison, unfinished, write_comparison

IMAGES, COSTS = "images", "costs"  # sub-folders of the result, with a folder and a file for each model


@checked
def compare(
    models: Sequence[str | os.PathLike],
    full_precision: str | os.PathLike | None = None,
    config: CompareConfig | None = None,
    output: str | os.PathLike = "out/comparison",
    *,
    load: Callable[[str], Any] | None = None,
    show: Callable[[dict], None] | None = None,
) -> dict:
    """Compare models with the one in full precision that they were made from, on the same seeds, sampler and steps.

    One model at a time is in memory, beside the one in full precision. Images and measured costs stay in `output`:
    a later call with one more model makes only what is new, and is refused where the images there were made with
    other settings. All that can be refused is, before the first image is made. It runs in one process.

    Args:
        models: folders that `ptq4dm quantize` left, or any other models of the same layout.
        full_precision: the model that they are compared with, whose sampler all use; what they were quantized from
            unless given.
        output: folder for index.html, comparison.png and comparison.json, and of images/ and costs/.
        load: opens a model by its name; `load_pipeline` on the CPU in float32 otherwise.
        show: called with the report before it is written.

    Returns:
        {"full_precision", "sampler", "num_inference_steps", "seeds", "prompts", "dtype", "device", "models",
        "settings", "not_measured", "warnings"}, as in comparison.json; "settings" is all that decides the figures but
        for the models; "models" has a dict for each label, full precision first, with "bytes" of the denoisers and
        "memory" of every network: name -> [bytes in full precision, bytes].

    Raises:
        UserError: no models, models that are not of one, images of other settings in `output`, or an overflow.
    """
    config = config or CompareConfig()
    config.check()
    if isinstance(models, (str, os.PathLike)) or not models:
        raise UserError("compare takes a list of models; give at least one.")
    name = original(models, full_precision)
    first, *others = labelled([name, *(model for model in models if os.fspath(model) != name)])
    if not others:
        raise UserError(f"there is nothing to compare {name} with; give another model.")
    if load is None:
        load = load_pipeline
        for one in (first, *others):
            check_loadable(one.model)
    with output_folder(output) as folder:
        check_places(folder)
        worst = {one.label: worst_layers(one.model) for one in others}
        reference = load(first.model)
        check_sampled(reference, first.model)
        for one in others:
            check_saved(one.model, reference, name)
        steps = check_steps(reference, config.num_inference_steps)
        with ExitStack() as stack:
            of = [one.model for one in (first, *others)]
            decided = _settings(reference, config, steps)
            stack.enter_context(claimed(folder, [of, decided]))
            report = {**_report(reference, first, config, steps), "settings": decided}
            judges = load_judges(config, denoiser(reference).device)
            stack.enter_context(unfinished(folder, folder / IMAGES))
            _draw(reference, first, folder, config, steps)
            check_size(judges, picture_paths(folder / IMAGES, first.label, report["seeds"])[0])
            for one in others:
                pipe = load(one.model)
                check_same(pipe, reference, one.model, name)
                pipe.scheduler = type(reference.scheduler).from_config(reference.scheduler.config)
                _draw(pipe, one, folder, config, steps)
                costs = _costs(pipe, reference, one, folder, config, steps)
                report["models"][one.label] = {**_entry(pipe, one, reference), **costs, "worst": worst[one.label]}
                del pipe
            add_figures(report, folder / IMAGES, config, judges)
            if show is not None:
                show(report)
            try:
                write_comparison(report, folder, folder / IMAGES, config.num_shown)
            except UserError:
                if show is None:
                    print(format_comparison(report), flush=True)
                raise
    return report


def _settings(pipe: Any, config: CompareConfig, steps: int) -> dict:
    """All that decides a report besides the models compared."""
    options = {key: os.fspath(v) if isinstance(v, os.PathLike) else v for key, v in vars(config).items()}
    return settings(pipe, steps, config.pipeline_kwargs, options)


def _report(reference: Any, one: Candidate, config: CompareConfig, steps: int) -> dict:
    """The report's beginning: the conditions, and the model in full precision."""
    prompts = prompts_of(reference, config.seeds, config.conditioning, config.pipeline_kwargs)
    network = denoiser(reference)
    size = denoiser_bytes(reference)
    return {
        "full_precision": one.label,
        "sampler": type(reference.scheduler).__name__,
        "num_inference_steps": steps,
        "seeds": list(config.seeds),
        "prompts": prompts,
        "dtype": str(network.dtype).removeprefix("torch."),
        "device": str(network.device),
        "models": {
            one.label: {**_entry(reference, one, reference), "bytes": {"model": size, "full_precision": size}}
        },
        "not_measured": {},
        "warnings": [],
    }


def _entry(pipe: Any, one: Candidate, reference: Any) -> dict:
    config = quantization_config(denoiser(pipe))
    return {
        "model": one.model,
        "quantization": None if config is None else config.summary(),
        "memory": memory_beside_floats(pipe, reference),
    }


def _draw(pipe: Any, one: Candidate, folder: Path, config: CompareConfig, steps: int) -> None:
    """Make those of a model's images that are not there yet."""
    with refusals(pipe, config.conditioning, config.pipeline_kwargs):
        generate(
            pipe,
            config.seeds,
            folder / IMAGES / one.label,
            num_inference_steps=steps,
            batch_size=config.batch_size,
            conditioning=config.conditioning,
            pipeline_kwargs=config.pipeline_kwargs,
        )


def _costs(pipe: Any, reference: Any, one: Candidate, folder: Path, config: CompareConfig, steps: int) -> dict:
    """A model's epsilon error, bytes and time of a step; read where they were measured under the same conditions."""
    names = ("num_heldout", "heldout_seed", "num_bins", "batch_size", "timed_steps", "warmup_steps", "conditioning")
    measured = {key: getattr(config, key) for key in names} | {"device": str(denoiser(pipe).device)}
    measured |= {"original": fingerprint(reference)}
    conditions = digest(settings(pipe, steps, config.pipeline_kwargs, measured))
    path = folder / COSTS / f"{one.label}.json"
    if path.is_file():
        found = read_object(path, {"conditions": str, "costs": dict}, "take it away, and it is measured again")
        if found["conditions"] == conditions:
            return found["costs"]
    with ExitStack() as stack:
        stack.enter_context(turn_at(pipe, reference))
        stack.enter_context(refusals(pipe, config.conditioning, config.pipeline_kwargs))
        costs = compare_denoisers(pipe, reference, config)
    path.parent.mkdir(exist_ok=True)
    with replacing(path) as temporary:
        temporary.write_text(json.dumps({"conditions": conditions, "costs": costs}, indent=1, allow_nan=False))
    return costs
