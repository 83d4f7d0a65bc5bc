"""DEIS as a diffusers scheduler: few-step solvers of the probability-flow ODE for any epsilon, v or sample model.

"Fast Sampling of Diffusion Models with Exponential Integrator", Zhang & Chen, arXiv:2204.13902. With
rho = sqrt((1 - a) / a) and v = x / sqrt(a), a = alpha_bar, the ODE is dv / drho = epsilon; one evaluation moves

    x' = sqrt(a') (x / sqrt(a) + sum_j w_j eps_j)

with weights w_j fixed by the grid of timesteps alone: they are worked out once, in set_timesteps.
"""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass

import numpy as np
import torch
from diffusers import ConfigMixin, DDIMScheduler, DEISMultistepScheduler, SchedulerMixin
from diffusers.configuration_utils import register_to_config
from diffusers.schedulers.scheduling_utils import KarrasDiffusionSchedulers, SchedulerOutput
from torch.utils.weak import WeakTensorKeyDictionary

from ..errors import UserError
from .configs import BLIND, TakesConfigs, check_choice, class_of, refusing
from .maths.coefficients import RUNGE_KUTTA, log_rho_weights, multistep_weights, steady
from .maths.evaluations import Evaluation, multistep, runge_kutta
from .maths.grids import EVEN_IN_NOISE, GRIDS, SPACINGS, make_grid
from .maths.outputs import without_variance
from .maths.schedule import ContinuousVP, DiscreteVP, discrete_betas, ends_in_noise, rho_of, zero_terminal_snr
from .maths.timesteps import own_index

# Order and grid of each solver where the user names none: the best of the README's tables.
DEFAULTS = {
    "t_ab": (3, "quad"),
    "ipndm": (2, "linear"),
    "rho_ab": (2, "quad"),
    "log_rho": (1, "edm"),
    "rho_rk": (None, "edm"),
}
PREDICTIONS = ("epsilon", "v_prediction", "sample")
DIFFUSERS = "diffusers"  # the timestep_grid of diffusers' DEIS, by its own names
# How many times |sum w| the sum of |w| may be in a step, before its degree is lowered. An order that the user names
# is kept up to 24: diffusers' DEIS is below, and what is above multiplies errors of epsilon by hundreds. A solver's
# best order was found on its best grid; on grids that use_karras_sigmas and the like bring in, what is above 3
# (degree 3, and most of degree 2) wins less than errors of 2 % in epsilon take away.
CANCELS, CANCELS_UNASKED = 24.0, 3.0


@dataclass(frozen=True)
class _State:
    """Memory of earlier evaluations that the next one needs, in tensors that no caller can write to."""

    index: int
    shape: torch.Size
    base: torch.Tensor | None  # where its step began, if before it
    history: tuple[torch.Tensor, ...]


class _States(WeakTensorKeyDictionary):
    """States by the sample that was returned, as long as it lives; not part of a pickled scheduler."""

    def __reduce__(self):
        return _States, ()


class DEISScheduler(TakesConfigs, SchedulerMixin, ConfigMixin):
    """Exponential-integrator solvers for variance-preserving diffusion models.

    `DEISScheduler.from_config(pipe.scheduler.config)` fits any diffusers pipeline of an epsilon, v or sample model.
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
        solver: "t_ab" (tAB-DEIS), "ipndm" (Adams-Bashforth weights for even steps; the best in full precision at
            few steps, but its weights amplify the error of a quantized model), "rho_ab", "log_rho" (diffusers'
            DEIS) or "rho_rk" (Runge-Kutta in rho, several evaluations a step).
        order: degree of the polynomial, 0 (DDIM) to 3; "rho_rk" has its own. None: the solver's best, see DEFAULTS;
            for "log_rho" solver_order - 1.
        rk_method: "1euler", "2heun", "3kutta", "3heun", "3ral" or "4rk"; "rho_rk" only.
        timestep_grid: "linear", "quad", "cubic" (even in t^(1/k)), "log" (even in log rho), "edm" (even in
            rho^(1/7)), "beta", "linspace", "leading", "trailing" (diffusers'). None: "edm", "log" or "beta" where
            diffusers' use_karras_sigmas, use_exponential_sigmas or use_beta_sigmas is set, else the solver's best.
            "diffusers", for "log_rho": what diffusers' DEIS makes of timestep_spacing and of these three.
        final_denoise: the last step ends at clean data (rho = 0) instead of the last time of the grid (t = 0, where
            sigma is 0.01 in DDPM's schedule). Either costs the same evaluations. Off, as in the DEIS authors' code
            and diffusers' DEIS: feature-FID is then a little lower in nearly every row of the README's tables.
        thresholding, dynamic_thresholding_ratio, sample_max_value: dynamic thresholding of the predicted x_0, for
            guided pixel-space models, as in diffusers.
        lower_order_final: "log_rho" only: order 0 in the last step and 1 in the one before, when there are fewer
            than 15, as in diffusers.
        solver_order: diffusers' name for order + 1; read by "log_rho" when `order` is None.
        timestep_spacing: read by timestep_grid "diffusers" alone.
        algorithm_type, solver_type: have one value each, as in diffusers' DEIS, whose configs carry them.

    Raises:
        UserError: a choice that does not exist; the config of a model without alpha_bar (flow matching, EDM, ...), or
            distilled to a few steps; epsilon prediction where the last timestep is pure noise (zero terminal SNR).
    """

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
    ):
        check_choice("solver", solver, tuple(DEFAULTS))
        check_choice("prediction_type", prediction_type, PREDICTIONS)
        check_choice("rk_method", rk_method, tuple(RUNGE_KUTTA))
        if timestep_grid is not None:
            check_choice("timestep_grid", timestep_grid, (*GRIDS, DIFFUSERS))
        if order is not None:
            check_choice("order", order, (0, 1, 2, 3))
        if timestep_grid == DIFFUSERS:
            check_choice("timestep_spacing", timestep_spacing, SPACINGS)
            if solver != "log_rho" or beta_schedule == "continuous":
                raise UserError("timestep_grid 'diffusers' goes with solver 'log_rho' on discrete timesteps.")
        self.register_to_config(algorithm_type="deis", solver_type="logrho")  # another scheduler's may have come in
        named = {"edm": use_karras_sigmas, "log": use_exponential_sigmas, "beta": use_beta_sigmas}
        asked = [grid for grid, flag in named.items() if flag]
        if solver == "log_rho" and order is None:
            check_choice("solver_order", solver_order, (1, 2, 3, 4))
        if len(asked) > 1:
            raise UserError("use_karras_sigmas, use_exponential_sigmas and use_beta_sigmas exclude each other.")
        best_order, best_grid = DEFAULTS[solver]
        self._grid = timestep_grid or (asked or [best_grid])[0]
        self._order = order if order is not None else solver_order - 1 if solver == "log_rho" else best_order
        # ipndm's weights are the same on all grids.
        unasked = order is None and solver != "ipndm" and self._grid in EVEN_IN_NOISE and self._grid != best_grid
        self._cancels = CANCELS_UNASKED if unasked else CANCELS
        if beta_schedule == "continuous":
            self.schedule = ContinuousVP(beta_start, beta_end)
            a = self.schedule.alpha_bar(np.linspace(0, 1, num_train_timesteps + 1))
            betas = 1 - a[1:] / a[:-1]
        else:
            betas = discrete_betas(num_train_timesteps, beta_start, beta_end, beta_schedule, trained_betas)
            betas = zero_terminal_snr(betas) if rescale_betas_zero_snr else betas
            if prediction_type == "epsilon" and ends_in_noise(betas):
                raise UserError(BLIND)
            self.schedule = DiscreteVP(np.cumprod(1 - betas))
        self.betas = torch.from_numpy(betas).float()
        self.alphas_cumprod = torch.from_numpy(np.cumprod(1 - betas)).float()
        self.init_noise_sigma = 1.0
        self.num_inference_steps = None
        self.timesteps = torch.arange(num_train_timesteps - 1, -1, -1)
        self._evaluations: list[Evaluation] = []
        self._begin_index = None
        self._forget()

    @classmethod
    def _translated(cls, config: dict, kwargs: dict) -> dict:
        """A config of diffusers' DEIS stands for its solver and its timesteps, too."""
        if class_of(config) != "DEISMultistepScheduler" or "solver" in kwargs:
            return kwargs
        order = min(kwargs.get("solver_order", config.get("solver_order", 2)), 3) - 1  # it has no solver above 3
        return {"solver": "log_rho", "order": order, "timestep_grid": DIFFUSERS, **kwargs}

    # ---------------------------------------------------------------------------------------------- grid

    @property
    def order(self) -> int:
        """Evaluations per step, as diffusers pipelines count them."""
        return len(RUNGE_KUTTA[self.config.rk_method][0]) if self.config.solver == "rho_rk" else 1

    def set_timesteps(self, num_inference_steps: int, device: str | torch.device | None = None) -> None:
        """Choose the timesteps and work out all coefficients.

        `timesteps` then has one entry per evaluation: num_inference_steps of them, and for "rho_rk" as many for
        each of its stages (some between whole timesteps, so they are float64).
        """
        config, steps = self.config, int(num_inference_steps)
        theirs = self._grid == DIFFUSERS
        grid = make_grid(self.schedule, config.timestep_spacing if theirs else self._grid, steps, config.steps_offset)
        rho = rho_of(self.schedule, grid)
        if theirs:
            grid, rho = self._grid_of_diffusers(steps) or (grid, rho)
        if config.final_denoise:
            rho[-1] = 0.0
        if config.solver == "rho_rk":
            times, self._evaluations = runge_kutta(config.rk_method, self.schedule, grid, rho)
        else:
            if theirs:
                table = log_rho_weights(rho, self._order)
            else:
                weights = multistep_weights(config.solver, self.schedule, grid[:-1], rho[-1], self._order)
                table = steady(weights, self._cancels)
            early = config.solver == "log_rho" and config.lower_order_final and len(grid) <= 15
            times, self._evaluations = grid[:-1], multistep(table, rho, early)
        whole = self.schedule.discrete and config.solver != "rho_rk"
        self.timesteps = torch.tensor(times, dtype=torch.int64 if whole else torch.float64).to(device)
        self._own_timesteps = self.timesteps  # a caller may put a slice in its place
        self._times = [float(t) for t in times]
        self.num_inference_steps = num_inference_steps
        self._begin_index = None
        self._forget()

    def _grid_of_diffusers(self, steps: int) -> tuple[np.ndarray, np.ndarray] | None:
        """(times, rho) [steps + 1] of diffusers' DEIS, which calls the model at whole times beside its sigmas.

        None where it would stand still between two evaluations: asked for as many steps as there are timesteps.
        """
        names = ("num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "trained_betas", "steps_offset")
        names += ("timestep_spacing", "use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas")
        theirs = DEISMultistepScheduler(**{name: self.config[name] for name in names})
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # it gives tensors to numpy's functions
            theirs.set_timesteps(steps)
        times, sigmas = theirs.timesteps.double().numpy(), theirs.sigmas.double().numpy()
        rho = np.append(sigmas[:steps], sigmas[-1])  # by rounding, "trailing" can have one too many
        return (np.append(times[:steps], 0.0), rho) if (np.diff(rho[:-1]) < 0).all() else None

    # ---------------------------------------------------------------------------------------------- step

    def step(
        self,
        model_output: torch.Tensor,
        timestep: int | float | torch.Tensor,
        sample: torch.Tensor,
        return_dict: bool = True,
        generator: torch.Generator | None = None,
    ) -> SchedulerOutput | tuple:
        """Move the sample to the next time of the grid.

        Args:
            model_output: the model's prediction at (sample, timestep), shape of `sample`, or with a learned variance
                behind it (twice the channels), which is left out.
            timestep: an entry of `timesteps`, best as it stands there: it is then recognised without reading it
                back from the device.
            sample: x_t, any shape; computed in float32 at least, returned in its own dtype.
            generator: not used, no noise is added; DDPMPipeline gives one to every scheduler.

        Earlier evaluations are remembered with the tensor that was returned, so that several generations, in turn
        or interleaved, do not disturb each other; where a pipeline hands back another tensor, the latest are used.

        Raises:
            UserError: set_timesteps has not been called, a Runge-Kutta step is entered in its middle, or the model's
                output does not fit the sample.
        """
        if not self._evaluations:
            raise UserError("call set_timesteps(num_inference_steps) before the first step.")
        model_output = without_variance(model_output, sample)
        index, state = self._state_for(timestep, sample)
        evaluation = self._evaluations[index]
        dtype = torch.promote_types(sample.dtype, torch.float32)
        x = sample.to(dtype)
        history = (self._epsilon(model_output.to(dtype), x, evaluation), *(state.history if state else ()))
        if evaluation.starts:
            base = x
        elif state is not None and state.base is not None:
            base = state.base
        else:
            raise UserError(self._inside(index))
        result = _advance(evaluation, base, history).to(sample.dtype)
        self._remember(result, index + 1, sample, model_output, base, history)
        return SchedulerOutput(prev_sample=result) if return_dict else (result,)

    def _state_for(self, timestep: int | float | torch.Tensor, sample: torch.Tensor) -> tuple[int, _State | None]:
        """(index of the evaluation at `timestep`, the state that led to it: of this sample or the latest, if any)."""
        state = self._states.get(sample, self._latest)
        if state is not None and state.shape != sample.shape:
            state = None
        index = self._index(timestep, state)
        return index, state if state is not None and state.index == index else None

    def _remember(self, result: torch.Tensor, index: int, sample, model_output, base, history) -> None:
        """Keep with `result` what evaluation `index`, its next, needs of this one; nothing after the last."""
        self._latest = None
        if index == len(self._evaluations):
            return
        following = self._evaluations[index]
        past = history[: len(following.weights[-1]) - 1]
        # The caller may write the next sample and output over these two (static buffers of a CUDA graph).
        if past and past[0] is model_output:
            past = (model_output.clone(), *past[1:])
        if following.starts:
            base = None
        elif base is sample:
            base = base.clone()
        self._latest = self._states[result] = _State(index, sample.shape, base, past)

    def _index(self, timestep: int | float | torch.Tensor, state: _State | None) -> int:
        """Index of the evaluation that a timestep belongs to; never reads a timestep of ours from the device.

        A time that is not in the grid belongs to the nearest one that is; of two equal ones, a step begins at it.
        """
        index = own_index(timestep, self._own_timesteps)
        if index is not None:
            return index
        if isinstance(timestep, torch.Tensor) and timestep.device.type != "cpu" and state is not None:
            return state.index
        if state is None and self._begin_index is not None:
            return self._begin_index
        value = float(timestep)
        if state is not None and self._times[state.index] == value:
            return state.index
        return min(
            range(len(self._times)), key=lambda i: (abs(self._times[i] - value), not self._evaluations[i].starts)
        )

    def _epsilon(self, output: torch.Tensor, x: torch.Tensor, at: Evaluation) -> torch.Tensor:
        """The noise that the model predicts, whatever it was trained to predict."""
        if self.config.prediction_type == "v_prediction":
            output = at.alpha * output + at.sigma * x
        elif self.config.prediction_type == "sample":
            output = (x - at.alpha * output) / at.sigma
        if self.config.thresholding:
            x0 = self._threshold_sample((x - at.sigma * output) / at.alpha)
            output = (x - at.alpha * x0) / at.sigma
        return output

    def _forget(self) -> None:
        self._states, self._latest = _States(), None

    # ---------------------------------------------------------------------------- the rest of the interface

    @property
    def begin_index(self) -> int | None:
        return self._begin_index

    def set_begin_index(self, begin_index: int = 0) -> None:
        """Where in `timesteps` the first step will be, for pipelines that start in the middle (img2img).

        It counts only where a timestep is not an entry of `timesteps` itself, which tells its own place. A warning
        says so where the timestep there is not the one that `strength` means to diffusers.

        Raises:
            UserError: nothing is left to sample there, or it is inside a Runge-Kutta step.
        """
        number = len(self._evaluations)
        if number and begin_index == number:
            steps = number // self.order
            raise UserError(
                f"nothing is left to sample: with {steps} steps a strength must be "
                f"{math.ceil(100 / steps) / 100:g} or more; ask for more of it, or for more steps."
            )
        if not isinstance(begin_index, int) or not 0 <= begin_index < max(1, number):
            raise UserError(f"begin_index must be from 0 to {number - 1}; got {begin_index!r}.")
        if number and not self._evaluations[begin_index].starts:
            raise UserError(self._inside(begin_index))
        if begin_index:
            self._compare_with_strength(begin_index)
        self._begin_index = begin_index

    def _compare_with_strength(self, begin_index: int) -> None:
        strength, first = 1 - begin_index / len(self._times), self._times[begin_index] / self.schedule.first
        if abs(first - strength) > 0.05:
            warnings.warn(
                f"the timesteps of grid '{self._grid}' from number {begin_index} on begin at {first:.0%} of the "
                f"schedule; where this is a strength of {strength:.2g}, take timestep_grid='linear' to begin at "
                f"{strength:.0%} as with diffusers' samplers.",
                stacklevel=3,
            )

    def _inside(self, index: int) -> str:
        """Why nothing can begin at an evaluation in the middle of a Runge-Kutta step, and where it could."""
        places = []
        for i in range(1, len(self._times)):
            cut = math.floor(self._times[i]) + 1  # base: t >= cut; refiner: t < cut
            if self._evaluations[i].starts and cut <= self._times[i - 1]:
                places.append((abs(i - index), 1 - cut / self.config.num_train_timesteps))
        near = f"let base and refiner part at {min(places)[1]:.3g}" if places and self.schedule.discrete else ""
        return (
            f"timestep {self._times[index]:g} is inside a Runge-Kutta step, where none can begin: "
            f"{near}{', or ' if near else ''}take a solver with one evaluation a step, such as 't_ab'."
        )

    def scale_model_input(self, sample: torch.Tensor, *args, **kwargs) -> torch.Tensor:
        """The sample itself: variance-preserving models take it unscaled."""
        return sample

    def add_noise(self, original_samples: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        """sqrt(a) x_0 + sqrt(1 - a) n at timesteps [B]; shape and dtype of original_samples."""
        alpha, sigma = self._alpha_sigma(timesteps, original_samples)
        return alpha * original_samples + sigma * noise

    def get_velocity(self, sample: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        """The target of v-prediction, sqrt(a) n - sqrt(1 - a) x_0, at timesteps [B]."""
        alpha, sigma = self._alpha_sigma(timesteps, sample)
        return alpha * noise - sigma * sample

    def _alpha_sigma(self, timesteps: torch.Tensor, like: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        a = torch.from_numpy(self.schedule.alpha_bar(timesteps.double().cpu().numpy())).to(like.device)
        a = a.reshape(-1, *[1] * (like.ndim - 1))
        return a.sqrt().to(like.dtype), (1 - a).sqrt().to(like.dtype)

    def __len__(self) -> int:
        return self.config.num_train_timesteps


def _advance(evaluation: Evaluation, base: torch.Tensor, history: tuple[torch.Tensor, ...]) -> torch.Tensor:
    """scale * base + sum of w_j eps_j; the latest noise prediction comes first in `history`."""
    weights = evaluation.weights[min(len(history), len(evaluation.weights)) - 1]
    result = base * evaluation.scale
    for weight, eps in zip(weights, history, strict=False):
        result.add_(eps, alpha=weight)
    return result
