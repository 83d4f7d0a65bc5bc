"""Kinds of models by the schedulers that were written for them: which classes and fields tell which kind.

A class of diffusers that is not known yet is a line in TAKEN or REFUSED.
"""

from __future__ import annotations

import re
from collections.abc import Callable

KEEP = "keep the pipeline's own scheduler"

# What a model is trained for, and what to sample it with instead.
KINDS = {
    "flow": (
        "flow matching, which has no alpha_bar",
        f"{KEEP}, or take DEISScheduler, to which a config of a class that is not diffusers' has to say "
        "prediction_type='flow_prediction'",
    ),
    "edm": (
        "EDM's preconditioned models, which have noise levels and no alpha_bar",
        f"{KEEP}, or take DEISScheduler",
    ),
    "arctan": ("models that are called with the arctangent of sigma for a timestep", KEEP),
    "stages": ("flow matching in stages, from small pictures to large ones", KEEP),
    "jumps": (
        "models that are told where a step is to end",
        f"{KEEP}; to a config of FlowMatchHeunDiscreteScheduler, which has the same fields, add its _class_name",
    ),
    "mixed": ("flow matching at EDM's noise levels, which its pipeline works out between the steps", KEEP),
    "turned": ("velocities that point to the data, with times counted from the data", KEEP),
    "stochastic": (
        "flow matching with new noise after each step",
        f"{KEEP}; for a model that can do without it give the config with stochastic_sampling=False",
    ),
    "protein": ("proteins, with a noise schedule of its own for each part", KEEP),
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

# Classes of diffusers that sample flow-matching models, or EDM's: DEISScheduler takes their configs.
FLOW = frozenset({"FlowMatchEulerDiscreteScheduler", "FlowMatchHeunDiscreteScheduler"})
EDM = frozenset({"EDMEulerScheduler", "EDMDPMSolverMultistepScheduler"})
# Classes of diffusers whose models have alpha_bar at whole timesteps, and ours. Some serve flow matching, too.
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
    "CosineDPMSolverMultistepScheduler": "arctan",
    "DDPMWuerstchenScheduler": "ratios",
    "DiscreteDDIMScheduler": "tokens",
    "EntropyBoundScheduler": "tokens",
    "FlowMapEulerDiscreteScheduler": "jumps",
    "FlowMatchLCMScheduler": "consistency",
    "HeliosDMDScheduler": "stages",
    "HeliosScheduler": "stages",
    "IPNDMScheduler": "sine",
    "KarrasVeScheduler": "exploding",
    "LCMScheduler": "consistency",
    "LTXEulerAncestralRFScheduler": "stochastic",
    "MiniMaxH3Scheduler": "turned",
    "PiflowScheduler": "consistency",
    "RFD4ProteinaScheduler": "protein",
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

BETAS = ("beta_schedule", "beta_start", "trained_betas")


def _is(*values) -> Callable:
    return lambda value, config: isinstance(value, str) and value in values


def _given(value, config) -> bool:
    return value is not None and value is not False


def _alone(value, config) -> bool:
    """Given, where the config names no betas."""
    return value is not None and not any(name in config for name in BETAS)


def _decoder(value, config) -> bool:
    """Whether sigma_data is all that a config says of noise levels."""
    return value is not None and "sigma_max" not in config


# Fields that tell the kind whatever class stands beside them: conversions of diffusers carry them along.
FIELDS: tuple[tuple[str, str, Callable], ...] = (
    ("stage_range", "stages", _given),
    ("tsr_k", "protein", _given),
    ("stochastic_sampling", "stochastic", _given),
    ("sigma_data", "mixed", lambda value, config: value is not None and config.get("shift") is not None),
    ("prediction_type", "flow", _is("flow_prediction", "flow", "velocity")),
    ("prediction_type", "trigflow", _is("trigflow")),
    *((name, "flow", _given) for name in ("use_flow_sigmas", "use_dynamic_shifting", "shift", "shift_terminal")),
    *((name, "flow", _given) for name in ("base_shift", "max_shift")),
    ("sigma_data", "decoder", _decoder),
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
