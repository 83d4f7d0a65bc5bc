"""Few-step samplers: DDIM and the DEIS family as diffusers schedulers; DisBack, distillation to one step."""

from .ddim import DDIMScheduler
from .deis import DEISScheduler
from .disback import distill
from .disback_config import DisBackConfig
from .one_step import OneStepScheduler

__all__ = ["DDIMScheduler", "DEISScheduler", "DisBackConfig", "OneStepScheduler", "distill"]
