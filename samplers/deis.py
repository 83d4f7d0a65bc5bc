"""DEIS as a diffusers scheduler: few-step solvers of the probability-flow ODE of epsilon, v, sample and flow models.

"Fast Sampling of Diffusion Models with Exponential Integrator", Zhang & Chen, arXiv:2204.13902. With
rho = sqrt((1 - a) / a) and v = x / sqrt(a), a = alpha_bar, the ODE is dv / drho = epsilon; one evaluation moves

    x' = sqrt(a') (x / sqrt(a) + sum_j w_j eps_j)

with weights w_j fixed by the grid of timesteps alone: they are worked out once, in set_timesteps. Flow-matching
models take alpha = 1 - s for sqrt(a) and s for sqrt(1 - a), with s the noise level from 1 to 0, and the forms of
maths/velocities.py, which are finite at s = 1; EDM's take 1 and sigma.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from diffusers import ConfigMixin, DDIMScheduler, SchedulerMixin
from diffusers.configuration_utils import register_to_config
from diffusers.schedulers.scheduling_utils import KarrasDiffusionSchedulers, SchedulerOutput

from ..errors import UserError
from .answers import said
from .choices import choose
from .configs import TakesConfigs, refusing
from .maths.coefficients import RUNGE_KUTTA
from .maths.outputs import without_variance
from .memory import Remembering, state_for
from .noising import Noising
from .plan import asked, before_any_steps, noise_schedule, plan
from .starts import Beginning, inside
from .translation import in_our_words, left_open


class DEISScheduler(TakesConfigs, Noising, Remembering, Beginning, SchedulerMixin, ConfigMixin):
    """Exponential-integrator solvers for diffusion models with alpha_bar, flow-matching models and EDM's.

    `DEISScheduler.from_config(pipe.scheduler.config)` fits any diffusers pipeline of such a model.
    From the config of diffusers' DEISMultistepScheduler it makes that sampler again: log_rho with its solver_order
    and its timesteps (unless `solver` is given). A step whose weights would cancel one another, and so blow up the
    errors of a model, takes a lower degree.

    Image to image: a pipeline's `strength` picks a place in the list of timesteps; so 0.5 is half of the schedule
    only where these are even. Take timestep_grid="linear" (the default of "ipndm"), "linspace", "leading" or
    "trailing". A base and a refiner (denoising_end, denoising_start) may part at any timestep, with "rho_rk" only
    where one of its steps starts.

    Args:
        num_train_timesteps, beta_start, beta_end, beta_schedule, trained_betas, prediction_type, steps_offset,
            rescale_betas_zero_snr: as in diffusers. beta_schedule "continuous" is the VP-SDE with beta_start and
            beta_end at t = 0 and 1 (0.1 and 20, say); the model is then called with t in [0.001, 1].
            prediction_type "flow_prediction" is flow matching, which has no betas.
        solver: "t_ab" (tAB-DEIS), "ipndm" (Adams-Bashforth weights for even steps; the best in full precision at
            few steps, but its weights amplify the error of a quantized model), "rho_ab", "log_rho" (diffusers'
            DEIS) or "rho_rk" (Runge-Kutta in rho, several evaluations a step).
        order: degree of the polynomial, 0 (DDIM) to 3; "rho_rk" has its own. None: the solver's best, see
            choices.py; for "log_rho" solver_order - 1.
        rk_method: "1euler", "2heun", "3kutta", "3heun", "3ral" or "4rk"; "rho_rk" only. A last step to clean data can
            have no stage at its end: it is Euler's with an EDM model and final_denoise, and of a flow with "2heun";
            "3kutta" and "4rk" have the stages of "3heun" there, so that they keep their order.
        timestep_grid: "linear", "quad", "cubic" (even in t^(1/k)), "log" (even in log rho), "edm" (even in
            rho^(1/7)), "beta", "linspace", "leading", "trailing" (diffusers'). None: "edm", "log" or "beta" where
            diffusers' use_karras_sigmas, use_exponential_sigmas or use_beta_sigmas is set, else the solver's best.
            "diffusers", for "log_rho": what diffusers' DEIS makes of timestep_spacing and of these three.
            Of a flow: "linear" (None), "quad" or "cubic" before the model's shift, which also take the place of even
            sigmas that a pipeline passes; "log", "edm" or "beta" after it; "diffusers": as its Euler.
        integrand: of a flow, what the polynomials are of: "epsilon" (DEIS, in rho) or "velocity" (the model's output,
            in s: then "t_ab" and "rho_ab" are Adams-Bashforth, "rho_rk" is Runge-Kutta on the flow's own ODE).
            None: the solver's best, see choices.py.
        corrector: do each step again with the evaluation at its end, at no further call of the model, by a polynomial
            of one degree more (UniPC's idea, maths/corrector.py). None: of a flow's velocities with "t_ab" and an
            order above 0, and nowhere else.
        final_denoise: the last step ends at clean data (rho = 0) instead of the last time of the grid (t = 0, where
            sigma is 0.01 in DDPM's schedule). Either costs the same evaluations. Off, as in the DEIS authors' code
            and diffusers' DEIS: feature-FID is then a little lower in nearly every row of the README's tables. A flow
            always ends at clean data.
        thresholding, dynamic_thresholding_ratio, sample_max_value: dynamic thresholding of the predicted x_0, for
            guided pixel-space models, as in diffusers.
        lower_order_final: "log_rho" only: order 0 in the last step and 1 in the one before, when there are fewer
            than 15, as in diffusers.
        solver_order: diffusers' name for order + 1; read by "log_rho" when `order` is None.
        timestep_spacing: read by timestep_grid "diffusers" alone.
        algorithm_type, solver_type: have one value each, as in diffusers' DEIS, whose configs carry them.
        shift, use_dynamic_shifting, base_shift, max_shift, base_image_seq_len, max_image_seq_len, shift_terminal,
            time_shift_type, invert_sigmas: of flow matching, as in diffusers' FlowMatchEulerDiscreteScheduler;
            stochastic_sampling, new noise after each step, is refused.
        sigma_data, sigma_min, sigma_max, sigma_schedule, rho, final_sigmas_type: of EDM's preconditioned models, as
            in diffusers' EDMEulerScheduler; sigma_data is what makes a config one of theirs.

    Raises:
        UserError: a choice that does not exist; the config of a model that these solvers cannot sample, or one
            distilled to a few steps; epsilon prediction where the last timestep is pure noise (zero terminal SNR).
    """

    takes = frozenset({"flow", "edm"})
    _compatibles = [e.name for e in KarrasDiffusionSchedulers]
    _threshold_sample = DDIMScheduler._threshold_sample

    @refusing
    @register_to_config
    def __init__(
        self,
        num_train_timesteps: int = 1000,
        beta_start: float = 0.0001,
        beta_end: float = 0.02,
        beta_schedule: str = "linear",
        trained_betas: np.ndarray | list[float] | None = None,
        prediction_type: str = "epsilon",
        solver: str = "t_ab",
        order: int | None = None,
        rk_method: str = "3heun",
        timestep_grid: str | None = None,
        final_denoise: bool = False,
        thresholding: bool = False,
        dynamic_thresholding_ratio: float = 0.995,
        sample_max_value: float = 1.0,
        lower_order_final: bool = True,
        solver_order: int = 2,
        algorithm_type: str = "deis",
        solver_type: str = "logrho",
        use_karras_sigmas: bool = False,
        use_exponential_sigmas: bool = False,
        use_beta_sigmas: bool = False,
        steps_offset: int = 0,
        rescale_betas_zero_snr: bool = False,
        timestep_spacing: str = "linspace",
        integrand: str | None = None,
        shift: float | None = None,
        use_dynamic_shifting: bool = False,
        base_shift: float | None = None,
        max_shift: float | None = None,
        base_image_seq_len: int | None = None,
        max_image_seq_len: int | None = None,
        invert_sigmas: bool = False,
        shift_terminal: float | None = None,
        time_shift_type: str = "exponential",
        stochastic_sampling: bool = False,
        sigma_data: float | None = None,
        sigma_min: float | None = None,
        sigma_max: float | None = None,
        sigma_schedule: str | None = None,
        rho: float | None = None,
        final_sigmas_type: str = "zero",
        corrector: bool | None = None,
    ):
        # Another scheduler's names for its algorithm may have come in.
        self.register_to_config(algorithm_type="deis", solver_type="logrho", **left_open(self.config))
        self._choice = choose(self.config)
        self.schedule, betas = noise_schedule(self.config)
        if len(betas):  # flows and EDM's models have none
            self.betas = torch.from_numpy(betas).float()
            self.alphas_cumprod = torch.from_numpy(np.cumprod(1 - betas)).float()
        self.num_inference_steps: int | None = None
        self.timesteps, self.sigmas = before_any_steps(self.config, self.schedule)
        self.init_noise_sigma = 1.0 if sigma_data is None else (self.config.sigma_max**2 + 1) ** 0.5
        self._own_timesteps, self._evaluations, self._times = self.timesteps, [], []
        self._num_discrete = num_train_timesteps if self.schedule.discrete else 0
        self._begin_index: int | None = None
        self._forget()

    @classmethod
    def _translated(cls, config: dict, kwargs: dict) -> dict:
        return in_our_words(config, kwargs)

    @property
    def order(self) -> int:
        """Evaluations per step, as diffusers pipelines count them."""
        return len(RUNGE_KUTTA[self.config.rk_method][0]) if self.config.solver == "rho_rk" else 1

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: str | torch.device | None = None,
        sigmas: Sequence[float] | None = None,
        mu: float | None = None,
        timesteps: Sequence[float] | None = None,
    ) -> None:
        """Choose the timesteps and work out all coefficients.

        `timesteps` then has one entry per evaluation: num_inference_steps of them, and for "rho_rk" as many for
        each of its stages (some between whole timesteps, so they are float64). Those of a flow-matching model are
        num_train_timesteps times the noise levels, which `sigmas` has with the last one reached: one for each
        evaluation, and the end.

        Args:
            num_inference_steps: may be left out where sigmas or timesteps say how many.
            sigmas: decreasing noise levels of a flow (from 1 at most; its shift is applied to them, as in diffusers)
                or of an EDM model; the last step, to clean data, is added.
            mu: the shift of a flow with use_dynamic_shifting, which its pipeline works out; else it is not read.
            timesteps: decreasing times at which the model is called, instead of a grid: whole ones of a model with
                alpha_bar. Of a flow they stand for the levels t / num_train_timesteps, and no shift is applied;
                beside sigmas they are only what the model is told.

        Raises:
            UserError: no steps, more than the schedule has timesteps, or sigmas or timesteps that do not fit.
        """
        request = asked(num_inference_steps, sigmas, mu, timesteps)
        planned = plan(self.config, self._choice, self.schedule, request)
        counted = self.schedule.discrete and self.config.solver != "rho_rk"
        kind = torch.int64 if counted else torch.float64 if planned.sigmas is None else torch.float32
        self.timesteps = torch.tensor(planned.times, dtype=kind)
        self._times, self._evaluations = self.timesteps.tolist(), planned.evaluations
        self.timesteps = self._own_timesteps = self.timesteps.to(device)  # a caller may put a slice in its place
        if planned.sigmas is not None:
            self.sigmas = torch.tensor(planned.sigmas, dtype=torch.float32, device=device)
        self.num_inference_steps = request.steps
        self._begin_index = None
        self._forget()

    def step(
        self,
        model_output: torch.Tensor,
        timestep: int | float | torch.Tensor,
        sample: torch.Tensor,
        return_dict: bool = True,
        generator: torch.Generator | None = None,
        per_token_timesteps: torch.Tensor | None = None,
    ) -> SchedulerOutput | tuple:
        """Move the sample to the next time of the grid.

        Args:
            model_output: the model's prediction at (sample, timestep), shape of `sample`, or with a learned variance
                behind it (twice the channels), which is left out.
            timestep: an entry of `timesteps`, best as it stands there: it is then recognised without reading it
                back from the device.
            sample: x_t, any shape; computed in float32 at least, returned in its own dtype.
            generator: not used, no noise is added; DDPMPipeline gives one to every scheduler.
            per_token_timesteps: must be None; some video pipelines move parts of a sample at other times.

        Earlier evaluations are remembered with the tensor that was returned, so that several generations, in turn
        or interleaved, do not disturb each other; where a pipeline hands back another tensor, the latest are used.

        Raises:
            UserError: set_timesteps has not been called, a Runge-Kutta step is entered in its middle, or the model's
                output does not fit the sample.
        """
        if not self._evaluations:
            raise UserError("call set_timesteps(num_inference_steps) before the first step.")
        if per_token_timesteps is not None:
            raise UserError(
                "DEISScheduler moves all parts of a sample at one time: keep the pipeline's own scheduler."
            )
        model_output = without_variance(model_output, sample)
        index, state = self._state_for(timestep, sample)
        evaluation = self._evaluations[index]
        dtype = torch.promote_types(sample.dtype, torch.float32)
        x = sample.to(dtype)
        threshold = self._threshold_sample if self.config.thresholding else None
        now, kept = said(self.config, self._choice.integrand, model_output.to(dtype), x, evaluation, threshold)
        past = state.history if state else ()
        if evaluation.starts:
            base = x
        elif state is not None and state.base is not None:
            base = state.base
        else:
            raise UserError(inside(index, self._times, self._evaluations, self._num_discrete))
        result = evaluation.moved(base, now, past).to(sample.dtype)
        self._latest, following = None, index + 1
        if following < len(self._evaluations):
            state = state_for(self._evaluations[following], following, sample, model_output, base, (kept, *past))
            self._latest = self._states[result] = state
        return SchedulerOutput(prev_sample=result) if return_dict else (result,)

    def __len__(self) -> int:
        return self.config.num_train_timesteps
