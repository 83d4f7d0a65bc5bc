"""Passes that change a model and not its function."""

from . import reorder, rotate, smooth, smooth_attention  # noqa: F401 (each registers itself)
