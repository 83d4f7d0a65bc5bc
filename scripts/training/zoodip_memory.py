"""Peak memory and speed of a step, of sampling as many rows, and of a step by back-propagation."""

from __future__ import annotations

import time
from dataclasses import replace
from functools import partial

import torch
from zoodip_arms import BACK, back_propagated
from zoodip_bench import Bench, settled

from ptq4dm.training.personalization.run import step_once
from ptq4dm.training.personalization.zeroth_order import Tuned


def memory(bench: Bench, model: str) -> dict:
    """Peak bytes of all that is on a GPU, and works a second; the process must be alone on its card.

    Of batches of one image with two perturbations, as the paper has, and of those of this comparison.
    """
    found: dict = {}
    bench.unseen, bench.rows = torch.empty(0), ([], torch.empty(0), torch.empty(0))  # they weigh, and are not of it
    for name, b, n in (("one image", 1, 2), ("batch", bench.args.batch_size, bench.args.perturbations)):
        problem = bench.problem("", 0)
        problem.config = replace(problem.config, batch_size=b, perturbations=n)
        state, rows = Tuned.start(problem.target.start), b * (1 + n)
        labels = [bench.label] * rows

        def sampling(labels=labels) -> None:
            bench.pipe(labels, num_inference_steps=1, output_type="pt")

        works = {"step": partial(step_once, problem, state), "sampling": sampling}
        if model == "float32":
            works[BACK] = partial(back_propagated, problem, 1, 0.01)
        for what, work in works.items():
            found[f"{name}: {what}"] = measured(work, bench.device, bench.args.timed_seconds)
    return found


def measured(work, device: torch.device, least: float) -> dict:
    """{"peak_bytes", "per_second"} over so many seconds; bytes on a GPU only."""
    work()
    settled(device)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    begun, count = time.monotonic(), 0
    while count < 1 or time.monotonic() - begun < least:
        work()
        settled(device)
        count += 1
    seconds = time.monotonic() - begun
    peak = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None
    return {"peak_bytes": peak, "per_second": round(count / seconds, 2)}
