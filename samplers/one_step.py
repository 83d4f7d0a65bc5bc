"""The sampler of a distilled one-step generator: one call of the network, at the noise level it was distilled at.

x_0 = (x - sigma eps(x, t)) / alpha,   x = s z,  z ~ N(0, I),   alpha = sqrt(a(t)),  sigma = sqrt(1 - a(t)),  t fixed

s = sqrt(alpha^2 + sigma^2) is 1 there. Of a flow-matching model alpha = 1 - t / N and sigma = t / N.
"""

from __future__ import annotations

import numpy as np
import torch
from diffusers import ConfigMixin, SchedulerMixin
from diffusers.configuration_utils import register_to_config
from diffusers.schedulers.scheduling_ddim import DDIMSchedulerOutput

from ..errors import UserError
from .choices import FLOW, PREDICTIONS
from .configs import TakesConfigs, check_choice, refusing
from .maths.outputs import noise_in, without_variance
from .maths.schedule import discrete_betas, zero_terminal_snr
from .maths.timesteps import number_of

GENERATOR_SIGMA = 2.5  # sigma / alpha where SiD (arXiv:2404.04057) runs its generator


class OneStepScheduler(TakesConfigs, SchedulerMixin, ConfigMixin):
    """Turns a network's prediction at one fixed timestep into clean data.

    It fits every pipeline that starts from unit noise (DDPMPipeline, PixelDiTPipeline), and of a flow-matching model
    those that ask `scale_model_input` (PixelDiTPipeline). The config also reads as
    that of a DDIMScheduler whose only step, of num_inference_steps=1, is this one: so does DDIMPipeline, which
    makes a DDIMScheduler of whatever it is given.

    Args:
        generator_timestep: where the network is called; None: where sigma / alpha is nearest to 2.5.
        num_train_timesteps, beta_start, beta_end, beta_schedule, trained_betas, rescale_betas_zero_snr: the noise
            schedule of the model that was distilled.
        prediction_type: "epsilon", "v_prediction", "sample", or "flow_prediction", which has no betas.
        timestep_spacing, steps_offset, set_alpha_to_one, clip_sample: have one value each, the one by which DDIM
            does the same.

    Raises:
        UserError: another prediction type, the config of a model of another kind (EDM, consistency, ...), a timestep
            outside the schedule, or one where nothing but noise is left.
    """

    order = 1
    fixed_steps = 1  # what the command line asks for by default
    init_noise_sigma = 1.0
    takes = frozenset({"flow"})

    @refusing
    @register_to_config
    def __init__(
        self,
        num_train_timesteps: int = 1000,
        beta_start: float = 0.0001,
        beta_end: float = 0.02,
        beta_schedule: str = "linear",
        trained_betas: np.ndarray | list[float] | None = None,
        rescale_betas_zero_snr: bool = False,
        prediction_type: str = "epsilon",
        generator_timestep: int | None = None,
        timestep_spacing: str = "leading",
        steps_offset: int = 0,
        set_alpha_to_one: bool = True,
        clip_sample: bool = False,
    ):
        check_choice("prediction_type", prediction_type, (*PREDICTIONS, FLOW))
        if prediction_type == FLOW:
            self.sigmas = torch.arange(num_train_timesteps + 1, dtype=torch.float64) / num_train_timesteps
            self.alphas = 1 - self.sigmas
        else:
            betas = discrete_betas(num_train_timesteps, beta_start, beta_end, beta_schedule, trained_betas)
            betas = zero_terminal_snr(betas) if rescale_betas_zero_snr else betas
            self.betas = torch.from_numpy(betas).float()
            cumulative = torch.from_numpy(np.cumprod(1 - betas))
            self.alphas_cumprod, self.alphas, self.sigmas = (
                cumulative.float(),
                cumulative.sqrt(),
                (1 - cumulative).sqrt(),
            )
        a = self.shares()
        t = nearest_timestep(a, GENERATOR_SIGMA) if generator_timestep is None else generator_timestep
        if not 0 <= t < len(a):
            raise UserError(f"generator_timestep must be from 0 to {len(a) - 1}, not {t}.")
        if a[t] < 1e-6:
            raise UserError(f"at timestep {t} nothing but noise is left; choose a lower generator_timestep.")
        fixed = {
            "generator_timestep": int(t),
            "timestep_spacing": "leading",
            "steps_offset": int(t),
            "set_alpha_to_one": True,
            "clip_sample": False,
        }
        # What stands here as a default, from_config of another class would replace by its own.
        defaults = [name for name in self.config.get("_use_default_values", ()) if name not in fixed]
        self.register_to_config(**fixed, _use_default_values=defaults)
        self._alpha, self._sigma = float(self.alphas[t]), float(self.sigmas[t])
        self._scale = (self._alpha**2 + self._sigma**2) ** 0.5
        self.num_inference_steps = None
        self.timesteps = torch.tensor([int(t)])

    def set_timesteps(self, num_inference_steps: int, device: str | torch.device | None = None) -> None:
        """`timesteps` becomes the one timestep, on the device. Raises UserError unless one step is asked for."""
        num_inference_steps = number_of(num_inference_steps)
        if num_inference_steps != 1:
            raise UserError(
                f"this model was distilled to one step; ask for num_inference_steps=1 (--steps 1), not "
                f"{num_inference_steps}."
            )
        self.num_inference_steps = 1
        self.timesteps = torch.tensor([self.config.generator_timestep], device=device)

    def shares(self) -> np.ndarray:
        """alpha^2 / (alpha^2 + sigma^2) at whole times, float64 [T]: alpha_bar, of a flow what stands for it."""
        return (self.alphas.square() / (self.alphas.square() + self.sigmas.square())).numpy()

    def scale_model_input(self, sample: torch.Tensor, *args, **kwargs) -> torch.Tensor:
        """Unit noise as the network was trained to see it at that time: of models with alpha_bar as it is."""
        return sample if self.config.prediction_type != FLOW else sample * self._scale

    def step(
        self,
        model_output: torch.Tensor,
        timestep: int | torch.Tensor,
        sample: torch.Tensor,
        return_dict: bool = True,
        generator: torch.Generator | None = None,
    ) -> DDIMSchedulerOutput | tuple:
        """Noise [B, ...] and the network's answer to it: clean data, in the noise's dtype (float32 inside).

        A learned variance behind the prediction (twice the channels) is left out.

        Args:
            timestep, generator: not used; there is one timestep, and no noise is added.
        """
        model_output = without_variance(model_output, sample)
        dtype = torch.promote_types(sample.dtype, torch.float32)
        x = self._scale * sample.to(dtype)
        noise = noise_in(model_output.to(dtype), x, self._alpha, self._sigma, self.config.prediction_type)
        x0 = ((x - self._sigma * noise) / self._alpha).to(sample.dtype)
        return DDIMSchedulerOutput(prev_sample=x0, pred_original_sample=x0) if return_dict else (x0,)

    def __len__(self) -> int:
        return self.config.num_train_timesteps


def nearest_timestep(alphas_cumprod: np.ndarray, sigma: float) -> int:
    """The timestep whose sigma / alpha is nearest, in its logarithm, to `sigma`; of a flow, from `shares`."""
    a = np.clip(alphas_cumprod, 1e-12, 1 - 1e-12)
    return int(np.abs(np.log((1 - a) / a) / 2 - np.log(sigma)).argmin())
