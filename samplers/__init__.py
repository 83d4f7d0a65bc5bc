"""Few-step samplers: DDIM and the DEIS family as diffusers schedulers; DisBack, distillation to one step."""

from typing import TYPE_CHECKING

from ..lazy import lazy_names

if TYPE_CHECKING:  # for editors; at run time, each when it is first used
    from .ddim import DDIMScheduler
    from .deis import DEISScheduler
    from .distillation.config import DisBackConfig
    from .distillation.disback import distill
    from .one_step import OneStepScheduler

__all__ = ["DDIMScheduler", "DEISScheduler", "DisBackConfig", "OneStepScheduler", "distill"]

__getattr__, __dir__ = lazy_names(
    __name__,
    {
        "DDIMScheduler": "ddim",
        "DEISScheduler": "deis",
        "DisBackConfig": "distillation.config",
        "OneStepScheduler": "one_step",
        "distill": "distillation.disback",
    },
    rooms=("comparison", "distillation", "maths"),
)
