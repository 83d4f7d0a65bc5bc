"""Figures of pictures that lie in folders: of each seed against full precision, and of each model by itself."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..evaluation.extractors import Extractor, Reference, frechet_entry, load_extractor, load_reference_statistics
from ..evaluation.measures import Measures, load_measures, summarized
from ..pipelines.picture_files import load_images
from ..progress import progress_bar
from .config import CompareConfig


def picture_paths(folder: Path, label: str, seeds: list[int]) -> list[Path]:
    """Where `generate` put a model's pictures."""
    return [folder / label / f"{seed:06d}.png" for seed in seeds]


@dataclass(frozen=True)
class Judges:
    """What pictures are measured by, loaded before the first is made; against: the extractor's reference."""

    measures: Measures
    extractor: Extractor | None = None
    against: Reference | None = None


def load_judges(config: CompareConfig, device: torch.device | str) -> Judges:
    """Load the networks and the reference that `config` names. Raises UserError where one cannot be."""
    measures = load_measures(config, device)
    if config.metric == "none":
        return Judges(measures)
    extractor = load_extractor(config.metric, device, config.inception_weights, config.resize)
    return Judges(measures, extractor, load_reference_statistics(extractor, config.reference, config.batch_size))


def check_size(judges: Judges, picture: Path) -> None:
    """Raises UserError where the network of the Frechet distance takes no pictures of this one's size."""
    if judges.extractor is not None:
        judges.extractor(load_images([picture]))


def add_figures(report: dict, images: Path, config: CompareConfig, judges: Judges) -> None:
    """Put figures into a report's entries, of pictures as they were saved, in 8 bits.

    "seeds": figure -> one value for each seed; "figures": figure -> mean with its interval; "frechet" where it is
    asked for. The pictures of full precision have no figures against themselves.
    """
    seeds, first, measures = report["seeds"], report["full_precision"], judges.measures
    starts = range(0, len(seeds), config.batch_size)
    labels = list(report["models"])
    values: dict[str, dict[str, list[float]]] = {label: {} for label in labels}
    with progress_bar(total=len(seeds) * len(labels), unit="image", desc="figures") as bar:
        for start in starts:
            batch = seeds[start : start + config.batch_size]
            prompts = None if report["prompts"] is None else report["prompts"][start : start + len(batch)]
            original = _floats(images, first, batch)
            for label in labels:
                pictures = original if label == first else _floats(images, label, batch)
                found = measures.prompted(pictures, prompts)
                if label != first:
                    found |= measures.pairs(pictures, original)
                for name, some in found.items():
                    values[label].setdefault(name, []).extend(some)
                bar.update(len(batch))
    for label, found in values.items():
        found.pop("mse", None)
        report["models"][label] |= {"seeds": found, "figures": summarized(found)}
    report["not_measured"] = dict(measures.not_measured)
    if measures.lpips is not None:
        report["lpips_network"] = measures.lpips.name
    if judges.extractor is None or judges.against is None:
        report["not_measured"]["frechet"] = "--metric fid"
    else:
        _add_frechet(report, images, config.batch_size, judges.extractor, judges.against)


def _floats(images: Path, label: str, seeds: list[int]) -> Tensor:
    return load_images(picture_paths(images, label, seeds)).float() / 255


def _add_frechet(report: dict, images: Path, batch_size: int, extractor: Extractor, against: Reference) -> None:
    seeds = report["seeds"]
    for label, entry in report["models"].items():
        paths = picture_paths(images, label, seeds)
        batches = (load_images(paths[k : k + batch_size]) for k in range(0, len(paths), batch_size))
        found: tuple[dict[str, Any], list[str]] = frechet_entry(extractor, extractor.moments(batches), against)
        entry["frechet"] = found[0]
        report["warnings"] += [text for text in found[1] if text not in report["warnings"]]
