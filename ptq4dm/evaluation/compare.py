"""Two denoisers or two sets of pictures side by side: the paired evidence that quality is judged by.

Same-seed endpoint error, noise-prediction error on inputs that both models are given alike, and step time measured
alternately in one run. Sums are float64 and add up over processes.
"""

from __future__ import annotations

import statistics as stats
import time
from dataclasses import replace

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list, reduce
from torch import Tensor, nn
from tqdm import tqdm

from ..calibration.record import Calls, record_calls, replay
from ..errors import UserError
from ..pipelines.denoiser import denoiser
from ..quantization.report import stored_bytes

MSE_FLOOR = 1e-10  # 100 dB: what identical pictures are given, so that a mean over pictures stays finite


def image_errors(images: Tensor, reference: Tensor) -> list[float]:
    """Mean squared error of each image, data range 1: [N,3,H,W] float in [0,1] twice -> N floats.

    Raises:
        UserError: the shapes differ.
    """
    if images.shape != reference.shape:
        raise UserError(
            f"the two models make images of different shapes, {list(images.shape)} and {list(reference.shape)}; "
            "they cannot be compared."
        )
    return (images.double() - reference.double()).square().flatten(1).mean(1).tolist()


def psnr(mse: float) -> float:
    """Peak signal-to-noise ratio in dB for data range 1, at most 100 dB (identical pictures)."""
    return float(-10 * torch.tensor(max(mse, MSE_FLOOR), dtype=torch.float64).log10())


class EpsilonError:
    """sum |e_q - e_fp|^2 / sum |e_fp|^2 of noise predictions, per equal-width bin of timesteps and over all.

    `sums` is float64 [num_bins, 3]: squared difference, squared reference, rows.
    """

    def __init__(self, num_bins: int, num_train_timesteps: int) -> None:
        self.width = num_train_timesteps / num_bins
        self.sums = torch.zeros(num_bins, 3, dtype=torch.float64)

    def update(self, model: nn.Module, full_precision: nn.Module, calls: Calls) -> None:
        """Give both denoisers the same recorded inputs and add up the difference of their answers."""
        wrong, right = (replay(m, calls).detach().cpu().double().flatten(1) for m in (model, full_precision))
        t = calls.timestep.double()
        if calls.timestep.is_floating_point() and t.max() <= 1:
            t = t * self.width * len(self.sums)  # flow-matching pipelines call their model with t in [0, 1]
        bins = (t / self.width).long().clamp(0, len(self.sums) - 1)
        rows = torch.stack([(wrong - right).square().sum(1), right.square().sum(1), torch.ones_like(t)], dim=1)
        self.sums.index_add_(0, bins, rows.double())

    def result(self) -> dict:
        """{"overall", "rows", "bins": [{"from", "to", "rows", "error"}]}; bins without rows are left out.

        Raises:
            UserError: nothing was measured, or a prediction held NaN or infinity.
        """
        if not self.sums.isfinite().all():
            raise UserError("a noise prediction holds NaN or infinity; the quantized model overflowed.")
        total = self.sums.sum(0)
        if total[1] == 0:
            raise UserError("the full-precision model predicts no noise at all; its error has no scale.")
        bins = [
            {
                "from": round(k * self.width),
                "to": round((k + 1) * self.width),
                "rows": int(rows),
                "error": difference / reference if reference else None,
            }
            for k, (difference, reference, rows) in enumerate(self.sums.tolist())
            if rows
        ]
        return {"overall": float(total[0] / total[1]), "rows": int(total[2]), "bins": bins}


def heldout_timesteps(number: int, num_train_timesteps: int) -> list[float]:
    """`number` timesteps from high to low, at the middles of equal parts of [0, num_train_timesteps)."""
    return [(number - k - 0.5) * num_train_timesteps / number for k in range(number)]


def _moved(calls: Calls, model: nn.Module) -> Calls:
    parameter = next(model.parameters())
    dtype = getattr(model, "dtype", parameter.dtype)

    def ready(value):
        if not isinstance(value, Tensor):
            return value
        return value.to(parameter.device, dtype if value.is_floating_point() else None)

    return replace(
        calls,
        sample=ready(calls.sample),
        timestep=calls.timestep.to(parameter.device),
        conditioning={k: ready(v) for k, v in calls.conditioning.items()},
        shared={k: ready(v) for k, v in calls.shared.items()},
    )


def step_times(model: nn.Module, full_precision: nn.Module, calls: Calls, warmup: int = 2, timed: int = 10) -> dict:
    """One denoiser call of each, alternately, `timed` times after `warmup`: medians and their ratio.

    The two take turns so that whatever else the machine does meets both. Inputs are on the device beforehand.

    Returns:
        {"speedup": full-precision time / model time, "batch_size", "timed_steps", "device"}; on CUDA also
        "milliseconds" and "milliseconds_full_precision" (a CPU's own figure says little on another machine).
    """
    turns = [(m, _moved(calls, m), []) for m in (model, full_precision)]
    device = next(model.parameters()).device

    def synchronize():
        if device.type != "cpu":
            torch.accelerator.synchronize(device)

    for step in tqdm(range(warmup + timed), desc="timing", unit="step"):
        for net, inputs, times in turns:
            synchronize()
            start = time.perf_counter()
            replay(net, inputs)
            synchronize()
            if step >= warmup:
                times.append(time.perf_counter() - start)
    ours, theirs = (1000 * stats.median(times) for _, _, times in turns)
    result = {"speedup": theirs / ours, "batch_size": len(calls), "timed_steps": timed, "device": device.type}
    if device.type == "cuda":
        result |= {
            "device": torch.cuda.get_device_name(device),
            "milliseconds": ours,
            "milliseconds_full_precision": theirs,
        }
    return result


def compare_denoisers(pipe, full_precision, config) -> dict:
    """The denoiser's entries of the report: "epsilon_error", "bytes" and "step_time".

    Inputs are recorded while the full-precision pipeline samples from held-out seeds, at timesteps spread evenly over
    the schedule; both denoisers then answer the same inputs. In a launch of several processes the seeds are shared
    out, and the main process alone takes the time.

    Args:
        config: an `EvaluateConfig`.
    """
    state = PartialState()
    model, original = denoiser(pipe), denoiser(full_precision)
    span = int(full_precision.scheduler.config.get("num_train_timesteps", 1000))
    result: dict = {}

    def record(seeds, timesteps):
        return record_calls(
            full_precision,
            seeds,
            timesteps,
            num_inference_steps=config.num_inference_steps,
            conditioning=config.conditioning,
            pipeline_kwargs=config.pipeline_kwargs,
        )

    if config.num_heldout:
        error = EpsilonError(config.num_bins, span)
        seeds = range(config.heldout_seed, config.heldout_seed + config.num_heldout)
        timesteps = heldout_timesteps(config.num_heldout, span)
        mine = slice(state.process_index, None, state.num_processes)
        seeds, timesteps = seeds[mine], timesteps[mine]
        starts = range(0, len(seeds), config.batch_size)
        for k in tqdm(starts, desc="noise prediction", unit="batch", disable=not state.is_main_process):
            rows = slice(k, k + config.batch_size)
            error.update(model, original, record(seeds[rows], timesteps[rows]))
        if state.num_processes > 1:
            error.sums = reduce(error.sums.to(state.device), reduction="sum").cpu()
        result["epsilon_error"] = {"seed": config.heldout_seed, **error.result()}
    ours, theirs = stored_bytes(model), stored_bytes(original)
    result["bytes"] = {"model": ours, "full_precision": theirs, "ratio": theirs / ours}
    if config.timed_steps:
        timing: list = [None]
        if state.is_main_process:
            # The first step of one batch: a real input, at the price of a single call.
            calls = record(
                range(config.heldout_seed, config.heldout_seed + config.batch_size), [span] * config.batch_size
            )
            timing = [step_times(model, original, calls, config.warmup_steps, config.timed_steps)]
        result["step_time"] = broadcast_object_list(timing)[0]
    return result
