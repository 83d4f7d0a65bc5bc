"""One file for each paper: a recipe that turns layers and calibration into a plan.

A new file here with a `@register` is a new `method`.
"""

from ..registry import load_members

load_members(__name__, __path__)
