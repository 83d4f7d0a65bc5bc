"""DDIM as diffusers has it, on any timestep grid and with the true previous timestep.

"Denoising Diffusion Implicit Models", Song et al., arXiv:2010.02502, eq. 12 and 16:

    x' = sqrt(a') x_0 + sqrt(1 - a' - s^2) eps + s n,    s = eta sqrt((1 - a') / (1 - a)) sqrt(1 - a / a')

diffusers takes t - N // n for the timestep before t; where n does not divide N, and in spacing "linspace", that is
not the one that the model sees next. Here it is read off the grid. Nothing is read back from the device.
"""

from __future__ import annotations

import bisect
import warnings

import diffusers
import numpy as np
import torch
from diffusers import SchedulerMixin  # noqa: F401  (diffusers looks for it beside a scheduler class that it loads)
from diffusers.configuration_utils import register_to_config
from diffusers.schedulers.scheduling_ddim import DDIMSchedulerOutput
from diffusers.utils.torch_utils import randn_tensor

from ..errors import UserError
from .configs import TakesConfigs, check_choice, class_of, refusing
from .deis import DEISScheduler
from .kinds import BLIND, CLIPS
from .maths.grids import GRIDS, make_grid
from .maths.outputs import without_variance
from .maths.schedule import DiscreteVP, ends_in_noise
from .maths.timesteps import number_of, own_index, single
from .starts import beside_strength, check_left

PREDICTIONS = ("epsilon", "v_prediction", "sample")
SCHEDULES = ("linear", "scaled_linear", "squaredcos_cap_v2")


class DDIMScheduler(TakesConfigs, diffusers.DDIMScheduler):
    """diffusers' DDIMScheduler with one option more.

    Args:
        timestep_grid: a grid of `DEISScheduler` ("quad", "edm", ...); None: diffusers' timestep_spacing. For image to
            image leave it None or take "linear": on other grids a `strength` of 0.5 is not half of the timesteps.
        clip_sample: `from_config` switches it on only where the config has it on.

    All else as in diffusers: `set_alpha_to_one` ends the last step at clean data. Of the config of a flow-matching or
    an EDM model, `from_config` makes a `DEISScheduler` of order 0, which is DDIM on its path: Euler's step of a flow.

    Raises:
        UserError: a choice that does not exist; the config of another model without alpha_bar, or of one distilled to
            a few steps; epsilon prediction from a last timestep of pure noise (zero terminal SNR).
    """

    elsewhere = DEISScheduler.takes

    @refusing
    @register_to_config
    def __init__(
        self,
        num_train_timesteps: int = 1000,
        beta_start: float = 0.0001,
        beta_end: float = 0.02,
        beta_schedule: str = "linear",
        trained_betas: np.ndarray | list[float] | None = None,
        clip_sample: bool = True,
        set_alpha_to_one: bool = True,
        steps_offset: int = 0,
        prediction_type: str = "epsilon",
        thresholding: bool = False,
        dynamic_thresholding_ratio: float = 0.995,
        clip_sample_range: float = 1.0,
        sample_max_value: float = 1.0,
        timestep_spacing: str = "leading",
        rescale_betas_zero_snr: bool = False,
        timestep_grid: str | None = None,
    ):
        options = {k: v for k, v in locals().items() if k not in ("self", "__class__", "timestep_grid")}
        check_choice("prediction_type", prediction_type, PREDICTIONS)
        if timestep_grid is not None:
            check_choice("timestep_grid", timestep_grid, GRIDS)
        if trained_betas is None:
            check_choice("beta_schedule", beta_schedule, SCHEDULES)
        super().__init__(**options)
        self._alphas = self.alphas_cumprod.double().tolist()
        self._times: list[int] = []
        self._blind = prediction_type == "epsilon" and ends_in_noise(self.betas.double().numpy())
        # A "leading" grid begins below the last timestep, and clipping bounds what epsilon of a trained model gives.
        if self._blind and not ((clip_sample or thresholding) and "leading" in (timestep_grid or timestep_spacing)):
            raise UserError(BLIND)

    @classmethod
    def _elsewhere(cls, config: dict, return_unused_kwargs: bool, kwargs: dict):
        return DEISScheduler.from_config(config, return_unused_kwargs, **{**kwargs, "solver": "t_ab", "order": 0})

    @classmethod
    def _translated(cls, config: dict, kwargs: dict) -> dict:
        """Where a config does not speak of clipping, its class decides; only DDIM's and DDPM's clip unasked."""
        if config.get("clip_sample") is None and class_of(config) not in CLIPS:
            kwargs = {"clip_sample": False, **kwargs}
        if config.get("timestep_grid") == "diffusers":  # of our DEIS: timestep_spacing, which stands beside it
            kwargs = {"timestep_grid": None, **kwargs}
        return kwargs

    def set_timesteps(self, num_inference_steps: int, device: str | torch.device | None = None) -> None:
        """Choose num_inference_steps timesteps, one evaluation of the model each.

        A warning says so where the only one is near clean data (one step of diffusers' "leading" and "linspace").

        Raises:
            UserError: no steps, more than the model was trained with, or an unknown timestep_grid.
        """
        num_inference_steps = number_of(num_inference_steps)
        if not 1 <= num_inference_steps <= self.config.num_train_timesteps:
            raise UserError(
                f"num_inference_steps must be from 1 to the {self.config.num_train_timesteps} timesteps of the "
                f"schedule, not {num_inference_steps}."
            )
        super().set_timesteps(num_inference_steps, device="cpu")
        if self.config.timestep_grid is not None:
            schedule = DiscreteVP(np.array(self._alphas))
            times = make_grid(schedule, self.config.timestep_grid, num_inference_steps, self.config.steps_offset)
            self.timesteps = torch.from_numpy(times[:-1]).long()
        # By rounding, diffusers' trailing can have one too many, and its leading with an offset begin at N.
        limit = torch.arange(self.config.num_train_timesteps - 1, -1, -1)[:num_inference_steps]
        self.timesteps = torch.minimum(self.timesteps[:num_inference_steps], limit)
        if self._blind and self.timesteps[0] == self.config.num_train_timesteps - 1:
            raise UserError(BLIND)
        first = int(self.timesteps[0])
        if num_inference_steps == 1 and self._alphas[first] > 0.5:
            warnings.warn(
                f"one step of timestep_spacing '{self.config.timestep_spacing}' begins at timestep {first}, where a "
                "sample is nearly clean, so that noise stays noise; take timestep_spacing='trailing' or "
                "timestep_grid='linear'.",
                stacklevel=2,
            )
        self._times, self._final_alpha = self.timesteps.tolist(), float(self.final_alpha_cumprod)
        self.timesteps = self._own_timesteps = self.timesteps.to(device)

    def set_begin_index(self, begin_index: int = 0) -> None:
        """Take note of where image to image begins; a timestep tells its own place, so nothing depends on it.

        A warning says so where the timestep there is not the one that `strength` means to diffusers.

        Raises:
            UserError: nothing is left to sample there.
        """
        check_left(begin_index, len(self._times), len(self._times))
        if self.config.timestep_grid is not None:
            first = self.config.num_train_timesteps - 1
            said = beside_strength(begin_index, self._times, first, self.config.timestep_grid)
            if said:
                warnings.warn(said, stacklevel=2)

    def step(
        self,
        model_output: torch.Tensor,
        timestep: int | torch.Tensor,
        sample: torch.Tensor,
        eta: float = 0.0,
        use_clipped_model_output: bool = False,
        generator: torch.Generator | None = None,
        variance_noise: torch.Tensor | None = None,
        return_dict: bool = True,
    ) -> DDIMSchedulerOutput | tuple:
        """Move x_t [B, ...] to the next timestep of the grid; arguments and results as in diffusers.

        A timestep that is not in the grid goes to the next lower one that is. A learned variance behind the
        prediction (twice the channels) is left out. Computed in float32 at least, returned in the sample's dtype.

        Raises:
            UserError: set_timesteps has not been called, both generator and variance_noise are given, or the model's
                output does not fit the sample.
        """
        if self.num_inference_steps is None:
            raise UserError("call set_timesteps(num_inference_steps) before the first step.")
        if variance_noise is not None and generator is not None:
            raise UserError("give either a generator or variance_noise, not both.")
        model_output = without_variance(model_output, sample)
        a, a_next = self._alpha_pair(timestep)
        dtype = torch.promote_types(sample.dtype, torch.float32)
        x, output = sample.to(dtype), model_output.to(dtype)
        x0, eps = self._predict(output, x, a)
        if self.config.thresholding:
            x0 = self._threshold_sample(x0)
        elif self.config.clip_sample:
            x0 = x0.clamp(-self.config.clip_sample_range, self.config.clip_sample_range)
        if use_clipped_model_output:
            eps = (x - a**0.5 * x0) / (1 - a) ** 0.5
        deviation = eta * ((1 - a_next) / (1 - a) * (1 - a / a_next)) ** 0.5
        result = a_next**0.5 * x0 + (1 - a_next - deviation**2) ** 0.5 * eps
        if eta > 0:
            if variance_noise is None:
                variance_noise = randn_tensor(
                    output.shape, generator=generator, device=output.device, dtype=model_output.dtype
                )
            result = result + deviation * variance_noise.to(dtype)
        result, x0 = result.to(sample.dtype), x0.to(sample.dtype)
        return DDIMSchedulerOutput(prev_sample=result, pred_original_sample=x0) if return_dict else (result, x0)

    def _predict(self, output: torch.Tensor, x: torch.Tensor, a: float) -> tuple[torch.Tensor, torch.Tensor]:
        """(x_0, epsilon) from the model's output."""
        alpha, sigma = a**0.5, (1 - a) ** 0.5
        if self.config.prediction_type == "epsilon":
            return (x - sigma * output) / alpha, output
        if self.config.prediction_type == "sample":
            return output, (x - alpha * output) / sigma
        return alpha * x - sigma * output, alpha * output + sigma * x

    def _alpha_pair(self, timestep: int | torch.Tensor) -> tuple[float, float]:
        """alpha_bar at a timestep and at the next one of the grid."""
        timestep = single(timestep)
        index = own_index(timestep, self._own_timesteps)
        if index is None:
            t = int(timestep)
            index = bisect.bisect_right([-u for u in self._times], -t) - 1  # the next entry is the first below t
        else:
            t = self._times[index]
        end = index + 1 == len(self._times)
        return self._alphas[t], self._final_alpha if end else self._alphas[self._times[index + 1]]
