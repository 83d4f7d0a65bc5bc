"""The pictures that an evaluation looks at: sampled once, counted, and compared on the way."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from accelerate import PartialState
from accelerate.utils import gather_object
from torch import Tensor

from ..pipelines.sampling import sample
from ..progress import progress_bar
from .measures import Measures, prompts_of, summarized
from .paired import paired_psnr

OURS, ORIGINAL = "model", "full_precision"


class Pictures:
    """This process's share of the pictures: sampled as `batches` is read, the pairs compared on the way.

    Seeds are dealt like cards, so that every process has its part of the pairs. Pairs make batches of their own: the
    same batch for both models, as kernels may round differently in another batch size.

    config: an `EvaluateConfig`. shown: (rows of pictures, seeds) of the first batch, None before it.
    """

    def __init__(self, pipe: Any, full_precision: Any, config: Any, measures: Measures) -> None:
        self.pipe, self.full_precision, self.config, self.measures = pipe, full_precision, config, measures
        self.num_judged = config.num_paired if full_precision is not None or measures.scores else 0
        self.num_counted = config.num_images if config.metric != "none" else 0
        self.judged: list[dict[str, dict[str, float]]] = []  # of each seed: kind -> figure -> value
        self.shown: tuple[list[tuple[str, Tensor]], list[int]] | None = None

    def batches(self) -> Iterator[Tensor]:
        """Images [B, 3, H, W] in [0, 1] of the seeds that the Frechet distance counts."""
        config, state = self.config, PartialState()
        seeds = range(config.seed, config.seed + max(self.num_judged, self.num_counted))
        dealt = slice(state.process_index, None, state.num_processes)
        parts = [seeds[: self.num_judged][dealt], seeds[self.num_judged :][dealt]]
        batches = [list(p[i : i + config.batch_size]) for p in parts for i in range(0, len(p), config.batch_size)]
        alone = state.is_main_process and len(batches) == 1  # then the pipeline's own bar says more
        hidden = alone or not state.is_main_process
        with progress_bar(total=sum(map(len, parts)), unit="image", desc="sampling", hidden=hidden) as bar:
            for batch in batches:
                images = self._draw(self.pipe, batch, alone)
                rows = [("quantized" if self.full_precision is not None else "samples", images)]
                if batch[0] < config.seed + self.num_judged:
                    original = None
                    if self.full_precision is not None:
                        original = self._draw(self.full_precision, batch, alone)
                        rows.insert(0, ("full precision", original))
                    self._judge(batch, images, original)
                self.shown = self.shown or (rows, batch)
                if counted := sum(seed < config.seed + self.num_counted for seed in batch):
                    yield images[:counted]
                bar.update(len(batch))

    def entries(self) -> dict[str, Any]:
        """The report's entries of what was judged: "paired", "prompts", "not_measured"; the same in all processes."""
        rows = gather_object(self.judged)
        for missing in gather_object([self.measures.not_measured]):
            self.measures.not_measured |= missing
        found: dict[str, Any] = {}
        if not rows:
            return found
        told = {"num_images": len(rows), "seed": self.config.seed}
        kinds = {kind: {name: [row[kind][name] for row in rows] for name in rows[0][kind]} for kind in rows[0]}
        if pairs := kinds.pop("pairs", None):
            found["paired"] = told | paired_psnr(pairs.pop("mse"))
            del pairs["psnr"]
            found["paired"] |= summarized(pairs)
            if self.measures.lpips is not None and "lpips" in pairs:
                found["paired"]["lpips_network"] = self.measures.lpips.name
        if kinds.get(OURS):
            found["prompts"] = told | {kind: summarized(values) for kind, values in kinds.items()}
        found["not_measured"] = dict(self.measures.not_measured)
        return found

    def _judge(self, seeds: list[int], images: Tensor, original: Tensor | None) -> None:
        config = self.config
        prompts = prompts_of(self.pipe, seeds, config.conditioning, config.pipeline_kwargs)
        kinds = {OURS: self.measures.prompted(images, prompts)}
        if original is not None:
            kinds["pairs"] = self.measures.pairs(images, original)
            kinds[ORIGINAL] = self.measures.prompted(original, prompts)
        for k in range(len(seeds)):
            self.judged.append(
                {kind: {name: values[k] for name, values in found.items()} for kind, found in kinds.items()}
            )

    def _draw(self, pipe: Any, seeds: list[int], progress: bool) -> Tensor:
        return sample(
            pipe,
            seeds,
            progress=progress,
            num_inference_steps=self.config.num_inference_steps,
            conditioning=self.config.conditioning,
            pipeline_kwargs=self.config.pipeline_kwargs,
        )
