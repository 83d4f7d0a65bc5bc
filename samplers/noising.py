"""Noise put on clean data, and samples scaled for the model: what pipelines and training ask of a scheduler."""

from __future__ import annotations

import numpy as np
import torch

from ..errors import UserError
from .answers import input_scale
from .choices import FLOW
from .maths.paths import alpha_sigma, shares
from .maths.timesteps import likely_index, own_index, single


class Noising:
    """Of a DEISScheduler with `schedule`, `config`, and, once steps are chosen, `_times` and `_evaluations`."""

    def scale_model_input(self, sample: torch.Tensor, timestep=None, *args, **kwargs) -> torch.Tensor:
        """The sample as the model takes it: itself, or for an EDM model times 1 / sqrt(sigma^2 + sigma_data^2).

        Args:
            timestep: where the sample is, an entry of `timesteps`; only EDM models need it.
        """
        if self.config.sigma_data is None:
            return sample
        if self._evaluations:
            sigma = self._evaluations[self.index_for_timestep(timestep)].sigma
        else:  # no steps are chosen yet
            sigma = float(self.schedule.rho(float(timestep)))
        return sample * input_scale(self.config, sigma)

    def add_noise(self, original_samples: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        """alpha x_0 + sigma n at timesteps [B]; shape and dtype of original_samples.

        alpha and sigma are sqrt(a) and sqrt(1 - a), of a flow-matching model 1 - s and s, of EDM's 1 and sigma. Of a
        flow, an entry of `timesteps` stands for the noise level there; any other t for s = t / num_train_timesteps.
        """
        alpha, sigma = self._shares(timesteps, original_samples)
        return alpha * original_samples + sigma * noise

    def scale_noise(
        self, sample: torch.Tensor, timestep: float | torch.Tensor, noise: torch.Tensor | None = None
    ) -> torch.Tensor:
        """`add_noise` by the name, and in the order, in which pipelines of flow-matching models call it."""
        times = torch.as_tensor(timestep, dtype=torch.float64).reshape(-1)
        return self.add_noise(sample, torch.randn_like(sample) if noise is None else noise, times)

    def get_velocity(self, sample: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        """The target of v-prediction, alpha n - sigma x_0, at timesteps [B]; of flow matching n - x_0."""
        if self.config.prediction_type == FLOW:
            return noise - sample
        alpha, sigma = self._shares(timesteps, sample)
        return alpha * noise - sigma * sample

    def index_for_timestep(self, timestep: float | torch.Tensor, schedule_timesteps: object = None) -> int:
        """The place of a time in `timesteps`: of two equal ones that at which a step begins.

        A time that is not there has the place of the nearest.

        Raises:
            UserError: no steps are chosen.
        """
        if not self._evaluations:
            raise UserError("call set_timesteps(num_inference_steps) first: no timesteps are chosen.")
        timestep = single(timestep)
        index = own_index(timestep, self._own_timesteps)
        return likely_index(timestep, self._times, self._evaluations, None, None) if index is None else index

    def _shares(self, timesteps: torch.Tensor, like: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        if self.config.prediction_type != FLOW:
            return alpha_sigma(self.schedule, timesteps, like)
        known = dict(zip(reversed(self._times), reversed(self._evaluations), strict=True))
        levels = []
        for t in timesteps.double().reshape(-1).tolist():
            at = known.get(float(np.float32(t)))
            s = t / self.config.num_train_timesteps
            levels.append((at.alpha, at.sigma) if at else (s, 1 - s) if self.config.invert_sigmas else (1 - s, s))
        return shares(*np.array(levels).T, like)
