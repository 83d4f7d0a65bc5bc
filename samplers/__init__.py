"""Few-step samplers: DDIM, the DEIS family, schedules fitted to a model; DisBack, distillation to one step."""

from typing import TYPE_CHECKING

from ..lazy import lazy_names

if TYPE_CHECKING:  # for editors; at run time, each when it is first used
    from .ddim import DDIMScheduler
    from .deis import DEISScheduler
    from .distillation.config import DisBackConfig
    from .distillation.disback import distill
    from .fitted import FittedScheduler
    from .fitting.fit import FitConfig, fit
    from .one_step import OneStepScheduler

__all__ = [
    "DDIMScheduler",
    "DEISScheduler",
    "DisBackConfig",
    "FitConfig",
    "FittedScheduler",
    "OneStepScheduler",
    "distill",
    "fit",
]

__getattr__, __dir__ = lazy_names(
    __name__,
    {
        "DDIMScheduler": "ddim",
        "DEISScheduler": "deis",
        "DisBackConfig": "distillation.config",
        "FitConfig": "fitting.fit",
        "FittedScheduler": "fitted",
        "OneStepScheduler": "one_step",
        "distill": "distillation.disback",
        "fit": "fitting.fit",
    },
    rooms=("comparison", "distillation", "fitting", "maths"),
)
