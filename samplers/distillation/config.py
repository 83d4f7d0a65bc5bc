"""Settings of DisBack."""

from __future__ import annotations

from dataclasses import asdict, dataclass

from ...checks import check_fields, named_options
from ...errors import UserError
from ...options import option
from ...training.precision import precision_of

# These may change when a run is resumed, and nothing else.
FREE = ("images", "minutes", "student_lr", "fake_lr")
MOST = 10**12  # images or iterations


@named_options
@dataclass(frozen=True)
class DisBackConfig:
    """Distillation of a diffusion model to one step.

    backtracking: DisBack; False leaves out stage 1 and aims at the teacher from the start: plain score distillation.
    images: generated images that the student learns from, in all.
    minutes: of wall-clock time after which this call stops, wherever it is; None: no limit.
    batch_size: images of an iteration, over all processes and accumulation steps.
    gradient_accumulation_steps: parts that a batch is worked off in, to save memory; the result is the same.
    generator_sigma: sigma / alpha of the noise level that the one-step generator runs at.
    sigma_range: scores are compared at timesteps between those where sigma / alpha is nearest to these. Above, an
        epsilon network's error is multiplied by sigma / alpha and little of an image is left to compare.
    degradation_steps, path_points: stage 1: iterations, and how many evenly spaced checkpoints it leaves. Few
        iterations are enough, and with many nearly the whole path lies at G_0, where nothing is to be learnt.
    switch_every: stage 2: iterations between a target and the next one of the path.
    fake_steps: updates of the fake score for each of the student.
    student_lr, fake_lr, betas, warmup_steps, gradient_clip: AdamW without decay of weights, constant after a warm-up.
        Three times these rates leave feature-FID swinging on the embedded UNet: see the README.
    ema_decay: moving average of the student's weights; reached slowly, (1 + step) / (10 + step) at first.
    bits: of the student's products, forward and backward, 2 to 8: it trains on integers (ShiftQuant), its layers at
        the ends with 8 bits, and is saved with plain layers. 16: in floats, as the fake score and the target always
        are: what rounding took from one of them alone would pull at the student.
    precision: "bf16" (autocast; weights and optimizers stay float32) or "no"; torch.bfloat16, torch.float32 and
        their names mean the same.
    compile: torch.compile the networks; they then take minutes to start and less time for each iteration.
    log_every: iterations between two lines of the log, at which the losses are looked at.
    evaluate_every: images between two checkpoints, sample grids and measurements.
    num_fid: images of each measured feature-FID; 0 leaves it out; None: 5000 where images are 32x32 RGB, else none.
    seed: decides all noise; iteration k is given the same noise with and without backtracking.
    """

    backtracking: bool = option(True, "DisBack; without: plain score distillation, towards the teacher at once")
    images: int = option(500_000, "that the student learns from, in all", low=1, high=MOST)
    minutes: float | None = option(None, "stop this call after so many; resume it with --resume", finite=False)
    batch_size: int = option(256, "over all processes and accumulation steps", low=1, high=MOST)
    gradient_accumulation_steps: int = option(1, "parts of a batch", low=1, high=MOST)
    generator_sigma: float = option(2.5, "noise level of the generator's input", finite=False)
    sigma_range: tuple[float, float] = option((0.1, 10.0), finite=False)
    degradation_steps: int = option(100, "iterations of stage 1", low=1, high=MOST)
    path_points: int = option(5, "targets on the way back to the teacher", low=1, high=MOST)
    switch_every: int = option(25, "iterations from one to the next", low=1, high=MOST)
    fake_steps: int = option(1, "updates of the fake score for each of the student", low=1, high=MOST)
    student_lr: float = option(3e-5, "its learning rate", finite=False)
    fake_lr: float = option(1e-4, "of the fake score", finite=False)
    betas: tuple[float, float] = option((0.0, 0.99), low=0)
    warmup_steps: int = option(100, low=1, high=MOST)
    gradient_clip: float = option(1.0, finite=False)
    ema_decay: float = option(0.999, "moving average of the student")
    bits: int = option(16, "of the student's products: 2 to 8 trains it on integers; 16: in floats", low=2, high=16)
    precision: str = "no"
    compile: bool = option(False, "torch.compile: pays in runs of many minutes")
    log_every: int = option(50, low=1, high=MOST)
    evaluate_every: int = option(50_000, "images between checkpoints and grids", low=1, high=MOST)
    num_fid: int | None = option(None, "images of a feature-FID; 0: none (5000 at 32x32)", low=0, high=MOST)
    seed: int = option(0, "of all noise", low=0)

    def __post_init__(self):
        object.__setattr__(self, "precision", precision_of(self.precision))
        check_fields(self, "DisBackConfig")
        if self.precision not in ("no", "bf16"):
            raise UserError(f"precision must be 'no' or 'bf16', not '{self.precision}': fp16 overflows.")
        if 8 < self.bits < 16:
            raise UserError(f"bits must be from 2 to 8, or 16 for floats; got {self.bits}.")
        for name in ("generator_sigma", "student_lr", "fake_lr", "gradient_clip"):
            if not 0 < getattr(self, name) < float("inf"):
                raise UserError(f"{name} must be positive; got {getattr(self, name)}.")
        if self.minutes is not None and not self.minutes > 0:
            raise UserError(f"minutes must be positive; got {self.minutes:g}.")
        low, high = self.sigma_range
        if not 0 < low < high < float("inf"):
            raise UserError(f"sigma_range must rise from above 0; got {low:g} to {high:g}.")
        if not 0 <= self.ema_decay < 1:
            raise UserError(f"ema_decay lies in [0, 1); got {self.ema_decay:g}.")
        if self.path_points > self.degradation_steps:
            raise UserError(
                f"{self.degradation_steps} degradation_steps cannot leave {self.path_points} path_points."
            )
        if self.num_fid == 1:
            raise UserError(f"num_fid must be 0, or at least 2 for a covariance; got {self.num_fid}.")
        if max(self.betas) >= 1:
            raise UserError(f"betas lie in [0, 1); got {self.betas[0]:g} and {self.betas[1]:g}.")

    def identity(self) -> dict:
        """Settings that have to be the same for a run to go on, as plain JSON values."""
        values = {name: value for name, value in asdict(self).items() if name not in FREE}
        if self.bits == 16:  # as runs were before there was a choice
            del values["bits"]
        return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}
