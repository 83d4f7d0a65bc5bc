"""Which schedulers' configs these samplers take: those of models trained on x_t = sqrt(a) x_0 + sqrt(1 - a) n.

DEISScheduler and DDIMScheduler take those of flow-matching models too, and DEISScheduler EDM's.

diffusers makes any scheduler from any config: it drops the fields that a class does not know, and takes defaults for
those that it misses. From the config of a flow-matching model comes a schedule that the model never saw, and noise.
So a config is looked at as a whole, before fields are dropped: by the class that wrote it, and by its fields.
"""

from __future__ import annotations

import functools
import inspect
import os
from collections.abc import Callable, Mapping

import diffusers
import numpy as np

from ..checks import annotations_of, check, plain_number, shown
from ..errors import UserError
from ..files.outside import reason
from .kinds import BETAS, EDM, FIELDS, FLOW, KEEP, KINDS, NAMES, REFUSED, SHIFTED, TAKEN


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
    return next(reversed(_with_parameters(config)), None)


def _with_parameters(config: Mapping) -> tuple[str, ...]:
    """Names of classes with just the parameters of a config, those that are refused last."""
    return _by_parameters().get(frozenset(key for key in config if not str(key).startswith("_")), ())


@functools.cache
def _by_parameters() -> dict[frozenset[str], tuple[str, ...]]:
    """Names of flows', EDM's and refused classes by the parameters that each takes."""
    found: dict[frozenset[str], tuple[str, ...]] = {}
    for name in (*sorted(FLOW | EDM), *sorted(REFUSED)):
        kind = getattr(diffusers, name, None)
        if kind is not None and issubclass(kind, diffusers.ConfigMixin):  # without their libraries, some are dummies
            parameters = frozenset(inspect.signature(kind.__init__).parameters) - {"self"}
            found[parameters] = (*found.get(parameters, ()), name)
    return found


def kind_of(config: Mapping, name: str | None = None) -> tuple[str | None, str]:
    """(which of KINDS a config was written for, None for a model with alpha_bar; what tells so).

    Args:
        name: the class that wrote the config, by `class_of`, where it is whole.
    """
    if name in REFUSED:
        return REFUSED[name], name
    if name in SHIFTED and config.get("snr_shift_scale", 3.0) != 1:
        return "shifted", name
    for field, kind, tells in FIELDS:
        if field in config and tells(config[field], config):
            return kind, f"{field}={config[field]!r}"
    if name in FLOW | EDM:
        return ("flow" if name in FLOW else "edm"), name
    if name is not None and name not in TAKEN | SHIFTED:
        return next((k for k, pattern in NAMES.items() if pattern.search(name)), None), name
    return None, name or ""


def refuse_foreign(config: Mapping, ours: str, name: str | None = None, takes: frozenset[str] = frozenset()) -> None:
    """Raises UserError where `ours`, a sampler, cannot sample the model that a config was written for.

    Args:
        name: the class that wrote the config, by `class_of`, where it is whole.
        takes: KINDS that this sampler knows beside models with alpha_bar.
    """
    if "generator_timestep" in config and ours != "OneStepScheduler":
        raise UserError(f"the model was distilled to one step and takes no sampler but its own, so not '{ours}'.")
    if "tables" in config:
        raise UserError(
            f"this config is of a schedule fitted to the model (FittedScheduler) and does not say the model's noise "
            f"schedule; give {ours} the config of the scheduler that the model had before the fit."
        )
    kind, cause = kind_of(config, name)
    unknown = name is not None and name not in TAKEN | SHIFTED | FLOW | EDM and name not in REFUSED
    if kind is None and unknown and not any(field in config for field in BETAS):
        raise UserError(f"the config of {name} names no betas, without which {ours} cannot sample: {KEEP}.")
    # A class that diffusers does not have may mean anything by its fields.
    foreign = unknown and not (kind == "flow" and config.get("prediction_type") == "flow_prediction")
    if kind is not None and (kind not in takes or foreign):
        what, instead = KINDS[kind]
        if cause == name and "_class_name" not in config:  # the name is told by fields, which several may have
            cause = " or ".join(_with_parameters(config)) or cause
        raise UserError(f"{ours} cannot sample this model: {cause} is for {what}; {instead}.")


LEAST_AND_MOST = {
    "num_train_timesteps": (1, 1_000_000),
    "beta_start": (0, 1e6),
    "beta_end": (0, 1e6),
    "dynamic_thresholding_ratio": (0, 1),
}


def check_values(init: Callable, given: Mapping, ours: str) -> None:
    """Raises UserError for an argument of a sampler that is not as its annotation says; None stands for nothing said.

    Betas of a user's own are numbers from 0 to 1, one a timestep.
    """
    kinds = annotations_of(init)
    for name, value in given.items():
        if name == "trained_betas" and value is not None:
            check_betas(value, ours)
        elif name in kinds and (value is not None or name in LEAST_AND_MOST):
            check(value, kinds[name], f"{ours}: {name}", *LEAST_AND_MOST.get(name, (None, None)))
    if given.get("beta_schedule") != "continuous" and given.get("trained_betas") is None:
        for name in ("beta_start", "beta_end"):
            check(given.get(name, 0.0), float | None, f"{ours}: {name}", 0, 1)


def check_betas(betas, ours: str) -> None:
    """Raises UserError unless betas are finite numbers [N] from 0 to 1."""
    try:
        values = np.asarray(betas, np.float64)
        if values.ndim == 1 and len(values) and np.isfinite(values).all() and values.min() >= 0 and values.max() <= 1:
            return
    except (ArithmeticError, TypeError, ValueError, RuntimeError):
        pass
    raise UserError(f"{ours}: trained_betas must be a list of numbers from 0 to 1, one a timestep.")


def refusing(init: Callable) -> Callable:
    """Decorates `__init__` of a sampler: a config spread into its arguments is looked at, too."""

    names = list(inspect.signature(init).parameters)[1:]

    @functools.wraps(init)
    def checked(self, *args, **kwargs):
        args, kwargs = tuple(map(plain_number, args)), {name: plain_number(one) for name, one in kwargs.items()}
        ours = type(self).__name__
        refuse_foreign(kwargs, ours, kwargs.get("_class_name"), self.takes)
        check_values(init, {**dict(zip(names, args, strict=False)), **kwargs}, ours)
        init(self, *args, **kwargs)

    return checked


# What a config says of the model, and not of the way to sample it.
_FACTS = frozenset(
    {
        *("num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "trained_betas", "prediction_type"),
        *("rescale_betas_zero_snr", "clip_sample", "clip_sample_range"),
        *("thresholding", "dynamic_thresholding_ratio", "sample_max_value"),
        *("shift", "use_dynamic_shifting", "base_shift", "max_shift", "base_image_seq_len", "max_image_seq_len"),
        *("invert_sigmas", "shift_terminal", "time_shift_type"),
        *("sigma_data", "sigma_min", "sigma_max", "sigma_schedule", "rho", "final_sigmas_type"),
    }
)


class TakesConfigs:
    """The `from_config` of our samplers; stands before diffusers' ConfigMixin among the bases.

    takes: KINDS of models that the sampler knows beside those with alpha_bar.
    elsewhere: KINDS for which another class is this sampler, which `_elsewhere` makes.
    """

    takes: frozenset[str] = frozenset()
    elsewhere: frozenset[str] = frozenset()

    @classmethod
    def from_config(cls, config=None, return_unused_kwargs=False, **kwargs):
        """The sampler for the model that another scheduler's config was written for; kwargs replace fields of it.

        Raises:
            UserError: the config is that of a model that this sampler cannot sample.
        """
        if isinstance(config, str | os.PathLike):
            try:
                config = cls.load_config(config)
            except (OSError, ValueError) as error:
                raise UserError(f"no sampler's config can be read from '{config}': {reason(error)}.") from error
        if not isinstance(config, Mapping):
            raise UserError(
                f"{cls.__name__}: config must be that of a scheduler, or its folder; got {shown(config)}."
            )
        config = {str(name): value for name, value in config.items()}
        if kind_of({**config, **kwargs}, class_of(config))[0] in cls.elsewhere:
            return cls._elsewhere(config, return_unused_kwargs, kwargs)
        refuse_foreign({**config, **kwargs}, cls.__name__, class_of(config), cls.takes)
        # diffusers drops what was a default of the other class: its betas, say, where ours has others.
        ours = inspect.signature(cls.__init__).parameters
        # Betas may be an array, which has no one answer to "!=".
        defaults = {k: ours[k].default for k in ours}
        stated = {k for k in _FACTS & set(config) if not np.array_equal(config[k], defaults.get(k, _FACTS))}
        config["_use_default_values"] = [k for k in config.get("_use_default_values", ()) if k not in stated]
        kwargs = cls._translated(config, kwargs)
        return super().from_config(config, return_unused_kwargs, **kwargs)

    @classmethod
    def _translated(cls, config: dict, kwargs: dict) -> dict:
        """kwargs with what follows from the class that wrote the config."""
        return kwargs
