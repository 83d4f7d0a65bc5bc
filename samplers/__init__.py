"""Few-step samplers: DDIM and the DEIS family as diffusers schedulers; DisBack, distillation to one step."""

from .ddim import DDIMScheduler
from .deis import DEISScheduler
from .distillation.config import DisBackConfig
from .distillation.disback import distill
from .one_step import OneStepScheduler

__all__ = ["DDIMScheduler", "DEISScheduler", "DisBackConfig", "OneStepScheduler", "distill"]
