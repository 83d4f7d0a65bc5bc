"""Which schedulers' configs these samplers take: those of models trained on x_t = sqrt(a) x_0 + sqrt(1 - a) n.

diffusers makes any scheduler from any config: it drops the fields that a class does not know, and takes defaults for
those that it misses. From the config of a flow-matching model comes a schedule that the model never saw, and noise.
So a config is looked at as a whole, before fields are dropped: by the class that wrote it, and by its fields.
"""

from __future__ import annotations

import functools
import inspect
import os
import re
from collections.abc import Callable, Mapping

import diffusers

from ..errors import UserError

KEEP = "keep the pipeline's own scheduler"

# What a model is trained for, and what to sample it with instead.
KINDS = {
    "flow": (
        "flow matching, which has no alpha_bar",
        f"{KEEP}, or take diffusers' UniPCMultistepScheduler or DPMSolverMultistepScheduler with "
        "use_flow_sigmas=True and prediction_type='flow_prediction'",
    ),
    "edm": (
        "EDM's preconditioned models, which have noise levels and no alpha_bar",
        f"{KEEP}, or take diffusers' EDMDPMSolverMultistepScheduler",
    ),
    "trigflow": ("TrigFlow models, which have no alpha_bar", KEEP),
    "consistency": (
        "models distilled to a few steps, which jump to the end from wherever they are",
        f"{KEEP}; where the distilled weights are no longer loaded, give the config of the model's first scheduler",
    ),
    "unclip": ("unCLIP, whose pipelines name each step's end to the scheduler", KEEP),
    "shifted": ("a noise schedule with a shifted signal-to-noise ratio (snr_shift_scale)", KEEP),
    "continuous": ("models that are called with log sigma / 4 for a timestep", KEEP),
    "exploding": ("variance-exploding models, which have noise levels and no alpha_bar", KEEP),
    "vp-sde": (
        "the continuous VP-SDE",
        f"{KEEP}, or for a model that is called with t from 0 to 1 take DEISScheduler(beta_schedule='continuous', "
        "beta_start=beta_min, beta_end=beta_max)",
    ),
    "ratios": ("Wuerstchen's continuous cosine schedule", KEEP),
    "sine": ("a schedule of sines with times between 0 and 1", KEEP),
    "repaint": (
        "RePaint, which goes back and forth in time",
        f"{KEEP}, or sample without a mask from the config of the model's DDPMScheduler",
    ),
    "tokens": ("discrete tokens, to which no noise is added", KEEP),
    "decoder": ("the consistency decoder's own schedule", KEEP),
}

BLIND = (
    "at the last timestep of this schedule (rescale_betas_zero_snr, or trained_betas that end at 1) only noise is "
    "left, where a prediction of epsilon says nothing of the image: give the prediction_type that the model was "
    "trained for (v_prediction or sample), or for an epsilon model the betas that it was trained with."
)

# Classes of diffusers whose models have alpha_bar at whole timesteps, and ours.
TAKEN = frozenset(
    {
        *("DDIMScheduler", "DDIMParallelScheduler", "DDIMInverseScheduler", "DDPMScheduler", "DDPMParallelScheduler"),
        *("PNDMScheduler", "LMSDiscreteScheduler", "EulerDiscreteScheduler", "EulerAncestralDiscreteScheduler"),
        *("HeunDiscreteScheduler", "KDPM2DiscreteScheduler", "KDPM2AncestralDiscreteScheduler", "SASolverScheduler"),
        *("DPMSolverMultistepScheduler", "DPMSolverMultistepInverseScheduler", "DPMSolverSinglestepScheduler"),
        *("DPMSolverSDEScheduler", "UniPCMultistepScheduler", "DEISMultistepScheduler"),
        *("DEISScheduler", "OneStepScheduler"),
    }
)
CLIPS = frozenset(name for name in TAKEN if name.startswith(("DDIM", "DDPM")))  # where clip_sample is on by default

REFUSED = {
    "AmusedScheduler": "tokens",
    "BlockRefinementScheduler": "tokens",
    "CMStochasticIterativeScheduler": "consistency",
    "ConsistencyDecoderScheduler": "decoder",
    "CosineDPMSolverMultistepScheduler": "edm",
    "DDPMWuerstchenScheduler": "ratios",
    "DiscreteDDIMScheduler": "tokens",
    "EDMDPMSolverMultistepScheduler": "edm",
    "EDMEulerScheduler": "edm",
    "EntropyBoundScheduler": "tokens",
    "FlowMapEulerDiscreteScheduler": "flow",
    "FlowMatchEulerDiscreteScheduler": "flow",
    "FlowMatchHeunDiscreteScheduler": "flow",
    "FlowMatchLCMScheduler": "flow",
    "HeliosDMDScheduler": "flow",
    "HeliosScheduler": "flow",
    "IPNDMScheduler": "sine",
    "KarrasVeScheduler": "exploding",
    "LCMScheduler": "consistency",
    "LTXEulerAncestralRFScheduler": "flow",
    "MiniMaxH3Scheduler": "flow",
    "PiflowScheduler": "flow",
    "RFD4ProteinaScheduler": "flow",
    "RePaintScheduler": "repaint",
    "SCMScheduler": "trigflow",
    "ScoreSdeVeScheduler": "exploding",
    "ScoreSdeVpScheduler": "vp-sde",
    "TCDScheduler": "consistency",
    "UnCLIPScheduler": "unclip",
    "VQDiffusionScheduler": "tokens",
}
SHIFTED = frozenset({"CogVideoXDDIMScheduler", "CogVideoXDPMScheduler"})  # unless snr_shift_scale is 1
# Of classes that are not diffusers' (a repository brings its own), the name may tell.
NAMES = {
    "flow": re.compile("flow|rectified", re.IGNORECASE),
    "consistency": re.compile("LCM|TCD|Consisten"),
    "edm": re.compile("EDM"),
}

_NO_BETAS = ("beta_schedule", "beta_start", "trained_betas")


def _is(*values) -> Callable:
    return lambda value, config: value in values


def _given(value, config) -> bool:
    return value is not None and value is not False


def _alone(value, config) -> bool:
    """Given, where the config names no betas."""
    return value is not None and not any(name in config for name in _NO_BETAS)


# Fields that tell the kind whatever class stands beside them: conversions of diffusers carry them along.
FIELDS: tuple[tuple[str, str, Callable], ...] = (
    ("prediction_type", "flow", _is("flow_prediction", "flow", "velocity")),
    ("prediction_type", "trigflow", _is("trigflow")),
    *((name, "flow", _given) for name in ("use_flow_sigmas", "use_dynamic_shifting", "shift", "shift_terminal")),
    *((name, "flow", _given) for name in ("base_shift", "max_shift", "stage_range", "tsr_k", "stochastic_sampling")),
    *((name, "edm", _given) for name in ("sigma_data", "sigma_schedule")),
    *((name, "consistency", _given) for name in ("original_inference_steps", "timestep_scaling")),
    ("snr_shift_scale", "shifted", lambda value, config: value not in (None, 1)),
    ("timestep_type", "continuous", _is("continuous")),
    *((name, "exploding", _given) for name in ("s_churn", "s_noise", "snr", "correct_steps")),
    *((name, "exploding", _alone) for name in ("sigma_min", "sigma_max")),
    *((name, "vp-sde", _given) for name in ("beta_min", "beta_max", "sampling_eps")),
    ("scaler", "ratios", _given),
    ("eta", "repaint", lambda value, config: value is not None and "prediction_type" not in config),
    ("variance_type", "unclip", lambda value, config: value is not None and "beta_start" not in config),
    *((name, "tokens", _given) for name in ("num_vec_classes", "mask_token_id", "masking_schedule", "entropy_bound")),
    *((name, "tokens", _given) for name in ("block_length", "corrector_steps")),
)


def check_choice(name: str, value, allowed: tuple) -> None:
    """Raises UserError where a value is not among those allowed."""
    if value not in allowed:
        raise UserError(f"unknown {name} '{value}'; choose from {', '.join(map(str, allowed))}.")


def class_of(config: Mapping) -> str | None:
    """The name of the class that wrote a config, where that can be told.

    A file says it; the config of a scheduler that was made in this process does not: then its fields are compared.
    """
    name = config.get("_class_name")
    name = name[-1] if isinstance(name, list | tuple) and name else name
    if isinstance(name, str):
        return name
    if config.get("algorithm_type") == "deis" and "solver" not in config:
        return "DEISMultistepScheduler"
    return _parameters_of_refused().get(frozenset(key for key in config if not key.startswith("_")))


@functools.cache
def _parameters_of_refused() -> dict[frozenset[str], str]:
    """Names of REFUSED classes by the parameters that each takes."""
    found = {}
    for name in sorted(REFUSED):
        kind = getattr(diffusers, name, None)
        if kind is not None and issubclass(kind, diffusers.ConfigMixin):  # without their libraries, some are dummies
            found[frozenset(inspect.signature(kind.__init__).parameters) - {"self"}] = name
    return found


def refuse_foreign(config: Mapping, ours: str, name: str | None = None) -> None:
    """Raises UserError where `ours`, a sampler, cannot sample the model that a config was written for.

    Args:
        name: the class that wrote the config, by `class_of`, where it is whole.
    """
    if "generator_timestep" in config and ours != "OneStepScheduler":
        raise UserError(f"the model was distilled to one step and takes no sampler but its own, so not '{ours}'.")
    kind, cause = REFUSED.get(name or ""), name
    if name in SHIFTED and config.get("snr_shift_scale", 3.0) != 1:
        kind = "shifted"
    if kind is None:
        for field, its_kind, tells in FIELDS:
            if field in config and tells(config[field], config):
                kind, cause = its_kind, f"{field}={config[field]!r}"
                break
    if kind is None and name is not None and name not in TAKEN | SHIFTED:
        kind = next((k for k, pattern in NAMES.items() if pattern.search(name)), None)
        if kind is None and not any(field in config for field in _NO_BETAS):
            raise UserError(f"the config of {name} names no betas, without which {ours} cannot sample: {KEEP}.")
    if kind is not None:
        what, instead = KINDS[kind]
        raise UserError(f"{ours} cannot sample this model: {cause} is for {what}; {instead}.")


def refusing(init: Callable) -> Callable:
    """Decorates `__init__` of a sampler: a config spread into its arguments is looked at, too."""

    @functools.wraps(init)
    def checked(self, *args, **kwargs):
        refuse_foreign(kwargs, type(self).__name__, kwargs.get("_class_name"))
        init(self, *args, **kwargs)

    return checked


# What a config says of the model, and not of the way to sample it.
_FACTS = frozenset(
    {
        *("num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "trained_betas", "prediction_type"),
        *("rescale_betas_zero_snr", "clip_sample", "clip_sample_range"),
        *("thresholding", "dynamic_thresholding_ratio", "sample_max_value"),
    }
)


class TakesConfigs:
    """The `from_config` of our samplers; stands before diffusers' ConfigMixin among the bases."""

    @classmethod
    def from_config(cls, config=None, return_unused_kwargs=False, **kwargs):
        """The sampler for the model that another scheduler's config was written for; kwargs replace fields of it.

        Raises:
            UserError: the config is that of a model that this sampler cannot sample.
        """
        if isinstance(config, str | os.PathLike):
            config = cls.load_config(config)
        if isinstance(config, Mapping):
            config = dict(config)
            refuse_foreign({**config, **kwargs}, cls.__name__, class_of(config))
            # diffusers drops what was a default of the other class: its betas, say, where ours has others.
            ours = inspect.signature(cls.__init__).parameters
            stated = {k for k in _FACTS & set(config) if k not in ours or config[k] != ours[k].default}
            config["_use_default_values"] = [k for k in config.get("_use_default_values", ()) if k not in stated]
            kwargs = cls._translated(config, kwargs)
        return super().from_config(config, return_unused_kwargs, **kwargs)

    @classmethod
    def _translated(cls, config: dict, kwargs: dict) -> dict:
        """kwargs with what follows from the class that wrote the config."""
        return kwargs
