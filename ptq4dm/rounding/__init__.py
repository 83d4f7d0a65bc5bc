"""Which of two neighbouring codes: rounders. A new file here that registers itself is a new `rounding`."""

from ..registry import load_members
from .registry import ROUNDERS, register_rounder

__all__ = ["ROUNDERS", "register_rounder"]

load_members(__name__, __path__)
