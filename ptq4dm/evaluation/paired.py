"""The figures that quality is judged by: a model beside its full-precision original, on the same seeds and inputs.

    PSNR            -10 log10 max(MSE, 1e-12) of each image, data range 1; the mean over images, with its interval
    epsilon error   sum |e_q - e_fp|^2 / sum |e_fp|^2 of noise predictions on inputs that both models are given alike

All sums are float64.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from scipy.special import stdtrit
from torch import Tensor, nn

from ..calibration.calls import Calls
from ..calibration.measure import timestep_bins
from ..calibration.record import answers, samples_of, tensors_of
from ..errors import UserError

MSE_FLOOR = 1e-12  # 120 dB: what identical pictures are given, so that a mean over pictures stays finite
CONFIDENCE = 0.95
BOUNDS = {"psnr": (0.0, 120.0), "ssim": (-1.0, 1.0), "lpips": (0.0, math.inf), "clip": (0.0, 100.0)}
"""Figure of a picture -> the least and the largest that it can be; others have no ends."""


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
    """Peak signal-to-noise ratio in dB for data range 1, at most 120 dB (identical pictures)."""
    return -10 * math.log10(max(mse, MSE_FLOOR))


def paired_psnr(errors: Sequence[float]) -> dict:
    """The mean PSNR of images and how well it is known, from their mean squared errors.

    Returns:
        {"psnr_db", "psnr_stderr", "psnr_interval", "mse", "identical"}: the mean with its standard error and interval
        (`mean_interval`), and how many images have no error at all.

    Raises:
        UserError: NaN or infinity among the errors.
    """
    if not all(math.isfinite(error) for error in errors):
        raise UserError("an image's error is NaN or infinite: one of the two models overflowed.")
    found = mean_interval([psnr(error) for error in errors], *BOUNDS["psnr"])
    return {
        "psnr_db": found["mean"],
        "psnr_stderr": found["stderr"],
        "psnr_interval": found["interval"],
        "mse": sum(errors) / len(errors),
        "identical": sum(error == 0 for error in errors),
    }


def mean_interval(values: Sequence[float], low: float = -math.inf, high: float = math.inf) -> dict[str, Any]:
    """{"mean", "stderr", "interval"}: the standard error of the mean, and the two ends of its 95 % interval.

    By Student's law for so many values, and of that the part within low and high, where the values and their mean
    lie: it holds the mean as often as the whole. Of one value alone there is neither: they are None.
    """
    mean, count = sum(values) / len(values), len(values)
    stderr = interval = None
    if count > 1:
        stderr = math.sqrt(sum((value - mean) ** 2 for value in values) / (count - 1) / count)
        reach = reach_of(count) * stderr
        interval = [max(mean - reach, min(low, mean)), min(mean + reach, max(high, mean))]  # a mean may be rounded
    return {"mean": mean, "stderr": stderr, "interval": interval}


def reach_of(count: int) -> float:
    """How many standard errors Student's 95 % interval of a mean of so many values reaches to either side."""
    return float(stdtrit(count - 1, (1 + CONFIDENCE) / 2))


class EpsilonError:
    """sum |e_q - e_fp|^2 / sum |e_fp|^2 of noise predictions, per equal-width bin of timesteps and over all.

    rows: (time [B] in [0, 1], squared difference [B], squared reference [B]) of each update.
    """

    def __init__(self, num_bins: int, num_train_timesteps: int) -> None:
        self.num_bins, self.num_train_timesteps = num_bins, num_train_timesteps
        self.rows: list[tuple[Tensor, Tensor, Tensor]] = []

    def update(self, model: nn.Module, full_precision: nn.Module, calls: Calls) -> None:
        """Give both denoisers the same recorded calls and add up the difference of their answers.

        Of a row that is what stands for it in the first tensor of an answer, of a whole call it is all tensors.
        """
        for part in calls.batches(max(1, len(calls))):
            given, exact = (answers(net, part)[0] for net in (model, full_precision))
            if part.joined:
                self.add(part.time, samples_of(given, part), samples_of(exact, part))
            else:
                flat = (torch.cat([leaf.flatten() for leaf in tensors_of(one)])[None] for one in (given, exact))
                self.add(part.time, *flat)

    def add(self, time: Tensor, predicted: Tensor, exact: Tensor) -> None:
        """time [B] in [0, 1]; two predictions [B, ...] for the same inputs, any floating dtype and device."""
        wrong, right = (x.detach().cpu().double().flatten(1) for x in (predicted, exact))
        self.rows.append((time.cpu(), (wrong - right).square().sum(1), right.square().sum(1)))

    @property
    def sums(self) -> Tensor:
        """float64 [num_bins, 3]: squared difference, squared reference, rows."""
        sums = torch.zeros(self.num_bins, 3, dtype=torch.float64)
        if not self.rows:
            return sums
        time, difference, reference = (torch.cat(parts) for parts in zip(*self.rows, strict=True))
        bins = timestep_bins(time, self.num_bins)
        return sums.index_add_(0, bins, torch.stack([difference, reference, torch.ones_like(reference)], 1))

    def result(self) -> dict:
        """{"overall", "rows", "bins": [{"from", "to", "rows", "error"}]}; bins without rows are left out.

        Raises:
            UserError: nothing was measured, or a prediction held NaN or infinity.
        """
        sums, width = self.sums, self.num_train_timesteps / self.num_bins
        if not sums.isfinite().all():
            raise UserError("a noise prediction holds NaN or infinity; the quantized model overflowed.")
        total = sums.sum(0)
        if total[1] == 0:
            raise UserError("the full-precision model predicts no noise at all; its error has no scale.")
        bins = [
            {
                "from": round(k * width),
                "to": round((k + 1) * width),
                "rows": int(rows),
                "error": difference / reference if reference else None,
            }
            for k, (difference, reference, rows) in enumerate(sums.tolist())
            if rows
        ]
        return {"overall": float(total[0] / total[1]), "rows": int(total[2]), "bins": bins}
