"""Two denoisers side by side: noise prediction error on held-out inputs, bytes, and step time, taken in turns."""

from __future__ import annotations

import statistics as stats
import time

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list, gather_object
from torch import nn

from ..calibration.calls import Call, Calls
from ..calibration.look import look
from ..calibration.record import ready
from ..calibration.request import request_of
from ..calibration.sampled import record_components
from ..layers.sizes import stored_bytes
from ..pipelines.denoiser import denoiser, denoiser_name, denoiser_names
from ..progress import progress_bar
from .paired import EpsilonError


def heldout_timesteps(number: int, num_train_timesteps: int) -> list[float]:
    """`number` timesteps from high to low, at the middles of equal parts of [0, num_train_timesteps)."""
    return [(number - k - 0.5) * num_train_timesteps / number for k in range(number)]


def denoiser_bytes(pipe) -> int:
    """Bytes of all tensors of a pipeline's denoisers."""
    return sum(stored_bytes(getattr(pipe, name)) for name in denoiser_names(pipe))


@torch.no_grad()
def step_times(model: nn.Module, full_precision: nn.Module, calls: Calls, warmup: int = 2, timed: int = 10) -> dict:
    """One denoiser call of each, alternately, `timed` times after `warmup`: medians and their ratio.

    The two take turns so that whatever else the machine does meets both. Inputs are on the device beforehand.

    Returns:
        {"speedup": full-precision time / model time, "batch_size", "timed_steps", "device"}; on CUDA also
        "milliseconds" and "milliseconds_full_precision" (a CPU's own figure says little on another machine).
    """
    one = next(calls.batches(len(calls)))
    turns: list[tuple[nn.Module, Call, list[float]]] = [(m, ready(one, m), []) for m in (model, full_precision)]
    device = next(model.parameters()).device

    def synchronize():
        if device.type != "cpu":
            torch.accelerator.synchronize(device)

    for step in progress_bar(range(warmup + timed), desc="timing", unit="step"):
        for net, inputs, times in turns:
            synchronize()
            start = time.perf_counter()
            net(*inputs.args, **inputs.kwargs)
            synchronize()
            if step >= warmup:
                times.append(time.perf_counter() - start)
    ours, theirs = (1000 * stats.median(times) for _, _, times in turns)
    result = {"speedup": theirs / ours, "batch_size": len(one), "timed_steps": timed, "device": device.type}
    if device.type == "cuda":
        result |= {
            "device": torch.cuda.get_device_name(device),
            "milliseconds": ours,
            "milliseconds_full_precision": theirs,
        }
    return result


def compare_denoisers(pipe, full_precision, config) -> dict:
    """The denoisers' entries of the report: "epsilon_error", "bytes" and "step_time" (of the main one).

    Inputs are recorded while the full-precision pipeline samples from held-out seeds, at timesteps spread evenly over
    the schedule; the denoisers of both pipelines then answer the same inputs. In a launch of several processes the
    seeds are shared out, and the main process alone takes the time.

    Args:
        config: an `EvaluateConfig`.
    """
    state = PartialState()
    model, original = denoiser(pipe), denoiser(full_precision)
    span = int(full_precision.scheduler.config.get("num_train_timesteps", 1000))
    result: dict = {}

    options = {
        "num_inference_steps": config.num_inference_steps,
        "conditioning": config.conditioning,
        "pipeline_kwargs": config.pipeline_kwargs,
    }
    request = request_of(full_precision, **options)
    sampling = look(request, config.heldout_seed)

    if config.num_heldout:
        error = EpsilonError(config.num_bins, span)
        seeds = range(config.heldout_seed, config.heldout_seed + config.num_heldout)
        timesteps = heldout_timesteps(config.num_heldout, span)
        mine = slice(state.process_index, None, state.num_processes)
        seeds, timesteps = seeds[mine], timesteps[mine]
        starts = range(0, len(seeds), config.batch_size)
        for k in progress_bar(starts, desc="noise prediction", unit="batch", hidden=not state.is_main_process):
            rows = slice(k, k + config.batch_size)
            for name, calls in record_components(request, seeds[rows], timesteps[rows], sampling).items():
                if len(calls):
                    error.update(getattr(pipe, name), getattr(full_precision, name), calls)
        error.rows = gather_object(error.rows)
        result["epsilon_error"] = {"seed": config.heldout_seed, **error.result()}
    ours, theirs = (denoiser_bytes(one) for one in (pipe, full_precision))
    result["bytes"] = {"model": ours, "full_precision": theirs, "ratio": theirs / ours}
    if config.timed_steps:
        timing: list = [None]
        if state.is_main_process:
            # The first step of one batch: a real input, at the price of a single call.
            seeds = range(config.heldout_seed, config.heldout_seed + config.batch_size)
            main = request_of(full_precision, [denoiser_name(full_precision)], **options)
            (calls,) = record_components(main, seeds, [span] * config.batch_size, sampling).values()
            timing = [step_times(model, original, calls, config.warmup_steps, config.timed_steps)]
        result["step_time"] = broadcast_object_list(timing)[0]
    return result
