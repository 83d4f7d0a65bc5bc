"""Whether each pipeline is calibrated, quantized to W8A8, saved and loaded to the bit, and runs afterwards.

python scripts/sweep/pipeline_columns.py --only "Flux*" WanPipeline
"""

from __future__ import annotations

import argparse
import gc
import os
import tempfile
import time
import traceback
from collections.abc import Callable
from typing import Any

import torch
from families.base import STEPS, Case
from pipelines import PIPELINES, chosen, finite, float_column, run
from torch import nn
from torch.utils._pytree import tree_leaves

import ptq4dm
from ptq4dm.calibration.record import answers
from ptq4dm.errors import UserError
from ptq4dm.layers.base import is_quantized

# Networks that are run at every step, by the names that pipelines give them.
DENOISERS = ("unet", "transformer", "transformer_2", "unconditional_transformer", "prior", "prior_prior", "decoder")
COLUMNS = ("float", "collect", "W8A8", "all", "save", "run")
BOUND = 0.2  # relative error of a denoiser's outputs on recorded calls


class Unsaved(Exception):
    """The library refuses to save, in a sentence that names the way out."""


class Failure(Exception):
    """A cell that fails without an error of its own."""


def outputs(model: nn.Module, calls: Any) -> list[torch.Tensor]:
    """All tensors that the model gives for these calls."""
    return [leaf for leaf in tree_leaves(list(answers(model, calls))) if isinstance(leaf, torch.Tensor)]


def distance(found: list[torch.Tensor], wanted: list[torch.Tensor]) -> float:
    """Relative error in the Euclidean norm, over all tensors together."""
    difference = sum(float((a.double() - b.double()).square().sum()) for a, b in zip(found, wanted, strict=True))
    return (difference / max(1e-300, sum(float(b.double().square().sum()) for b in wanted))) ** 0.5


def denoisers(pipe: object) -> list[str]:
    """The names of the networks that a pipeline runs at every step."""
    return [name for name in DENOISERS if isinstance(getattr(pipe, name, None), nn.Module)]


def collected(case: Case) -> Any:
    size = {"num_samples": 2, "num_bins": 2, "batch_size": 1 if case.alone else 2}
    return ptq4dm.collect(
        case.pipe,
        ptq4dm.CalibrationConfig(num_inference_steps=STEPS, **size),
        conditioning=case.conditioning,
        pipeline_kwargs=case.pipeline_kwargs,
    )


def quantized(case: Case, store: Any, wanted: dict[str, list[torch.Tensor]]) -> str:
    """Quantizes the pipeline; the largest relative error among its networks."""
    ptq4dm.quantize(case.pipe, ptq4dm.PTQ4DMConfig(), store)
    errors = {
        name: distance(outputs(getattr(case.pipe, name), part.calls), wanted[name])
        for name, part in store.components.items()
    }
    worst = max(errors, key=lambda name: errors[name])
    if not errors[worst] <= BOUND:
        raise Failure(f"{worst} is off by {errors[worst]:.3f}")
    return f"ok {errors[worst]:.3f}"


def complete(case: Case) -> str:
    """Whether every denoiser has quantized layers."""
    names = denoisers(case.pipe)
    left = [name for name in names if not any(is_quantized(layer) for layer in getattr(case.pipe, name).modules())]
    if left or not names:
        raise Failure(f"left in full precision: {', '.join(left) or 'all'}")
    return f"ok {', '.join(names)}"


def reloaded(case: Case) -> Any:
    """The pipeline, saved and loaded again; stand-ins of ours, which cannot be saved, are passed on."""
    with tempfile.TemporaryDirectory() as folder:
        handmade = {name: part for name, part in case.pipe.components.items() if not saves(part)}
        case.pipe.register_modules(**dict.fromkeys(handmade))
        try:
            case.pipe.save_pretrained(folder)
        except UserError as refusal:
            raise Unsaved(str(refusal)) from None
        finally:
            case.pipe.register_modules(**handmade)
        return type(case.pipe).from_pretrained(folder, **handmade)


def saved(case: Case, store: Any) -> str:
    """Saves the pipeline, loads it and compares what its networks give, bit by bit."""
    again = reloaded(case)
    for name, part in store.components.items():
        before, after = (outputs(getattr(pipe, name), part.calls) for pipe in (case.pipe, again))
        if not all(torch.equal(a, b) for a, b in zip(before, after, strict=True)):
            raise Failure(f"{name} is not the same after loading")
    return "ok"


def saves(part: object) -> bool:
    """Whether a component of a pipeline can be saved: stand-ins of ours are passed to `from_pretrained` again."""
    return part is None or hasattr(part, "save_pretrained") or not hasattr(part, "__dict__")


def attempt(work: Callable[[], str]) -> str:
    """The answer of a column, or its error."""
    try:
        return work()
    except Failure as failure:
        return f"FAIL {failure}"
    except Unsaved as refusal:
        return f"n/a refused: {refusal}"
    except Exception as error:
        if os.environ.get("TRACE"):
            traceback.print_exc()
        return f"FAIL {type(error).__name__}: {' '.join(str(error).split())[:300]}"


def columns(case: Case) -> dict[str, str]:
    """{column: "ok ...", "n/a ..." or "FAIL ..."}; what needs a column that failed is "-"."""
    cells = dict.fromkeys(COLUMNS, "-")
    cells["float"] = float_column(case)
    if cells["float"] != "ok":
        return cells | {name: f"n/a {cells['float']}" for name in COLUMNS}
    held: dict[str, Any] = {}

    def collect() -> str:
        held["store"] = store = collected(case)
        held["wanted"] = {
            name: outputs(getattr(case.pipe, name), part.calls) for name, part in store.components.items()
        }
        return "ok " + ", ".join(f"{name} {len(part.calls)}" for name, part in store.components.items())

    def sampled() -> str:
        seeds = [0] if case.alone else [0, 1]
        if not finite(run(case, seeds)):
            raise Failure("not finite")
        return "ok"

    cells["collect"] = attempt(collect)
    unsaved = attempt(lambda: str(bool(reloaded(case))))
    if cells["collect"].startswith("ok"):
        cells["W8A8"] = attempt(lambda: quantized(case, held["store"], held["wanted"]))
    if cells["W8A8"].startswith("ok") or "is off by" in cells["W8A8"]:
        cells["all"] = attempt(lambda: complete(case))
        float_fails = unsaved.startswith("FAIL")
        cells["save"] = f"n/a{unsaved[4:]}" if float_fails else attempt(lambda: saved(case, held["store"]))
        cells["run"] = attempt(sampled)
    held.clear()
    gc.collect()
    return cells


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", default=["*"], help="names, or patterns such as 'Flux*'")
    options = parser.parse_args(argv)
    for name in chosen(options.only):
        start = time.perf_counter()
        try:
            cells = columns(PIPELINES[name]())
        except Exception as error:
            cells = dict.fromkeys(COLUMNS, f"FAIL not built: {error}")
        print(
            f"{name}  {time.perf_counter() - start:.1f} s  " + "  ".join(f"[{k}] {v}" for k, v in cells.items()),
            flush=True,
        )


if __name__ == "__main__":
    main()
