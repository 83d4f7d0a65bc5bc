"""The catalogue of pipelines: every family of diffusers that can be built offline, tiny and with random weights.

    python scripts/sweep/pipelines.py                    # does each run in float? a line a pipeline
    python scripts/sweep/pipelines.py --only "Flux*" StableDiffusionPipeline

`PIPELINES` is {name: function that builds a `Case`}; `LEFT_OUT` says why other folders of `diffusers.pipelines` have
no case.
"""

from __future__ import annotations

import argparse
import fnmatch
import importlib
import inspect
import os
import time
import traceback
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import PIL.Image
import torch
from families.base import STEPS, Builders, Case

PIPELINES: Builders = {}
for _file in sorted((Path(__file__).parent / "families").glob("*.py")):
    PIPELINES |= getattr(importlib.import_module(f"families.{_file.stem}"), "PIPELINES", {})

OWN_MODELS = "its encoders are of its own making, and nobody has written tiny ones here"
RETIRED = "retired by diffusers, and a variant of Stable Diffusion, which has cases"
LEFT_OUT: dict[str, str] = {
    "bria_fibo2": OWN_MODELS,
    "consisid": "wants OpenCV",
    "diffusion_gemma": "writes text: a language model, with no timesteps",
    "glm_image": "its pictures begin as tokens that a language model of its own writes",
    "kandinsky6": OWN_MODELS,
    "kolors": "wants sentencepiece",
    "llada2": "writes text: a language model, with no timesteps",
    "omnigen": "wants torchvision",
    "qwenimage21": OWN_MODELS,
    "rfd4_proteina": "folds proteins: structures go in and come out, and no prompts",
    "sana_wm": OWN_MODELS,
    "deprecated.amused": "fills in tokens of pictures: no noise is taken away",
    "deprecated.audio_diffusion": "wants librosa",
    "deprecated.blip_diffusion": "retired by diffusers; pictures and words are mixed by a Q-Former of its own",
    "deprecated.controlnet_xs": RETIRED,
    "deprecated.i2vgen_xl": "its prompts are read by a part of CLIP that is not in transformers 5",
    "deprecated.pia": "retired by diffusers; AnimateDiff has cases",
    "deprecated.repaint": "goes back and forth in time by a sampler of its own; retired by diffusers",
    "deprecated.score_sde_ve": "retired by diffusers; its sampler predicts and corrects by scores of its own",
    "deprecated.spectrogram_diffusion": "wants note_seq",
    "deprecated.stable_diffusion_diffedit": RETIRED,
    "deprecated.stable_diffusion_attend_and_excite": RETIRED,
    "deprecated.stable_diffusion_ldm3d": RETIRED,
    "deprecated.stable_diffusion_safe": RETIRED,
    "deprecated.stable_diffusion_variants": RETIRED,
    "deprecated.stochastic_karras_ve": "retired by diffusers; its sampler asks for scores of its own",
    "deprecated.unidiffuser": "retired by diffusers; it makes texts and pictures by one network of its own",
    "deprecated.versatile_diffusion": RETIRED,
    "deprecated.vq_diffusion": "fills in tokens of pictures: no noise is taken away",
}


def run(case: Case, seeds: list[int]) -> object:
    """What the pipeline gives for these seeds, each with a generator of its own."""
    parameters = inspect.signature(case.pipe.__call__).parameters
    rows = [seed % len(next(iter(case.conditioning.values()), [0])) for seed in seeds]
    arguments = {
        name: values[rows] if isinstance(values, torch.Tensor) else [values[row] for row in rows]
        for name, values in case.conditioning.items()
    }
    own = {"num_inference_steps": STEPS, "output_type": case.output, "batch_size": len(seeds)}
    arguments |= {name: value for name, value in own.items() if name in parameters} | case.pipeline_kwargs
    if "generator" in parameters:
        arguments["generator"] = [torch.Generator().manual_seed(seed) for seed in seeds]
    if case.plain:
        first = [*case.conditioning, "generator"]
        arguments |= {name: arguments[name][0] for name in first if isinstance(arguments.get(name), list)}
    with torch.no_grad():
        return case.pipe(**arguments)


def values(output: object) -> Iterator[np.ndarray]:
    """All arrays of numbers in what a pipeline gave."""
    if isinstance(output, torch.Tensor):
        yield output.detach().float().numpy()
    elif isinstance(output, (np.ndarray, PIL.Image.Image)):
        yield np.asarray(output, dtype=np.float64)
    elif isinstance(output, dict):
        yield from (array for value in output.values() for array in values(value))
    elif isinstance(output, (list, tuple)):
        yield from (array for value in output for array in values(value))
    elif hasattr(output, "__dataclass_fields__"):
        yield from (array for name in output.__dataclass_fields__ for array in values(getattr(output, name)))


def finite(output: object) -> bool:
    """Whether there is something, and all of it is finite."""
    arrays = list(values(output))
    return bool(arrays) and all(array.size and np.isfinite(array).all() for array in arrays)


def float_column(case: Case) -> str:
    """ "ok" where the pipeline itself runs for one seed and for two; else the error."""
    for seeds in [[0]] if case.alone else [[0], [0, 1]]:
        try:
            if not finite(run(case, seeds)):
                return f"not finite for {len(seeds)} seeds"
        except Exception as error:
            if os.environ.get("TRACE"):
                traceback.print_exc()
            return f"{len(seeds)} seeds: {type(error).__name__}: {' '.join(str(error).split())[:200]}"
    return "ok"


def chosen(patterns: list[str]) -> list[str]:
    """Names of the catalogue that fit one of the patterns."""
    return [name for name in PIPELINES if any(fnmatch.fnmatch(name, pattern) for pattern in patterns)]


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", default=["*"], help="names, or patterns such as 'Flux*'")
    options = parser.parse_args(argv)
    for name in chosen(options.only):
        start = time.perf_counter()
        try:
            answer = float_column(PIPELINES[name]())
        except Exception as error:
            if os.environ.get("TRACE"):
                traceback.print_exc()
            answer = f"not built: {type(error).__name__}: {' '.join(str(error).split())[:200]}"
        print(f"{name:48} {time.perf_counter() - start:5.1f} s  {answer}", flush=True)


if __name__ == "__main__":
    main()
