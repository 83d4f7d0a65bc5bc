"""Few-step samplers: DDIM and the DEIS family as diffusers schedulers."""

from .ddim import DDIMScheduler
from .deis import DEISScheduler

__all__ = ["DDIMScheduler", "DEISScheduler"]
