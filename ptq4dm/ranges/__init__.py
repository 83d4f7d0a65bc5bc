"""How far a grid reaches: range objectives. A new file here that registers itself is a new `objective`."""

from ..registry import load_members
from .registry import OBJECTIVES, register_objective

__all__ = ["OBJECTIVES", "register_objective"]

load_members(__name__, __path__)
